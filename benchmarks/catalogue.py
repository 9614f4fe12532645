"""The networks of other libraries that benchmarks.coverage tries, and how each is built.

Weights are random. BatchNorm parameters are random too and its statistics are those of random images, as
training would have left them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from modeling.yolo import RawYolo
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision

PER_FILE = 16  # variants of one of timm's module files, from the smallest to the middle one
SIDES = (64, 96, 128, 160, 192, 224, 256, 299, 320, 384)  # the smallest that a network takes is used

TORCHVISION_SKIPPED = {"vit_h_14", "vit_l_16", "vit_l_32", "regnet_y_128gf", "regnet_x_32gf", "regnet_y_32gf"}
SINGLE_SHOT = (
    *("ssdlite320_mobilenet_v3_large", "ssd300_vgg16"),
    *("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"),
)
SMP_ENCODERS = (
    *("resnet18", "resnext50_32x4d", "se_resnet50", "dpn68", "vgg11_bn", "densenet121"),
    *("efficientnet-b0", "mobilenet_v2", "mobileone_s0", "mit_b0"),
)
SMP_VIT_ENCODERS = ("tu-vit_tiny_patch16_224", "tu-deit_small_patch16_224", "tu-vit_small_patch16_224")  # for DPT
YOLO = (
    *("yolov3-tiny", "yolov3", "yolov3-spp", "yolov5n", "yolov5n-p6", "yolov6n"),
    *("yolov8n", "yolov8s", "yolov8n-p2", "yolov8n-p6", "yolov8n-ghost", "yolov8n-ghost-p2"),
    *("yolov8n-seg", "yolov8n-pose", "yolov8n-obb", "yolov8n-cls", "yolov9t", "yolov9s", "yolov9c"),
    *("yolov10n", "yolov10s", "yolo11n", "yolo11s", "yolo11n-seg", "yolo11n-pose", "yolo11n-obb"),
    *("yolo11n-cls", "yolo12n", "yolo12n-seg", "yolo12n-cls", "yolo26n", "yolo26n-seg"),
    *("yolo26n-pose", "yolo26n-obb", "yolo26n-cls", "yolo26n-sem"),
)

# One small network of a family, in turn, so that the first N are of every kind; the quick ones first.
SAMPLE = (
    *("torchvision:mobilenet_v2", "timm:mobilenetv3_small_050", "torchvision:resnet18", "timm:test_byobnet"),
    *("segmentation_models_pytorch:linknet/resnet18", "ultralytics:yolov8n", "timm:regnetx_002"),
    *("torchvision:squeezenet1_1", "timm:dla46_c", "segmentation_models_pytorch:deeplabv3plus/resnet18"),
    *("torchvision:mnasnet0_5", "timm:efficientnet_lite0", "torchvision:lraspp_mobilenet_v3_large"),
    *("timm:test_resnet", "segmentation_models_pytorch:unet/resnet18", "torchvision:shufflenet_v2_x0_5"),
    *("timm:test_convnext", "torchvision:alexnet", "timm:tinynet_e"),
    *("torchvision:ssdlite320_mobilenet_v3_large", "segmentation_models_pytorch:fpn/resnet18"),
    *("timm:cspnext_tiny", "ultralytics:yolo11n", "torchvision:mobilenet_v3_small", "timm:repvit_m0_9"),
    *("segmentation_models_pytorch:pspnet/resnet18", "timm:ghostnet_050", "timm:levit_128s"),
    *(
        "timm:resnetv2_18",
        "timm:ese_vovnet19b_slim_dw",
        "segmentation_models_pytorch:unet/mobilenet_v2",
        "ultralytics:yolov5n",
    ),
    *("timm:xception41p", "segmentation_models_pytorch:fpn/mobilenet_v2", "timm:lcnetv2_small", "ultralytics:yolov10n"),
    *("timm:edgenext_xx_small", "segmentation_models_pytorch:pan/mobilenet_v2", "timm:legacy_seresnet18"),
    *("timm:efficientvim_m1", "segmentation_models_pytorch:unetplusplus/mobilenet_v2", "ultralytics:yolo12n"),
    *("timm:densenet121", "segmentation_models_pytorch:deeplabv3plus/mobilenet_v2", "timm:cpubone_nano"),
    *("timm:inception_next_atto", "segmentation_models_pytorch:pspnet/mobilenet_v2", "ultralytics:yolov9t"),
    *(
        "timm:mobilevit_xxs",
        "segmentation_models_pytorch:unet/mit_b0",
        "timm:legacy_xception",
        "ultralytics:yolov3-tiny",
    ),
    *("segmentation_models_pytorch:segformer/mobilenet_v2", "ultralytics:yolo26n", "timm:lowformer_b0"),
    *("segmentation_models_pytorch:upernet/mobilenet_v2", "segmentation_models_pytorch:manet/efficientnet-b0"),
    *("segmentation_models_pytorch:deeplabv3/mobilenet_v2", "timm:test_mambaout", "timm:nf_regnet_b1"),
    *("torchvision:vgg11_bn", "timm:starnet_s1", "timm:test_vit", "timm:test_nfnet"),
    *("torchvision:deeplabv3_mobilenet_v3_large", "torchvision:regnet_y_400mf", "torchvision:googlenet"),
    *("torchvision:efficientnet_b0", "torchvision:ssd300_vgg16", "timm:rexnet_100"),
    *("segmentation_models_pytorch:deeplabv3/resnet18", "torchvision:regnet_x_400mf"),
    *("timm:cs3darknet_focus_s", "torchvision:fcn_resnet50", "torchvision:resnext50_32x4d", "timm:fastvit_t8"),
    *("segmentation_models_pytorch:unetplusplus/resnet18", "torchvision:inception_v3", "timm:efficientvit_m0"),
    *("timm:fasternet_t0", "timm:mobilevitv2_050", "segmentation_models_pytorch:segformer/resnet18"),
    *("timm:hgnetv2_b0", "timm:efficientvit_b0", "segmentation_models_pytorch:pan/resnet18"),
    *("timm:repghostnet_050", "timm:hardcorenas_a", "segmentation_models_pytorch:manet/resnet18"),
    *("timm:mobileone_s1", "timm:res2net50_48w_2s", "segmentation_models_pytorch:upernet/resnet18"),
    *("timm:hrnet_w18_small", "timm:selecsls42", "timm:vovnet39a", "torchvision:densenet121"),
    *("timm:efficientformer_l1", "timm:xception41", "timm:dpn48b", "timm:skresnet18"),
    *("torchvision:convnext_tiny", "timm:efficientformerv2_s0", "timm:convmixer_768_32"),
    *("torchvision:wide_resnet50_2", "timm:botnet26t_256", "timm:inception_v4"),
    *("torchvision:efficientnet_v2_s", "timm:halonet_h1", "timm:iformer_t", "torchvision:vit_b_16"),
    *("torchvision:swin_t", "torchvision:maxvit_t", "timm:deit_tiny_patch16_224", "timm:convit_tiny"),
    *("timm:cait_xxs24_224", "timm:coat_tiny", "timm:crossvit_tiny_240"),
    *("segmentation_models_pytorch:dpt/tu-vit_tiny_patch16_224", "torchvision:retinanet_resnet50_fpn"),
)


@dataclass(frozen=True)
class Entry:
    """A network of a library. group: the library's part, or timm's module file. sides: of its input, tried in order."""

    library: str
    group: str
    name: str
    sides: tuple[int, ...] = SIDES

    @property
    def key(self) -> str:
        return f"{self.library}:{self.name}"


def build(entry: Entry) -> nn.Module:
    """The network in eval mode, with random weights."""
    torch.manual_seed(0)
    return _BUILDERS[entry.library](entry).eval()


def settled(model: nn.Module, spec: InputSpec, images: int = 8) -> nn.Module:
    """The network with BatchNorm parameters and statistics as training could have left them."""
    generator = torch.Generator().manual_seed(1)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for norm in norms:
        norm.momentum = None  # a plain average
        norm.reset_running_stats()
        if norm.affine:
            norm.weight.data.uniform_(0.5, 1.5, generator=generator)
            norm.bias.data.normal_(0, 0.3, generator=generator)
        norm.train()
    if norms:
        model(spec.probe(images, seed=7))
    for norm in norms:
        norm.running_var.clamp_min_(1e-3)  # a layer that random weights silence
    return model.eval()


class Tensors(nn.Module):
    """A network that returns something else than a tensor, so that it returns its tensors as a tuple."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for value in tree_leaves(self.network(images)) if isinstance(value, Tensor))


