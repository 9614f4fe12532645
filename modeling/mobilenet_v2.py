"""MobileNetV2: torchvision's network, and the other checkpoint layout that people have."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from utils.core.errors import UserError
from utils.core.torchvision_compat import torchvision

WIDTHS = (1.0, 0.75, 0.5, 0.35, 0.25, 1.3, 1.4)  # width multipliers in use, the usual one first

# Position of a layer inside a block of tonylins' network -> inside torchvision's.
_BLOCK = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}
_FIRST_BLOCK = {"0": "0.0", "1": "0.1", "3": "1", "4": "2"}  # the one that does not expand


def to_torchvision_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of tonylins' layout (features.2.conv.6.weight) turned into torchvision's; others pass.

    The blocks may stand anywhere: features.2 in a classifier, base_net.2 or extras.0 in a detector.
    """

    def rename(key: str) -> str:
        match = re.fullmatch(r"(.+)\.conv\.(\d)\.(\w+)", key)
        if match and f"{match[1]}.conv.0.weight" in tensors:
            block, layer, tensor = match.groups()
            places = _BLOCK if f"{block}.conv.6.weight" in tensors else _FIRST_BLOCK
            return f"{block}.conv.{places.get(layer, layer)}.{tensor}"
        return re.sub(r"^classifier\.(weight|bias)$", r"classifier.1.\1", key)

    return {rename(key): value for key, value in tensors.items()}


def mobilenet_v2(tensors: Mapping[str, Tensor] | None = None, width: float = 1.0, classes: int = 1000) -> nn.Module:
    """torchvision's MobileNetV2; with tensors (torchvision's layout), of their width and classes."""
    if tensors and "classifier.1.weight" in tensors and "features.0.0.weight" in tensors:
        classes = tensors["classifier.1.weight"].shape[0]
        width = width_of(tensors)
    return torchvision.models.mobilenet_v2(num_classes=classes, width_mult=width)


def width_of(tensors: Mapping[str, Tensor], features: str = "features") -> float:
    """The width multiplier of a checkpoint in torchvision's layout; features: what its layers' names start with."""
    from torchvision.models.mobilenetv2 import _make_divisible

    first, last = tensors[f"{features}.0.0.weight"].shape[0], tensors.get(f"{features}.17.conv.2.weight")
    for width in WIDTHS:
        fits = _make_divisible(32 * width, 8) == first
        if fits and (last is None or _make_divisible(320 * width, 8) == last.shape[0]):
            return width
    raise UserError(f"a MobileNetV2 checkpoint with {first} first channels is of no known width; known: {WIDTHS}")
