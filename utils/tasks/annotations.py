"""The objects that VOC's XML annotations hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch
from PIL import Image

from utils.core.errors import UserError
from utils.core.unpickling import printable, reason
from utils.tasks.boxes import Objects


@dataclass(frozen=True)
class Annotation:
    """size: the image's width and height. clipped, swapped: boxes that were put right."""

    objects: Objects
    size: tuple[int, int]
    clipped: int
    swapped: int


class BadAnnotation(ValueError):
    """A mistake in one image's annotation, in a line that names the file."""


def read_annotation(
    file: Path, labels: Mapping[str, int], image: Path | None = None, pixel_inclusive: bool = False
) -> Annotation:
    """The objects of a VOC annotation; corners count pixels from 1.

    Boxes that reach at most a pixel outside the image, whether pixels count from 0 or from 1, are clipped; swapped
    corners are put in order. Any other mistake is a BadAnnotation. image: what tells the size where the file does not.
    """
    try:
        root = ElementTree.parse(file).getroot()
    except Exception as error:  # the parser raises several kinds on damaged bytes
        raise BadAnnotation(f"annotation {str(file)!r} is no valid XML: {reason(error)}") from None
    width, height = _size(root, file, image)
    boxes, found, difficult, clipped, swapped = [], [], [], 0, 0
    for index, entry in enumerate(root.findall("object"), 1):
        name = (entry.findtext("name") or "").strip()
        where = f"annotation {str(file)!r}, object {index} ({printable(name) or 'without a name'})"
        if name not in labels:
            raise UserError(
                f"{where}: unknown class; the classes are {', '.join(labels)} (labels.txt in the folder, or --classes, names others)"
            )
        said = _corners(entry, where)
        (x1, x2), (y1, y2) = sorted(said[::2]), sorted(said[1::2])
        box = [min(max(x1, 1), width), min(max(y1, 1), height), min(max(x2, 1), width), min(max(y2, 1), height)]
        shown = f"box {', '.join(f'{value:g}' for value in said)} (xmin, ymin, xmax, ymax)"
        if min(x1, y1) < -1 or x2 > width + 1 or y2 > height + 1:
            raise BadAnnotation(f"{where}: {shown} reaches outside the image of {width}x{height}")
        if box[0] >= box[2] or box[1] >= box[3]:
            raise BadAnnotation(f"{where}: {shown} is empty")
        swapped += [x1, y1, x2, y2] != said
        clipped += [x1, y1, x2, y2] != box
        boxes.append([(side - 1) / whole for side, whole in zip(box, (width, height) * 2, strict=True)])
        found.append(labels[name])
        difficult.append(_number(entry, "difficult") == 1)
    objects = Objects(
        torch.tensor(boxes).reshape(-1, 4),
        torch.tensor(found, dtype=torch.long),
        torch.tensor(difficult, dtype=torch.bool),
        (1 / width, 1 / height) if pixel_inclusive else (0.0, 0.0),
    )
    return Annotation(objects, (width, height), clipped, swapped)


def _size(root: ElementTree.Element, file: Path, image: Path | None) -> tuple[int, int]:
    """Width and height that the annotation states, or else those of the image."""
    stated = [_number(root, f"size/{side}") for side in ("width", "height")]
    if all(side and side >= 1 for side in stated):
        return int(stated[0]), int(stated[1])
    try:
        with Image.open(image) as picture:
            return picture.size
    except Exception as error:  # PIL raises some ten kinds on damaged bytes
        raise BadAnnotation(
            f"annotation {str(file)!r} does not state the image's <size>, and the image cannot be read ({reason(error)})"
        ) from None


def _corners(entry: ElementTree.Element, where: str) -> list[float]:
    corners = [_number(entry, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    if None in corners:
        raise BadAnnotation(f"{where}: no <bndbox> with numbers for xmin, ymin, xmax and ymax")
    return corners


def _number(entry: ElementTree.Element, path: str) -> float | None:
    """The finite number at a path of tags, None where there is none."""
    try:
        value = float(entry.findtext(path) or "")
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None
