"""The result tables that this project reproduces, as their source gives them, in percent.

Simulated INT8, weights and activations of 8 bits per tensor, biases of 16. They are of other weights or images than
ours wherever results/README.md says so: compare what each row loses from its own FP32.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """fp32: as loaded. quantized: by row. images: what the table is about."""

    images: str
    fp32: float
    quantized: dict[str, float]


_ROWS = (
    "Original",
    "+ReLU",
    "+ReLU+LE",
    "+ReLU+LE +DR",
    "+BC",
    "+BC +clip_15",
    "+ReLU+LE+BC",
    "+ReLU+LE+BC +DR",
)


def _table(images: str, fp32: float, *quantized: float | None) -> Published:
    rows = zip(_ROWS, quantized, strict=True)
    return Published(images, fp32, {row: figure for row, figure in rows if figure is not None})


TABLES = {
    ("classification", "mobilenet_v2"): [
        _table("ImageNet", 71.81, 0.102, 0.102, 70.32, 70.47, 57.07, 65.37, 70.79, 70.9),
    ],
    ("classification", "resnet18"): [
        _table("ImageNet", 69.76, 69.13, 69.13, 69.2, 67.74, 69.04, 69.04, 69.04, 67.65),
    ],
    # Their +BC rows are with ReLU in place of ReLU6.
    ("segmentation", "deeplabv3plus_mobilenet_v2"): [
        _table("VOC2012", 70.81, 60.03, 60.0, 66.22, 67.04, 69.04, 66.99, 69.46, 70.12),
        _table("VOC2007", 74.54, 62.36, 61.66, 69.47, 70.28, 72.1, 70.16, 72.84, 73.5),
    ],
    ("detection", "ssd_lite_mobilenet_v2"): [
        _table("VOC2012", 70.77, 70.46, 67.22, 67.58, None, 70.47, 70.71, 68.09, None),
        _table("VOC2007", 60.69, 60.54, 57.21, 57.63, None, 60.48, 60.68, 58.09, None),
    ],
}


def published(task: str, model: str, data: str) -> Published | None:
    """The table of that network: on these images where it says so, else on any."""
    tables = TABLES.get((task, model), [])
    return next((table for table in tables if table.images in data), tables[0] if tables else None)