def as_tensors(model: nn.Module, spec: InputSpec) -> nn.Module:
    return model if isinstance(model(spec.probe(2)), Tensor) else Tensors(model)


def fitting_spec(model: nn.Module, entry: Entry) -> InputSpec:
    """The smallest input that the network takes; what it says of the last one where it takes none."""
    failed: Exception | None = None
    for side in entry.sides:
        spec = InputSpec(size=(side, side), resize=side)
        try:
            model(spec.probe(2))
        except Exception as error:  # the library's code may raise anything
            failed = error
        else:
            return spec
    raise ValueError(f"takes no input of {', '.join(map(str, entry.sides))} pixels: {failed}") from failed


def entries(timm_sizes: Callable[[str], dict[str, int]]) -> Iterator[Entry]:
    """All of them, libraries and module files in turn, so that the first N are of every kind.

    timm_sizes: the networks of a module file and their parameters.
    """
    groups = [*_torchvision(), *_timm(timm_sizes), *_smp(), [Entry("ultralytics", "yolo", name) for name in YOLO]]
    for turn in zip_longest(*groups):
        yield from (entry for entry in turn if entry is not None)


def sample() -> Iterator[Entry]:
    """The networks of SAMPLE, without those of libraries that are not installed."""
    groups = [*_torchvision(), *_smp(), [Entry("ultralytics", "yolo", name) for name in YOLO]]
    known = {entry.key: entry for group in groups for entry in group}
    for key in SAMPLE:
        library, _, name = key.partition(":")
        if library not in missing():
            yield known[key] if library != "timm" else Entry(library, _timm_module(name), name, _timm_sides(name))


