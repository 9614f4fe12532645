"""Networks, their checkpoints, and what they take as input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from modeling.checkpoint import check_finite
from modeling.classification import build_classifier
from utils.core import distributed
from utils.core.input_spec import InputSpec, natural_pixels
from utils.core.networks import input_channels


@dataclass(frozen=True)
class Network:
    """A float network in eval mode with its input, its name and where its weights are from; extras: of a saved one."""

    model: nn.Module
    spec: InputSpec
    name: str
    weights: str
    extras: Mapping[str, Any] = field(default_factory=dict)


# Name, weights and checkpoint key to the network, its input and where its weights are from; one in each task's file.
Builder = Callable[[str, str | None, str | None], tuple[nn.Module, InputSpec, str]]


def build_model(
    name: str, weights: str | None = None, build: Builder = build_classifier, checkpoint_key: str | None = None
) -> Network:
    """Build, load and check a network; every mistake is a UserError.

    name: a network of the project, 'torchvision:NAME', 'timm:NAME' or 'package.module:factory'.
    weights: path or URL; None: the official weights (a factory's own). build: of the task's file, such as
    modeling.segmentation.build_segmenter. checkpoint_key: as read_checkpoint takes it.
    A network whose images have other channels than its usual input gets ImageNet's mean and deviation for them.
    """
    with distributed.main_process_first():  # weights that are not there yet are downloaded once
        model, spec, source = build(name, weights, checkpoint_key)
    check_finite(model)
    channels = input_channels(model.eval(), spec.size, len(spec.mean))
    if channels != len(spec.mean):
        mean, std = natural_pixels(channels)
        spec = replace(spec, mean=mean, std=std)
        print(f"{name}: images of {channels} channel(s), mean {mean}, std {std}; --mean and --std change them")
    return Network(model, spec, name, source)
