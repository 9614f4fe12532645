"""Detection networks by name, with their weights and what they take as input."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modeling.checkpoint import fit, read_checkpoint
from modeling.factory import build_from_factory, near_matches
from modeling.mobilenet_v2 import to_torchvision_layout
from modeling.ssd_lite import SPEC, WEIGHTS, ssd_coder, ssd_lite
from modeling.torchvision_models import download, official_weights
from modeling.yolo import SPEC as YOLO_SPEC
from modeling.yolo import build_yolo, raw_yolo
from utils.core.errors import UserError, message_of
from utils.core.input_spec import InputSpec
from utils.core.networks import input_channels
from utils.core.torchvision_compat import torchvision
from utils.tasks.boxes import BoxCoder, Coder, PriorSpec, box_convert

NAMES = ("ssd_lite_mobilenet_v2",)
TORCHVISION_NAMES = ("ssdlite320_mobilenet_v3_large", "ssd300_vgg16")


class RawHeads(nn.Module):
    """One of torchvision's single-shot detectors up to its heads: logits [N, P, classes], offsets [N, P, 4].

    Its own preprocessing is the InputSpec, its anchors and choice of detections are coder().
    """

    def __init__(self, ssd: nn.Module):
        super().__init__()
        self.backbone, self.head = ssd.backbone, ssd.head
        self.anchors = ssd.anchor_generator
        self.choice = {
            "score_thresh": ssd.score_thresh,
            "nms_thresh": ssd.nms_thresh,
            "topk_candidates": ssd.topk_candidates,
            "detections_per_img": ssd.detections_per_img,
        }

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.head(list(self.backbone(images).values()))
        return heads["cls_logits"], heads["bbox_regression"]

    def coder(self, size: tuple[int, int]) -> BoxCoder:
        """The priors for images of that height and width, and how torchvision chooses detections."""
        images = torch.zeros(1, input_channels(self.backbone, size), *size)
        with torch.inference_mode():
            maps = list(self.backbone(images).values())
            corners = self.anchors(torchvision.models.detection.image_list.ImageList(images, [size]), maps)[0]
        height, width = size
        priors = box_convert(corners / torch.tensor([width, height, width, height]), "xyxy", "cxcywh")
        return BoxCoder(priors, clip=True, **self.choice)


def build_detector(name: str, weights: str | None, key: str | None = None) -> tuple[nn.Module, InputSpec, str]:
    """The network in eval mode, its input, and where its weights are from.

    It takes images [N, 3, H, W] to raw heads, of which box_coder() makes boxes: logits [N, priors, classes], class 0 the
    background, and offsets [N, priors, 4]; of ultralytics' networks a map for each stride.
    name: one of NAMES, 'torchvision:NAME', 'yolo:NAME.yaml' or 'package.module:factory'.
    weights: path or URL of a checkpoint; None: the official ones (a factory's own). key: of the state dict in it.
    """
    kind, _, rest = name.partition(":")
    if name in NAMES:
        source = weights or WEIGHTS
        tensors = to_torchvision_layout(read_checkpoint(source, key))
        return fit(ssd_lite(tensors), tensors, source).eval(), SPEC, source
    if kind == "torchvision":
        return _from_torchvision(rest, weights, key)
    if kind == "yolo":
        return build_yolo(rest, weights, key).eval(), YOLO_SPEC, weights
    if rest:
        model = build_from_factory(name, weights, key).eval()
        yolo = raw_yolo(model)
        return (yolo.eval(), YOLO_SPEC, weights or name) if yolo else (model, SPEC, weights or name)
    choices = (
        *NAMES,
        *(f"torchvision:{known}" for known in TORCHVISION_NAMES),
        "yolo:NAME.yaml",
        "package.module:factory",
    )
    raise UserError(f"unknown model {name!r}{near_matches(name, NAMES)}; choose from {', '.join(choices)}")


def box_coder(model: nn.Module, spec: InputSpec) -> Coder:
    """How a network's heads become boxes: its coder(size), or SSD-Lite's, which is said, for a user's own network without one.

    A coder that fails, or is or gives something else than a Coder, is a UserError.
    """
    if not hasattr(model, "coder"):
        coder = ssd_coder(PriorSpec(), spec.size)
        print(
            f"{type(model).__name__} has no coder(size), so its outputs are taken for SSD-Lite's: "
            f"{len(coder.priors)} priors, variances {coder.centre_variance} and {coder.size_variance}, class 0 the "
            "background; docs/libraries.md shows how to say otherwise (Your own detector)"
        )
        return coder
    asked = f"coder({spec.size}) of {type(model).__name__}"
    if not callable(model.coder):
        raise UserError(
            f"coder of {type(model).__name__} is a {type(model.coder).__name__}; make it a method that returns a Coder for that size"
        )
    try:
        coder = model.coder(spec.size)
    except UserError:
        raise
    except Exception as error:  # the user's method may raise anything
        raise UserError(
            f"{asked} (height, width) fails: {type(error).__name__}: {message_of(error)}; check it, and --image_size"
        ) from error
    if not isinstance(coder, Coder):
        raise UserError(
            f"{asked} returns a {type(coder).__name__}; it must return a Coder, as docs/libraries.md shows (Your own detector)"
        )
    return coder


def _from_torchvision(name: str, weights: str | None, key: str | None) -> tuple[nn.Module, InputSpec, str]:
    detection = torchvision.models.detection
    if name not in TORCHVISION_NAMES:
        official_weights(name, detection, "detection")  # which refuses what is no network at all
        raise UserError(
            f"torchvision:{name} finds boxes inside the network, so it cannot be quantized; "
            f"choose from {', '.join(f'torchvision:{known}' for known in TORCHVISION_NAMES)}"
        )
    official = official_weights(name, detection, "detection")
    tensors = read_checkpoint(weights, key) if weights else download(official, name)
    build = getattr(detection, name)
    ssd = build(weights=None, weights_backbone=None, num_classes=_classes(tensors, len(official.meta["categories"])))
    transform = fit(ssd, tensors, weights or official.url).transform
    spec = InputSpec(
        transform.fixed_size[::-1],
        min(transform.fixed_size),
        "bilinear",
        tuple(transform.image_mean),
        tuple(transform.image_std),
    )
    return RawHeads(ssd).eval(), spec, weights or f"torchvision {official}"


def _classes(tensors: Mapping[str, Tensor], default: int) -> int:
    """The classes of a torchvision checkpoint, background included, by the last biases of its two heads."""
    kinds = ("head.classification_head.", "head.regression_head.")
    biases = [
        [value.shape[0] for key, value in tensors.items() if key.startswith(kind) and key.endswith(".bias")]
        for kind in kinds
    ]
    return biases[0][-1] * 4 // biases[1][-1] if all(biases) else default