def _timm_module(name: str) -> str:
    from timm.models import model_entrypoint

    return model_entrypoint(name).__module__.rpartition(".")[2]


def size() -> int:
    """How many networks the catalogue has at most, as far as the libraries are installed."""
    groups = [*_torchvision(), *_timm(_timm_names), *_smp()]
    return sum(map(len, groups)) + len(YOLO) * ("ultralytics" not in missing())


def _timm_names(module: str) -> dict[str, int]:
    import timm

    return dict.fromkeys(timm.list_models(module=module), 0)


def missing() -> list[str]:
    """The libraries that are not installed."""
    return [name for name in ("timm", "segmentation_models_pytorch", "ultralytics") if find_spec(name) is None]


# ------------------------------------------------------------------------------------- torchvision


def _torchvision() -> Iterator[list[Entry]]:
    models = torchvision.models
    names = [name for name in models.list_models(module=models) if name not in TORCHVISION_SKIPPED]
    yield [Entry("torchvision", "classification", name) for name in names]
    yield [Entry("torchvision", "segmentation", name) for name in models.list_models(module=models.segmentation)]
    yield [Entry("torchvision", "single-shot detection", name) for name in SINGLE_SHOT]


class RawHeads(nn.Module):
    """A single-shot detector of torchvision's up to its heads, which follow as a dict of [N, P, ...]."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = list(self.backbone(images).values())
        return self.head(maps)


def _build_torchvision(entry: Entry) -> nn.Module:
    options: dict[str, object] = {"weights": None}
    if entry.group != "classification":
        options["weights_backbone"] = None
    if entry.name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": False}
    model = torchvision.models.get_model(entry.name, **options)
    return RawHeads(model) if entry.group == "single-shot detection" else model


# -------------------------------------------------------------------------------------------- timm


def timm_sizes(module: str) -> dict[str, int]:
    """The networks of one of timm's module files and their parameters; no memory is taken for these."""
    import timm

    sizes = {}
    for name in timm.list_models(module=module):
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except Exception:  # it needs a package that is not there, or computes with its weights when it is made
            continue
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    return sizes


