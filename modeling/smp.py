"""Networks of segmentation_models_pytorch, by architecture and encoder."""

from types import ModuleType

from torch import nn

from modeling.checkpoint import count_outputs, fit, read_checkpoint
from modeling.factory import near_matches
from utils.core.errors import UserError, message_of
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision  # noqa: F401 (before the library, which imports it plainly)

SPEC = InputSpec(size=(512, 512), resize=512)  # its architectures take multiples of 32; encoders, ImageNet's colours


def build_smp(name: str, weights: str | None, key: str | None = None) -> nn.Module:
    """The network of 'ARCH/ENCODER' with a checkpoint's classes and weights.

    Classes are those of the checkpoint's segmentation head. A name that the library does not know, no weights, and a
    library that is not there are UserErrors.
    """
    arch, _, encoder = name.partition("/")
    if weights is None:
        raise UserError(
            f"smp:{name} has no weights of its own; pass --weights with a state dict of that network, or --model package.module:factory"
        )
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise UserError(
            f"--model smp:{name} needs segmentation_models_pytorch ({error}); pip install --no-deps segmentation-models-pytorch"
        ) from None
    _check_names(smp, arch, encoder)
    tensors = read_checkpoint(weights, key)
    try:
        classes = count_outputs(tensors, smp.create_model(arch, encoder, encoder_weights=None), 1)
        model = smp.create_model(arch, encoder, encoder_weights=None, classes=classes)
    except Exception as error:  # pairs that do not go together: the library raises many kinds
        reason = message_of(error, type(error).__name__)
        raise UserError(
            f"segmentation_models_pytorch builds no {arch} on {encoder!r}: {reason}; check --model"
        ) from None
    return fit(model, tensors, weights)


def _check_names(smp: ModuleType, arch: str, encoder: str) -> None:
    known = tuple(smp.MODEL_ARCHITECTURES_MAPPING)
    if arch.lower() not in known:
        raise UserError(
            f"unknown architecture {arch!r}{near_matches(arch, known)}; write smp:ARCH/ENCODER with one of {', '.join(known)}"
        )
    encoders = smp.encoders.get_encoder_names()
    if encoder not in encoders and not encoder.startswith("tu-"):
        raise UserError(
            f"unknown encoder {encoder!r}{near_matches(encoder, encoders)}; write smp:{arch}/ENCODER, as smp:{arch}/resnet18, "
            "or smp:ARCH/tu-NAME for timm's"
        )
