"""Detection: classes and boxes of objects, scored by mean average precision; annotations from a VOC folder."""

import csv
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.predictions import prior_predictions
from utils.core.torchvision_compat import torchvision
from utils.tasks import pictures
from utils.tasks.base import Data, Task
from utils.tasks.boxes import BoxCoder, Objects
from utils.tasks.data import BadSample, Guarded, evenly, load_rgb
from utils.tasks.metrics import MeanAveragePrecision
from utils.tasks.voc import CLASSES, VocSplit, open_voc

_SHOWN = 0.3  # score from which a detection is drawn

# What COCO calls those of VOC's classes that have another name there.
_COCO_NAMES = {"aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle"}
_COCO_NAMES |= {"pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"}


class VocDetection(Dataset):
    """Pairs of an image [3, H, W], as the network takes it, and its Objects.

    labels: the network's output for each class name. Annotations are read, and their mistakes told,
    at once; pictures when they are asked for.
    """

    def __init__(self, voc: VocSplit, spec: InputSpec, labels: Mapping[str, int]):
        self.files, self.spec = voc.images, spec
        annotations = [read_annotation(file, labels) for file in voc.annotations("Annotations", ".xml")]
        self.objects, self.sizes = zip(*annotations, strict=True)
        if all(image.difficult.all() for image in self.objects):
            raise UserError(
                f"split {voc.split!r} of {str(voc.folder)!r} holds no object that counts, so there is nothing to score"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Objects]:
        picture = load_rgb(str(self.files[index]))
        if picture.size != self.sizes[index]:
            width, height = self.sizes[index]
            raise ValueError(f"it is {picture.width}x{picture.height}, its annotation says {width}x{height}")
        return detection_transform(picture, self.spec), self.objects[index]


def voc_detection(voc: VocSplit, spec: InputSpec, outputs: int) -> tuple[Guarded, dict[str, int]]:
    """The images and objects of a split, and the network's output for each class name.

    Class names are labels.txt's, otherwise VOC's 20. outputs: the network's, background included.
    """
    labels = class_labels(voc.labels or CLASSES, outputs)
    return Guarded(VocDetection(voc, spec, labels), [str(file) for file in voc.images]), labels


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
    """Samples as one batch: images [N, 3, H, W], and their objects as a list, since their number varies."""
    images, objects = zip(*samples, strict=True)
    return torch.stack(images), list(objects)