def _timm(sizes_of: Callable[[str], dict[str, int]]) -> Iterator[list[Entry]]:
    if find_spec("timm") is None:
        return
    import timm

    for module in timm.list_modules():
        sizes = sizes_of(module)
        by_size = sorted(sizes, key=lambda name: (_fixed_side(name) > 256, sizes[name]))
        for_all = by_size[: max(PER_FILE, (len(by_size) + 1) // 2)]
        step = max(len(for_all) / PER_FILE, 1)
        chosen = [for_all[int(i * step)] for i in range(min(PER_FILE, len(for_all)))]
        yield [Entry("timm", module, name, _timm_sides(name)) for name in chosen]


def _timm_sides(name: str) -> tuple[int, ...]:
    fixed = _fixed_side(name)
    return (fixed,) if fixed else SIDES


def _fixed_side(name: str) -> int:
    """The side of the only input that the network takes, or 0."""
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return config.input_size[-1] if config is not None and config.fixed_input_size else 0


def _build_timm(entry: Entry) -> nn.Module:
    import timm

    return timm.create_model(entry.name, pretrained=False)


# --------------------------------------------------------------------- segmentation_models_pytorch


def _smp() -> Iterator[list[Entry]]:
    if find_spec("segmentation_models_pytorch") is None:
        return
    import segmentation_models_pytorch as smp

    for architecture in smp.MODEL_ARCHITECTURES_MAPPING:
        encoders: Iterable[str] = SMP_VIT_ENCODERS if architecture == "dpt" else SMP_ENCODERS
        sides = (224,) if architecture == "dpt" else SIDES
        yield [
            Entry("segmentation_models_pytorch", architecture, f"{architecture}/{encoder}", sides)
            for encoder in encoders
        ]


def _build_smp(entry: Entry) -> nn.Module:
    import segmentation_models_pytorch as smp

    architecture, encoder = entry.name.split("/")
    return smp.create_model(architecture, encoder, encoder_weights=None, classes=5)


# ------------------------------------------------------------------------------------- ultralytics


class AnyHead(RawYolo):
    """A YOLO with a head of any kind, up to its raw outputs: everything that is decoded stays outside the quantized network."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        head = self.model[-1]
        branch = head.one2one if self.end2end else head.one2many
        raw = head.forward_head(self.features(images), **branch)
        return {name: value for name, value in raw.items() if isinstance(value, Tensor)}


def _build_yolo(entry: Entry) -> nn.Module:
    from ultralytics.nn import tasks

    name = entry.name
    kinds = {"cls": "ClassificationModel", "seg": "SegmentationModel", "pose": "PoseModel", "obb": "OBBModel"}
    kind = name.rpartition("-")[2]
    if kind == "sem":
        kinds["sem"] = "SemanticSegmentationModel" if hasattr(tasks, "SemanticSegmentationModel") else "DetectionModel"
    model = getattr(tasks, kinds.get(kind, "DetectionModel"))(f"{name}.yaml", verbose=False)
    return model if kind in ("cls", "sem") else AnyHead(model.model)


_BUILDERS = {
    "torchvision": _build_torchvision,
    "timm": _build_timm,
    "segmentation_models_pytorch": _build_smp,
    "ultralytics": _build_yolo,
}
