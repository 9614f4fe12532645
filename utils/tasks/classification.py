"""Classification: one label for an image, scored by top-1 and top-5 accuracy."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from utils.core.arguments import at_least
from utils.core.input_spec import InputSpec
from utils.core.predictions import channel_predictions
from utils.tasks import pictures
from utils.tasks.base import Data, Task
from utils.tasks.data import evenly, image_folder, tell
from utils.tasks.images import check_channels, classification_transform, load_image
from utils.tasks.metrics import TopK


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="mobilenet_v2",
        metavar="NAME",
        help="mobilenet_v2 (default), resnet18, efficientnet_lite0, torchvision:NAME, timm:NAME, package.module:factory",
    )
    parser.add_argument(
        "--split", default="val", help="sub-folder of --data with the class folders, where there is one (default: val)"
    )
    parser.add_argument(
        "--resize",
        type=at_least(1),
        metavar="PIXELS",
        help="short side before the centre crop (default: as --image_size, or the network's)",
    )


def open_data(args: Namespace, spec: InputSpec, classes: int, extras: Mapping[str, Any]) -> Data:
    samples, names = image_folder(args.data, args.split, spec, classes, args.classes)
    samples = evenly(tell(samples), args.limit)
    return Data(samples, lambda _: TopK(), partial(draw, samples=samples, names=names, spec=spec), names)


def read_image(file: Path, spec: InputSpec) -> Tensor:
    """A picture [C, H, W] as the evaluation takes it: short side to spec.resize, centre crop."""
    check_channels(spec)
    return classification_transform(spec)(load_image(file, spec.channels))


def draw(
    folder: Path,
    networks: Mapping[str, nn.Module],
    metrics: Mapping[str, TopK],
    device: torch.device,
    samples: Dataset,
    names: Mapping[int, str],
    spec: InputSpec,
    count: int = 12,
) -> list[Path]:
    """Draw sheets of images with their class and each network's prediction; returns the PNG files.

    One sheet of images evenly spread, and one of images on which the last network predicts another class than the
    first, if there are any. metrics: by caption; they hold the predictions, so that networks and device stay idle.
    """
    predicted = [metric.predictions for metric in metrics.values()]
    scored = pictures.scored_samples(samples, len(predicted[0]))
    changed = [i for i, (first, last) in enumerate(zip(predicted[0], predicted[-1], strict=True)) if first != last]
    files = []
    for kind, positions in (("spread", range(len(scored))), ("changed", changed)):
        shown = [positions[i * len(positions) // count] for i in range(count)] if len(positions) > count else positions
        if not shown:
            continue
        sheet = []
        for position in shown:
            image, label = samples[scored[position]]
            said = {caption: names.get(metric.predictions[position], "?") for caption, metric in metrics.items()}
            lines = [f"truth: {names.get(label, '?')}", *(f"{caption}: {name}" for caption, name in said.items())]
            colours = ["darkgreen" if name == names.get(label) else "firebrick" for name in said.values()]
            picture = pictures.at_least_wide(pictures.denormalise(image, spec), 160)
            sheet.append(pictures.captioned(picture, lines, ["black", *colours], below=True))
        files.append(folder / f"{kind}.png")
        pictures.grid(sheet, columns=4).save(files[-1])
    return files


TASK = Task(
    name="classification",
    program="main_cls.py",
    summary="Data-free quantization of a classification network, evaluated on ImageNet or any folder of images.",
    add_flags=add_flags,
    open_data=open_data,
    read_image=read_image,
    class_axis=1,
    output_dims=2,
    predictions=channel_predictions,
)
