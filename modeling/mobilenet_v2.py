"""MobileNetV2: torchvision's network, and the other checkpoint layout that people have."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from utils.core.errors import UserError
from utils.core.torchvision_compat import torchvision

# Width multipliers in use, the usual ones first, and what channels are rounded to multiples of.
WIDTHS = tuple((width, 8) for width in (1.0, 0.75, 0.5, 0.35, 0.25, 1.3, 1.4, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 1.2))
WIDTHS += ((0.1, 4),)
_CHANNELS = {0: 32, 1: 16, 2: 24, 4: 32, 7: 64, 11: 96, 14: 160, 17: 320}  # at width 1, of the blocks that change them

# Position of a layer inside a block of tonylins' network -> inside torchvision's.
_BLOCK = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}
_FIRST_BLOCK = {"0": "0.0", "1": "0.1", "3": "1", "4": "2"}  # the one that does not expand


def to_torchvision_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of tonylins' layout (features.2.conv.6.weight) turned into torchvision's; others pass.

    d-li14's differs from it in the last convolution, which stands beside the features (conv.0.weight). The blocks
    may stand anywhere: features.2 in a classifier, base_net.2 or extras.0 in a detector.
    """

    def rename(key: str) -> str:
        match = re.fullmatch(r"(.+)\.conv\.(\d)\.(\w+)", key)
        if match and f"{match[1]}.conv.0.weight" in tensors:
            block, layer, tensor = match.groups()
            places = _BLOCK if f"{block}.conv.6.weight" in tensors else _FIRST_BLOCK
            return f"{block}.conv.{places.get(layer, layer)}.{tensor}"
        key = re.sub(r"^conv\.([01])\.", r"features.18.\1.", key) if lacks_last else key
        return re.sub(r"^classifier\.(weight|bias)$", r"classifier.1.\1", key)

    lacks_last = "features.17.conv.6.weight" in tensors and "features.18.0.weight" not in tensors
    return {rename(key): value for key, value in tensors.items()}


def mobilenet_v2(
    tensors: Mapping[str, Tensor] | None = None, width: float = 1.0, classes: int = 1000, divisor: int = 8
) -> nn.Module:
    """torchvision's MobileNetV2; with tensors (torchvision's layout), of their width and classes.

    divisor: of which every layer's channels are a multiple.
    """
    if tensors and "classifier.1.weight" in tensors and "features.0.0.weight" in tensors:
        classes = tensors["classifier.1.weight"].shape[0]
        width, divisor = width_of(tensors)
    return torchvision.models.mobilenet_v2(num_classes=classes, width_mult=width, round_nearest=divisor)


def width_of(tensors: Mapping[str, Tensor], features: str = "features") -> tuple[float, int]:
    """The width multiplier and the divisor of channels of a checkpoint in torchvision's layout.

    features: what its layers' names start with. An unknown width is a UserError.
    """
    from torchvision.models.mobilenetv2 import _make_divisible

    last = {0: "0.0", 1: "1.conv.1"}
    found = {block: tensors.get(f"{features}.{last.get(block, f'{block}.conv.2')}.weight") for block in _CHANNELS}
    found = {block: weight.shape[0] for block, weight in found.items() if weight is not None and weight.dim()}
    for width, divisor in WIDTHS:
        if all(_make_divisible(_CHANNELS[block] * width, divisor) == channels for block, channels in found.items()):
            return width, divisor
    raise UserError(
        f"a MobileNetV2 checkpoint with {', '.join(map(str, found.values()))} channels is of no known width; "
        f"known: {', '.join(str(width) for width, _ in sorted(WIDTHS))}"
    )
