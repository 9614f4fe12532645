"""Segmentation: a class for every pixel, scored by mean IoU; images and their masks from a VOC folder."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from utils.core.arguments import as_text
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.predictions import channel_predictions
from utils.core.torchvision_compat import torchvision
from utils.tasks import pictures
from utils.tasks.base import Data, Task
from utils.tasks.data import Guarded, evenly, tell
from utils.tasks.images import check_channels, cover, load_image
from utils.tasks.masks import MOST_CLASSES, MaskValues, check_binary, load_mask, parse_mask_values, parse_void
from utils.tasks.metrics import VOID, ConfusionMatrix, upsampled
from utils.tasks.voc import CLASSES, open_voc


class SegmentationSet(Dataset):
    """Pairs of a normalised image [channels, H, W] and its mask [H, W] uint8 of class indices and VOID."""

    def __init__(self, images: list[Path], masks: list[Path], spec: InputSpec, values: MaskValues):
        self.images, self.masks, self.spec, self.values = images, masks, spec, values

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = load_image(self.images[index], self.spec.channels)
        mask = load_mask(self.masks[index], self.values)
        if mask.size != image.size:
            raise ValueError(f"mask {str(self.masks[index])!r} is {_wide_high(mask)}, the image {_wide_high(image)}")
        mask = cover(mask, self.spec.size, torchvision.transforms.InterpolationMode.NEAREST)
        return segmentation_transform(image, self.spec), torch.from_numpy(np.array(mask))


def segmentation_transform(image: Image.Image, spec: InputSpec) -> Tensor:
    """Scale until the image covers the network's size, crop the centre, normalise."""
    functional = torchvision.transforms.functional
    image = cover(image, spec.size, torchvision.transforms.InterpolationMode(spec.interpolation))
    return functional.normalize(functional.to_tensor(image), spec.mean, spec.std)


def voc_segmentation(
    root: str,
    split: str | None,
    spec: InputSpec,
    outputs: int,
    values: MaskValues | None = None,
    classes: str | None = None,
    skip_bad: bool = False,
) -> tuple[Guarded, tuple[str, ...]]:
    """Images and masks of a VOC folder, and the names of its classes, for a network with this many outputs.

    split: None: VOC2007's test, otherwise val. Classes are those of the file `classes`, of labels.txt, or VOC's 21.
    values: what the masks hold; None: class indices, and 255 for void, which masks of 0 and 255 alone contradict
    where the network has two classes. skip_bad: whether images and masks may be missing.
    """
    check_channels(spec)
    _check_count(outputs)
    voc = open_voc(root, "Segmentation", split, classes, skip_bad)
    names = voc.labels or ("background", *CLASSES)
    if voc.labels and len(names) + 1 == outputs:  # the lists of detection leave it out
        names = ("background", *names)
    if len(names) != outputs:
        whose = (
            f"{classes!r} for"
            if classes
            else "labels.txt of"
            if voc.labels
            else "VOC's classes, since there is no labels.txt in"
        )
        raise UserError(
            f"the network has {outputs} classes, but there are {len(names)} ({whose} {str(voc.folder)!r}); "
            "pass data of the network's own classes, or --classes FILE with their names in order"
        )
    masks = voc.annotations("SegmentationClass", ".png", skip_bad)
    if values is None and outputs == 2:
        check_binary(masks, str(voc.folder))
    samples = SegmentationSet(voc.images, masks, spec, values or MaskValues(outputs))
    return Guarded(samples, [str(path) for path in voc.images], voc.notes), names


def _check_count(outputs: int) -> None:
    if outputs == 1:
        raise UserError(
            "the network has 1 class(es) a pixel, one score for object or not; let it return a score for the background "
            "too: torch.cat([-logits, logits], 1), or torch.cat([1 - p, p], 1) after a sigmoid"
        )
    if not 2 <= outputs <= MOST_CLASSES:
        raise UserError(
            f"the network has {outputs} class(es) a pixel; a segmentation network must have 2 to {MOST_CLASSES}, one score each"
        )