def read_annotation(file: Path, labels: Mapping[str, int]) -> tuple[Objects, tuple[int, int]]:
    """The objects of a VOC annotation, and the width and height that it states."""
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise UserError(f"annotation {str(file)!r} is no valid XML: {error}") from None
    width, height = (_number(root, f"size/{side}") for side in ("width", "height"))
    if not (width and height and width > 0 and height > 0):
        raise UserError(
            f"annotation {str(file)!r} does not state the image's <size> with a positive <width> and <height>"
        )

    boxes, found, difficult = [], [], []
    for index, entry in enumerate(root.findall("object"), 1):
        name = (entry.findtext("name") or "").strip()
        where = f"annotation {str(file)!r}, object {index} ({name or 'without a name'})"
        if name not in labels:
            raise UserError(
                f"{where}: unknown class; the classes are {', '.join(labels)} (labels.txt in the folder names others)"
            )
        corners = [_number(entry, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        if None in corners:
            raise UserError(f"{where}: no <bndbox> with numbers for xmin, ymin, xmax and ymax")
        x1, y1, x2, y2 = corners
        box = f"box {x1:g}, {y1:g}, {x2:g}, {y2:g} (xmin, ymin, xmax, ymax)"
        if x1 >= x2 or y1 >= y2:
            raise UserError(f"{where}: {box} is inverted or empty")
        if min(x1, y1) < 0 or x2 > width + 1 or y2 > height + 1:  # 1 more: some tools count pixels from 0, some from 1
            raise UserError(f"{where}: {box} reaches outside the image of {width:g}x{height:g}")
        boxes.append([(x1 - 1) / width, (y1 - 1) / height, (x2 - 1) / width, (y2 - 1) / height])  # VOC counts from 1
        found.append(labels[name])
        difficult.append(_number(entry, "difficult") == 1)
    objects = Objects(
        torch.tensor(boxes).reshape(-1, 4),
        torch.tensor(found, dtype=torch.long),
        torch.tensor(difficult, dtype=torch.bool),
    )
    return objects, (int(width), int(height))


def _number(entry: ElementTree.Element, path: str) -> float | None:
    """The finite number at a path of tags, None where there is none."""
    try:
        value = float(entry.findtext(path) or "")
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


# ---------------------------------------------------------------------------------------- the task


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="ssd_lite_mobilenet_v2",
        metavar="NAME",
        help="ssd_lite_mobilenet_v2 (default), torchvision:ssdlite320_mobilenet_v3_large, torchvision:ssd300_vgg16, "
        "package.module:factory",
    )
    parser.add_argument("--split", help="list in ImageSets/Main (default: test of VOC2007, otherwise val)")
    parser.add_argument(
        "--metric",
        choices=("voc07", "voc12"),
        help="mean average precision by 11 points of recall, or by area (default: as the data's year has it, else voc12)",
    )
    parser.set_defaults(distill_images=32)


def open_data(args: Namespace, spec: InputSpec, classes: int, extras: Mapping[str, Any]) -> Data:
    """extras: "coder", the fields of the network's BoxCoder."""
    coder = BoxCoder(**extras["coder"])
    split = open_voc(args.data, "Main", args.split)
    samples, labels = voc_detection(split, spec, classes)
    samples = evenly(samples, args.limit)
    rule = args.metric or ("voc07" if split.year == 2007 else "voc12")

    def metric(reference: MeanAveragePrecision | None) -> MeanAveragePrecision:
        return MeanAveragePrecision(labels, coder, rule, reference, keep=args.table)

    show = partial(draw, samples=samples, coder=coder, labels=labels, spec=spec)
    return Data(samples, metric, show, {label: name for name, label in labels.items()}, stack)


def draw(
    folder: Path,
    networks: Mapping[str, nn.Module],
    metrics: Mapping[str, MeanAveragePrecision],
    device: torch.device,
    samples: Dataset,
    coder: BoxCoder,
    labels: Mapping[str, int],
    spec: InputSpec,
    count: int = 8,
) -> list[Path]:
    """Draw the annotated objects and each network's detections side by side, and write precision and
    recall as CSV; returns the files.

    Drawn are images evenly spread over samples, and detections that a user would trust: scores of
    0.3 and more. networks, metrics: by caption. labels: the network's output for each class name.
    """
    names = {label: name for name, label in labels.items()}
    files = []
    for index in range(0, len(samples), max(1, len(samples) // count)):
        if len(files) == count or isinstance(sample := samples[index], BadSample):
            continue
        image, objects = sample
        picture = pictures.denormalise(image, spec)
        marks = [" (difficult)" if difficult else "" for difficult in objects.difficult.tolist()]
        captions = [names[label] + mark for label, mark in zip(objects.labels.tolist(), marks, strict=True)]
        panels = {"truth": pictures.draw_boxes(picture, objects.boxes, objects.labels, captions)}
        for name, model in networks.items():
            with torch.inference_mode():
                found = coder.detect(model(image[None].to(device)))[0]
            shown = [
                i for i, score in enumerate(found.scores.tolist()) if score >= _SHOWN and int(found.labels[i]) in names
            ]
            captions = [f"{names[int(found.labels[i])]} {found.scores[i]:.2f}" for i in shown]
            panels[name] = pictures.draw_boxes(picture, found.boxes[shown], found.labels[shown], captions)
        files.append(folder / f"{len(files) + 1}_{pictures.sample_name(samples, index)}.png")
        sheet = [pictures.captioned(panel, [caption]) for caption, panel in panels.items()]
        pictures.grid(sheet, columns=len(sheet)).save(files[-1])
    files.append(folder / "precision_recall.csv")
    write_curves(files[-1], metrics)
    return files


def write_curves(file: Path, metrics: Mapping[str, MeanAveragePrecision]) -> None:
    """Precision and recall of every class and network at each of its detections' scores, as CSV."""
    with file.open("w", newline="", encoding="utf-8") as text:
        rows = csv.writer(text)
        rows.writerow(("network", "class", "score", "precision", "recall"))
        for network, metric in metrics.items():
            for name, curve in metric.curves().items():
                points = torch.stack([curve.scores, curve.precision, curve.recall], 1).tolist()
                rows.writerows((network, name, *(f"{value:.6f}" for value in point)) for point in points)


TASK = Task(
    name="detection",
    program="main_det.py",
    summary="Data-free quantization of a detection network, evaluated on VOC detection or any folder in its format.",
    add_flags=add_flags,
    open_data=open_data,
    class_axis=2,
    predictions=prior_predictions,
)
