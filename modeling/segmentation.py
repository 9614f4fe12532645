"""Segmentation networks by name, with their weights and what they take as input."""

from torch import Tensor, nn

from modeling.checkpoint import count_outputs, fit, read_checkpoint
from modeling.deeplab import deeplab_for, to_deeplab_layout
from modeling.factory import build_from_factory, near_matches
from modeling.smp import SPEC as SMP_SPEC
from modeling.smp import build_smp
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

    It takes images [N, 3, H, W] to logits [N, classes, H, W]; a user's own network to maps that may be smaller.
    name: one of NAMES, 'torchvision:NAME', 'smp:ARCH/ENCODER' or 'package.module:factory'.
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
    if kind == "smp":
        return build_smp(rest, weights, key).eval(), SMP_SPEC, weights
    if rest:
        return build_from_factory(name, weights, key), SPEC, weights or name
    raise UserError(
        f"unknown model {name!r}{near_matches(name, NAMES)}; choose from {', '.join(NAMES)}, torchvision:NAME, smp:ARCH/ENCODER, package.module:factory"
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
    classes = count_outputs(tensors, models.get_model(name, **options), 21)
    model = fit(models.get_model(name, num_classes=classes, **options), tensors, weights or official.url)
    return Logits(model).eval(), spec, weights or f"torchvision {official}"
