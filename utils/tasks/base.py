"""What the experiment must know of a task: its flags, its data, its metric, its pictures, and what is compared.

A task is one constant `TASK` in its own file. Nothing outside asks which task it is.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from utils.core.input_spec import InputSpec
from utils.core.predictions import Predictions
from utils.tasks.metrics import Metric


@dataclass(frozen=True)
class Data:
    """What a task's networks are evaluated on.

    samples: images and their targets. metric: a new accumulator, given that of the network as loaded or None.
    draw: folder, networks and their metrics by caption, device -> the files it wrote to show what they predict.
    names: of the classes, by the network's output. collate: a list of samples -> (images, targets).
    """

    samples: Dataset
    metric: Callable[[Metric | None], Metric]
    draw: Callable[[Path, Mapping[str, nn.Module], Mapping[str, Metric], torch.device], list[Path]]
    names: Mapping[int, str]
    collate: Callable = default_collate


class OpenData(Protocol):
    """How a task opens its data.

    classes: how many the network distinguishes. extras: what the task needs of the network besides, as plain data.
    """

    def __call__(self, args: Namespace, spec: InputSpec, classes: int, extras: Mapping[str, Any]) -> Data: ...


@dataclass(frozen=True)
class Task:
    """A task.

    name: as results record it. program: its script. summary: for the script's help. add_flags: gives the script's
    parser the task's own flags and defaults. read_image: a picture's file -> [C, H, W], as the evaluation brings it to
    the network's input; a ValueError where it cannot be read. class_axis: of the network's first output; output_dims: how many axes
    that has, None where it is not looked for. predictions: the class indices
    that two networks are compared by.
    """

    name: str
    program: str
    summary: str
    add_flags: Callable[[ArgumentParser], None]
    open_data: OpenData
    read_image: Callable[[Path, InputSpec], Tensor]
    class_axis: int
    output_dims: int | None
    predictions: Predictions
