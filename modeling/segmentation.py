"""Segmentation networks by name, with their weights and what they take as input."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modeling.checkpoint import fit, input_channels, outputs_of, read_checkpoint
from modeling.deeplab import deeplab_for, to_deeplab_layout
from modeling.factory import build_from_factory, near_matches
from modeling.torchvision_models import download, official_weights
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision

NAMES = ("deeplabv3plus_mobilenet_v2",)

SPEC = InputSpec(size=(513, 513), resize=513)


class Logits(nn.Module):
    """A network of torchvision's kind, which returns a dict, that returns the logits alone."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)["out"]


def build_segmenter(name: str, weights: str | None, key: str | None = None) -> tuple[nn.Module, InputSpec, str]:
    """The network in eval mode, its input, and where its weights are from.

    It takes images [N, 3, H, W] to logits [N, classes, H, W].
    name: one of NAMES, 'torchvision:NAME' or 'package.module:factory'.
    weights: path or URL of a checkpoint; None: torchvision's official ones (a factory's own).
    key: of the state dict in it.
    """
    kind, _, rest = name.partition(":")
    if name in NAMES:
        if weights is None:
            raise UserError(
                f"{name} has no official weights; pass --weights with a checkpoint of DeepLabV3+ on MobileNetV2 (jfzhang95's layout)"
            )
        tensors = to_deeplab_layout(read_checkpoint(weights, key))
        return fit(deeplab_for(tensors), tensors, weights).eval(), SPEC, weights
    if kind == "torchvision":
        return _from_torchvision(rest, weights, key)
    if rest:
        return _as_logits(build_from_factory(name, weights, key).eval(), name), SPEC, weights or name
    raise UserError(
        f"unknown model {name!r}{near_matches(name, NAMES)}; choose from {', '.join(NAMES)}, torchvision:NAME, package.module:factory"
    )


def _from_torchvision(name: str, weights: str | None, key: str | None) -> tuple[nn.Module, InputSpec, str]:
    models = torchvision.models
    official = official_weights(name, models.segmentation, "segmentation")
    preset = official.transforms()
    side = preset.resize_size[0]
    spec = InputSpec((side, side), side, preset.interpolation.value, tuple(preset.mean), tuple(preset.std))
    options = {"weights": None, "weights_backbone": None, "aux_loss": False}
    tensors = read_checkpoint(weights, key) if weights else download(official, name)
    tensors = {
        key: value for key, value in tensors.items() if not key.startswith("aux_classifier.")
    }  # for training only
    classes = outputs_of(tensors, models.get_model(name, **options), 21)
    model = fit(models.get_model(name, num_classes=classes, **options), tensors, weights or official.url)
    return Logits(model).eval(), spec, weights or f"torchvision {official}"


def _as_logits(model: nn.Module, place: str) -> nn.Module:
    """The user's network, checked to return logits of its input's size, alone or in a dict under 'out'."""
    images = torch.zeros(1, input_channels(model), 128, 192)
    try:
        with torch.inference_mode():
            outputs = model(images)
    except Exception as error:  # the user's code may raise anything
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{place} fails on images of shape {tuple(images.shape)}: {type(error).__name__}: {reason}"
        ) from error
    if isinstance(outputs, Mapping) and "out" in outputs:
        model, outputs = Logits(model), outputs["out"]
    if not isinstance(outputs, Tensor):
        raise UserError(
            f"{place} returns {type(outputs).__name__}; a segmentation network must return a tensor [N, classes, H, W], or a dict with it under 'out'"
        )
    if outputs.dim() != 4 or outputs.shape[2:] != images.shape[2:]:
        raise UserError(
            f"{place} returns shape {tuple(outputs.shape)} for images of shape {tuple(images.shape)}; "
            "a segmentation network must return [N, classes, H, W], as large as the images"
        )
    return model
