"""Classification, segmentation and detection: data, metrics, pictures."""
