"""Detection: classes and boxes of objects, scored by mean average precision; annotations from a VOC folder."""

import csv
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.networks import described
from utils.core.predictions import prior_predictions
from utils.core.torchvision_compat import torchvision
from utils.tasks import pictures
from utils.tasks.annotations import Annotation, BadAnnotation, read_annotation
from utils.tasks.base import Data, Task
from utils.tasks.boxes import BoxCoder, Coder, Objects
from utils.tasks.data import BadSample, Guarded, evenly, tell
from utils.tasks.distribution_focal import DistributionFocalCoder
from utils.tasks.heads import run_once
from utils.tasks.images import check_channels, load_image
from utils.tasks.metrics import MeanAveragePrecision
from utils.tasks.voc import CLASSES, VocSplit, open_voc

_SHOWN = 0.3  # score from which a detection is drawn

# What COCO calls those of VOC's classes that have another name there.
_COCO_NAMES = {"aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle"}
_COCO_NAMES |= {"pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"}


# Those that --save writes, by their names.
CODERS = {kind.__name__: kind for kind in (BoxCoder, DistributionFocalCoder)}


def coder_as_data(coder: Coder) -> Any:
    """The coder as plain data, which coder_from() reads; one of the user's own class as it is."""
    kind = type(coder).__name__
    return {"kind": kind, **vars(coder)} if CODERS.get(kind) is type(coder) else coder


def coder_from(content: Any) -> Coder:
    """The coder that coder_as_data() wrote; files of before there were several kinds name none."""
    if not isinstance(content, Mapping):
        return content
    values = dict(content)
    return CODERS[values.pop("kind", BoxCoder.__name__)](**values)


def count_classes(model: nn.Module, spec: InputSpec, coder: Coder) -> int:
    """How many classes a network distinguishes, the background among them where it has one.

    A network that fails on an image of its input, or does not return what its coder decodes, is a UserError.
    """
    outputs, own = run_once(model, spec), type(coder) not in CODERS.values()
    if not coder.fits(outputs):
        why = coder.misfit(outputs) if own else None
        raise UserError(f"the network returns {described(outputs)}; {coder.expects}{f': {why}' if why else ''}")
    if doubt := coder.doubt(outputs):
        print(f"warning: decode() of {type(coder).__name__} gives {doubt}")
    return coder.decode(outputs)[0].shape[2]


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
    voc: VocSplit,
    spec: InputSpec,
    outputs: int,
    skip_bad: bool = False,
    pixel_inclusive: bool = False,
    background: bool = True,
) -> tuple[Guarded, dict[str, int]]:
    """The images and objects of a split, and the network's output for each class name.

    Class names are the split's labels, otherwise VOC's 20. outputs: the network's; background: whether
    class 0 is that. skip_bad: whether annotations may be bad. pixel_inclusive: match boxes as VOC's development kit does, with the pixels of
    their far edges.
    """
    check_channels(spec)
    labels = class_labels(voc.labels or CLASSES, outputs, background)
    samples = VocDetection(voc, spec, labels, skip_bad, pixel_inclusive)
    return Guarded(samples, [str(file) for file in voc.images], [*voc.notes, *samples.notes]), labels


def class_labels(names: tuple[str, ...], outputs: int, background: bool = True) -> dict[str, int]:
    """The network's output for each class name: in order, or COCO's, by name, for a network trained on COCO.

    background: whether output 0 is the background; networks without it number COCO's 80 classes without gaps.
    """
    first = int(background)
    names = tuple(name for name in names if name.lower() not in ("background", "__background__"))
    if outputs == len(names) + first:
        return {name: label for label, name in enumerate(names, first)}
    coco = torchvision.models.detection.SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.meta["categories"]
    coco = coco if background else [name for name in coco if name not in ("__background__", "N/A")]
    labels = {name: coco.index(_COCO_NAMES.get(name, name)) for name in names if _COCO_NAMES.get(name, name) in coco}
    if outputs == len(coco) and len(labels) == len(names):
        return labels
    why = (
        "; as a network trained on COCO it does not know " + next(name for name in names if name not in labels)
        if outputs == len(coco)
        else ""
    )
    raise UserError(
        f"the network has {outputs} outputs{', background included,' if background else ''} "
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


# ---------------------------------------------------------------------------------------- the task


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="ssd_lite_mobilenet_v2",
        metavar="NAME",
        help="ssd_lite_mobilenet_v2 (default), torchvision:ssdlite320_mobilenet_v3_large, torchvision:ssd300_vgg16, "
        "yolo:NAME.yaml, package.module:factory",
    )
    parser.add_argument("--split", help="list in ImageSets/Main (default: test of VOC2007, otherwise val)")
    parser.add_argument(
        "--metric",
        choices=("voc07", "voc12"),
        help="mean average precision by 11 points of recall, or by area (default: as the data's year has it, else voc12)",
    )
    parser.add_argument(
        "--pixel_inclusive",
        action="store_true",
        help="match boxes with the pixels of their far edges (+1), as VOC's development kit does (default: without)",
    )
    parser.set_defaults(distill_images=32)


def read_image(file: Path, spec: InputSpec) -> Tensor:
    """A picture [C, H, W] as the evaluation takes it: squeezed to the network's size."""
    check_channels(spec)
    return detection_transform(load_image(file, spec.channels), spec)


def open_data(args: Namespace, spec: InputSpec, classes: int, extras: Mapping[str, Any]) -> Data:
    """extras: "coder", of the network, as coder_as_data() gives it."""
    coder = coder_from(extras["coder"])
    split = open_voc(args.data, "Main", args.split, args.classes, args.skip_bad_images)
    samples, labels = voc_detection(split, spec, classes, args.skip_bad_images, args.pixel_inclusive, coder.background)
    samples = evenly(tell(samples), args.limit)
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
    coder: Coder,
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
    read_image=read_image,
    class_axis=2,
    output_dims=None,
    predictions=prior_predictions,
)
