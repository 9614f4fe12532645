"""OpenVINO: runs the ONNX file that its target makes."""
