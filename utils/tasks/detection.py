"""Detection data in VOC's folder format: pictures, and the boxes that their annotations hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision
from utils.core.unpickling import printable, reason
from utils.tasks.boxes import Objects
from utils.tasks.data import Guarded
from utils.tasks.images import check_channels, load_image
from utils.tasks.voc import CLASSES, VocSplit

# What COCO calls those of VOC's classes that have another name there.
_COCO_NAMES = {"aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle"}
_COCO_NAMES |= {"pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"}


class VocDetection(Dataset):
    """Pairs of an image [channels, H, W], as the network takes it, and its Objects.

    labels: the network's output for each class name. Annotations are read, and their mistakes told, at once; with
    skip_bad an image with a bad one is a bad sample. Pictures are read when they are asked for.
    """

    def __init__(
        self,
        voc: VocSplit,
        spec: InputSpec,
        labels: Mapping[str, int],
        skip_bad: bool = False,
        pixel_inclusive: bool = False,
    ):
        self.files, self.spec = voc.images, spec
        self.annotations: list[Annotation | BadAnnotation] = []
        for file, image in zip(voc.annotations("Annotations", ".xml", skip_bad), voc.images, strict=True):
            try:
                self.annotations.append(read_annotation(file, labels, image, pixel_inclusive))
            except BadAnnotation as error:
                if not skip_bad:
                    raise UserError(f"{error}; mend it, or pass --skip_bad_images") from None
                self.annotations.append(error)
        sound = [annotation for annotation in self.annotations if isinstance(annotation, Annotation)]
        if all(annotation.objects.difficult.all() for annotation in sound):
            raise UserError(
                f"split {voc.split!r} of {str(voc.folder)!r} holds no object that counts, so there is nothing to score"
            )
        clipped, swapped = (sum(getattr(one, kind) for one in sound) for kind in ("clipped", "swapped"))
        self.notes = [f"{clipped} box(es) reached a pixel outside their image and are clipped"] if clipped else []
        self.notes += [f"{swapped} box(es) had swapped corners"] if swapped else []

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Objects]:
        annotation = self.annotations[index]
        if isinstance(annotation, BadAnnotation):
            raise annotation
        picture = load_image(self.files[index], self.spec.channels)
        if picture.size != annotation.size:
            width, height = annotation.size
            raise ValueError(f"it is {picture.width}x{picture.height}, its annotation says {width}x{height}")
        return detection_transform(picture, self.spec), annotation.objects


def voc_detection(
    voc: VocSplit, spec: InputSpec, outputs: int, skip_bad: bool = False, pixel_inclusive: bool = False
) -> tuple[Guarded, dict[str, int]]:
    """The images and objects of a split, and the network's output for each class name.

    Class names are the split's labels, otherwise VOC's 20. outputs: the network's, background included. skip_bad:
    whether annotations may be bad. pixel_inclusive: match boxes as VOC's development kit does, with the pixels of
    their far edges.
    """
    check_channels(spec)
    labels = class_labels(voc.labels or CLASSES, outputs)
    samples = VocDetection(voc, spec, labels, skip_bad, pixel_inclusive)
    return Guarded(samples, [str(file) for file in voc.images], [*voc.notes, *samples.notes]), labels


def class_labels(names: tuple[str, ...], outputs: int) -> dict[str, int]:
    """The network's output for each class name: 1, 2, ..., or COCO's, by name, for a network trained on COCO."""
    names = tuple(name for name in names if name.lower() not in ("background", "__background__"))
    if outputs == len(names) + 1:
        return {name: label for label, name in enumerate(names, 1)}
    coco = torchvision.models.detection.SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.meta["categories"]
    labels = {name: coco.index(_COCO_NAMES.get(name, name)) for name in names if _COCO_NAMES.get(name, name) in coco}
    if outputs == len(coco) and len(labels) == len(names):
        return labels
    why = (
        "; as a network trained on COCO it does not know " + next(name for name in names if name not in labels)
        if outputs == len(coco)
        else ""
    )
    raise UserError(
        f"the network has {outputs} outputs, background included, "
        f"but the data have {len(names)} classes ({', '.join(names)}){why}; "
        "pass data of the network's own classes, or name them in labels.txt of the VOC folder"
    )


def detection_transform(picture: Image.Image, spec: InputSpec) -> Tensor:
    """Squeeze to the network's size whatever the shape, normalise.

    Without smoothing before shrinking, and in whole steps of 1/255: as these networks were trained.
    """
    functional = torchvision.transforms.functional
    pixels = functional.pil_to_tensor(picture)
    pixels = functional.resize(pixels, spec.size, functional.InterpolationMode(spec.interpolation), antialias=False)
    return functional.normalize(pixels / 255, spec.mean, spec.std, inplace=True)


def stack(samples: list[tuple[Tensor, Objects]]) -> tuple[Tensor, list[Objects]]:
    """Samples as one batch: images [N, channels, H, W], and their objects as a list, since their number varies."""
    images, objects = zip(*samples, strict=True)
    return torch.stack(images), list(objects)


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