def _wide_high(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


# ---------------------------------------------------------------------------------------- the task


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="deeplabv3plus_mobilenet_v2",
        metavar="NAME",
        help="deeplabv3plus_mobilenet_v2 (default), torchvision:NAME, smp:ARCH/ENCODER, package.module:factory",
    )
    parser.add_argument("--split", help="list in ImageSets/Segmentation (default: test of VOC2007, otherwise val)")
    parser.add_argument(
        "--mask_values",
        type=as_text(parse_mask_values),
        metavar="VALUE=CLASS,...",
        help="class (or void) of each value in the masks, as 0=0,255=1 (default: values are classes)",
    )
    parser.add_argument(
        "--void",
        type=as_text(parse_void),
        metavar="N|none",
        help=f"value of pixels that do not count, or none (default: {VOID}, unless --mask_values names it)",
    )
    parser.set_defaults(batch_size=4, distill_images=8, distill_batch=8)


def read_image(file: Path, spec: InputSpec) -> Tensor:
    """A picture [C, H, W] as the evaluation takes it: scaled to cover the network's size, its centre cropped."""
    check_channels(spec)
    return segmentation_transform(load_image(file, spec.channels), spec)


def open_data(args: Namespace, spec: InputSpec, classes: int, extras: Mapping[str, Any]) -> Data:
    values = None
    if args.mask_values or args.void is not None:
        mapping = parse_mask_values(args.mask_values) if args.mask_values else None
        values = MaskValues(classes, mapping, VOID if args.void is None else parse_void(args.void))
    skip_bad = args.skip_bad_images
    samples, names = voc_segmentation(args.data, args.split, spec, classes, values, args.classes, skip_bad)
    samples = evenly(tell(samples), args.limit)
    return Data(
        samples, lambda _: ConfusionMatrix(names), partial(draw, samples=samples, spec=spec), dict(enumerate(names))
    )


def draw(
    folder: Path,
    networks: Mapping[str, nn.Module],
    metrics: Mapping[str, ConfusionMatrix],
    device: torch.device,
    samples: Dataset,
    spec: InputSpec,
    count: int = 4,
) -> list[Path]:
    """Draw image, truth and each network's prediction side by side; returns the PNG files.

    Drawn are the first images, and those where the last network scores worst against the first one
    (with one network: where it scores worst). networks, metrics: by caption, as they were evaluated
    on samples.
    """
    scores = torch.tensor([metrics[name].per_image for name in networks]).nan_to_num()
    harm = scores[-1] - scores[0] if len(scores) > 1 else scores[0]
    scored = pictures.scored_samples(samples, len(harm))
    chosen = {"first": range(min(count, len(harm))), "worst": harm.argsort(stable=True)[:count].tolist()}

    files = []
    for kind, positions in chosen.items():
        for rank, position in enumerate(positions, start=1):
            image, mask = samples[scored[position]]
            panels = {"image": pictures.denormalise(image, spec), "truth": pictures.paint_classes(mask)}
            for name, model, score in zip(networks, networks.values(), scores[:, position], strict=True):
                with torch.inference_mode():
                    prediction = upsampled(model(image[None].to(device)), mask.shape).argmax(1)[0]
                panels[f"{name}: mIoU {score:.1f}"] = pictures.paint_classes(prediction)
            files.append(folder / f"{kind}_{rank}_{pictures.sample_name(samples, scored[position])}.png")
            sheet = [pictures.captioned(panel, [caption]) for caption, panel in panels.items()]
            pictures.grid(sheet, columns=len(sheet)).save(files[-1])
    return files


TASK = Task(
    name="segmentation",
    program="main_seg.py",
    summary="Data-free quantization of a segmentation network, evaluated on VOC segmentation or any folder in its format.",
    add_flags=add_flags,
    open_data=open_data,
    read_image=read_image,
    class_axis=1,
    output_dims=4,
    predictions=channel_predictions,
)
