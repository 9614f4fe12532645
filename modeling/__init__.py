"""Networks, their checkpoints, and what they take as input."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from modeling.checkpoint import check_finite
from modeling.classification import build_classifier
from modeling.detection import box_coder, build_detector
from modeling.segmentation import build_segmenter
from utils.core import distributed
from utils.core.input_spec import InputSpec


@dataclass(frozen=True)
class Network:
    """A float network in eval mode with its input, its name and where its weights are from; extras: of a saved one."""

    model: nn.Module
    spec: InputSpec
    name: str
    weights: str
    extras: Mapping[str, Any] = field(default_factory=dict)


__all__ = ["Network", "box_coder", "build_model"]

_BUILDERS = {"classification": build_classifier, "segmentation": build_segmenter, "detection": build_detector}


def build_model(name: str, weights: str | None = None, task: str = "classification") -> Network:
    """Build, load and check a network; every mistake is a UserError.

    name: a network of the project, 'torchvision:NAME', 'timm:NAME' or 'package.module:factory'.
    weights: path or URL; None: the official weights (a factory's own).
    """
    with distributed.main_process_first():  # weights that are not there yet are downloaded once
        model, spec, source = _BUILDERS[task](name, weights)
    check_finite(model)
    return Network(model.eval(), spec, name, source)
