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

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.predictions import channel_predictions
from utils.core.torchvision_compat import torchvision
from utils.tasks import pictures
from utils.tasks.base import Data, Task
from utils.tasks.data import Guarded, evenly, load_rgb
from utils.tasks.metrics import VOID, ConfusionMatrix
from utils.tasks.voc import CLASSES, open_voc


class SegmentationSet(Dataset):
    """Pairs of a normalised image [3, H, W] and its mask [H, W] uint8 of class indices and VOID."""

    def __init__(self, images: list[Path], masks: list[Path], spec: InputSpec, classes: int):
        self.images, self.masks, self.spec, self.classes = images, masks, spec, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = load_rgb(str(self.images[index]))
        mask = load_mask(self.masks[index], self.classes)
        if mask.size != image.size:
            raise ValueError(f"mask {str(self.masks[index])!r} is {_wide_high(mask)}, the image {_wide_high(image)}")
        to_size, functional = self.spec.size, torchvision.transforms.functional
        image = cover(image, to_size, torchvision.transforms.InterpolationMode(self.spec.interpolation))
        mask = cover(mask, to_size, torchvision.transforms.InterpolationMode.NEAREST)
        image = functional.normalize(functional.to_tensor(image), self.spec.mean, self.spec.std)
        return image, torch.from_numpy(np.array(mask))


def voc_segmentation(root: str, split: str | None, spec: InputSpec, outputs: int) -> tuple[Guarded, tuple[str, ...]]:
    """Images and masks of a VOC folder, and the names of its classes, for a network with this many outputs.

    split: None: VOC2007's test, otherwise val. Classes are those of labels.txt, or VOC's 21.
    """
    voc = open_voc(root, "Segmentation", split)
    names = voc.labels or ("background", *CLASSES)
    if voc.labels and len(names) + 1 == outputs:  # the lists of detection leave it out
        names = ("background", *names)
    if len(names) != outputs:
        whose = "labels.txt of" if voc.labels else "VOC's classes, since there is no labels.txt in"
        raise UserError(
            f"the network has {outputs} classes, but there are {len(names)} ({whose} {str(voc.folder)!r}); pass data of the network's own classes"
        )
    masks = voc.annotations("SegmentationClass", ".png")
    return Guarded(SegmentationSet(voc.images, masks, spec, outputs), [str(path) for path in voc.images]), names


def load_mask(path: Path, classes: int) -> Image.Image:
    """The class indices of a palette or greyscale PNG, as an 8-bit greyscale image.

    A file that is no such mask, or has an index that is neither a class nor VOID, is a ValueError.
    """
    try:
        with Image.open(path) as image:
            mode, indices = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"mask {str(path)!r}: {error}") from None
    if indices.ndim != 2:
        raise ValueError(
            f"mask {str(path)!r} is a colour picture ({mode}); a mask holds one class index for each pixel, in a palette or greyscale PNG"
        )
    wrong = indices[(indices >= classes) & (indices != VOID)]
    if wrong.size:
        raise ValueError(
            f"mask {str(path)!r} holds the label {wrong[0]}; the network has {classes} classes, 0 to {classes - 1}, and {VOID} is void"
        )
    return Image.fromarray(indices.astype(np.uint8))


def cover(
    image: Image.Image, size: tuple[int, int], interpolation: "torchvision.transforms.InterpolationMode"
) -> Image.Image:
    """Scale the image until it just covers size (height, width), then crop its centre.

    To a square this scales the short side to it. An image of that size stays as it is.
    """
    height, width = size
    if image.height * width <= image.width * height:
        scaled = [height, image.width * height // image.height]
    else:
        scaled = [image.height * width // image.width, width]
    functional = torchvision.transforms.functional
    return functional.center_crop(functional.resize(image, scaled, interpolation), list(size))


def _wide_high(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


# ---------------------------------------------------------------------------------------- the task


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="deeplabv3plus_mobilenet_v2",
        metavar="NAME",
        help="deeplabv3plus_mobilenet_v2 (default), torchvision:NAME, package.module:factory",
    )
    parser.add_argument("--split", help="list in ImageSets/Segmentation (default: test of VOC2007, otherwise val)")
    parser.set_defaults(batch_size=4, distill_images=8, distill_batch=8)


def open_data(args: Namespace, spec: InputSpec, classes: int, extras: Mapping[str, Any]) -> Data:
    samples, names = voc_segmentation(args.data, args.split, spec, classes)
    samples = evenly(samples, args.limit)
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
                    prediction = channel_predictions(model(image[None].to(device)))[0]
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
    class_axis=1,
    predictions=channel_predictions,
)
