"""ultralytics' YOLO detectors up to their raw heads, with their own coder."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modeling.checkpoint import fit, read_checkpoint
from utils.core.errors import UserError, message_of
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision  # noqa: F401 (before ultralytics, which imports it plainly)
from utils.tasks.distribution_focal import DistributionFocalCoder

SPEC = InputSpec(size=(640, 640), resize=640, mean=(0.0,) * 3, std=(1.0,) * 3)

_HEADS = ("Detect", "v10Detect")  # those of segments, poses and prompts hold more than boxes


class RawYolo(nn.Module):
    """An ultralytics detection network up to its raw heads: a list of maps [N, 4 * reg_max + classes, H, W], one a stride.

    layers: the network's own, in order; each says in `f` which layers it reads. Names are the checkpoint's.
    """

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.model = layers
        reads = [layer.f if isinstance(layer.f, list) else [layer.f] for layer in layers]
        self.reads = [[place + i if place < 0 else place for place in places] for i, places in enumerate(reads)]

    def forward(self, images: Tensor) -> list[Tensor]:
        boxes, classes = self.heads()
        pairs = zip(boxes, classes, self.features(images), strict=True)
        return [torch.cat([box(x), score(x)], 1) for box, score, x in pairs]

    def features(self, images: Tensor) -> list[Tensor]:
        """The maps that the head reads, one a stride."""
        maps = {-1: images}  # by the layer that wrote them, while they are read
        last = {place: i for i, places in enumerate(self.reads) for place in places}
        for i, layer in enumerate(list(self.model)[:-1]):  # a slice would be a module of its own, with other names
            inputs = [maps[place] for place in self.reads[i]]
            maps = {place: value for place, value in maps.items() if last.get(place, -1) > i}
            maps[i] = layer(inputs if isinstance(layer.f, list) else inputs[0])
        return [maps[place] for place in self.reads[-1]]

    def heads(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        """The convolutions for boxes and for classes, of each stride: those that need no NMS, where it has them."""
        head = self.model[-1]
        return (head.one2one_cv2, head.one2one_cv3) if self.end2end else (head.cv2, head.cv3)

    @property
    def end2end(self) -> bool:
        return bool(getattr(self.model[-1], "end2end", False))

    def coder(self, size: tuple[int, int]) -> DistributionFocalCoder:
        """How the raw heads of images of that height and width become boxes; sides that it cannot halve are a UserError."""
        head = self.model[-1]
        strides = tuple(int(stride) for stride in head.stride)
        if any(side % max(strides) for side in size):
            raise UserError(
                f"this network takes sides that are multiples of {max(strides)}, not {size[0]}x{size[1]} (height, width); check --image_size"
            )
        overlap = 1.0 if self.end2end else 0.7
        return DistributionFocalCoder(strides=strides, size=size, reg_max=head.reg_max, nms_thresh=overlap)


def raw_yolo(model: nn.Module) -> RawYolo | None:
    """An ultralytics network, or its YOLO object, up to its raw heads; None for networks of other kinds.

    One whose head finds more than boxes is a UserError.
    """
    layers = model
    while isinstance(layers, nn.Module) and not isinstance(layers, nn.Sequential):
        layers = getattr(layers, "model", None)
    if layers is None or not all(hasattr(layer, "f") for layer in layers) or len(layers) < 2:
        return None
    kind = type(layers[-1]).__name__
    if kind not in _HEADS:
        raise UserError(
            f"an ultralytics network with a head {kind!r} is not handled; pass a detection network (head {_HEADS[0]})"
        )
    return RawYolo(layers)


def build_yolo(name: str, weights: str | None, key: str | None = None) -> RawYolo:
    """The network of ultralytics' NAME.yaml with a checkpoint's classes and weights."""
    if weights is None:
        raise UserError(f"yolo:{name} has no weights of its own; pass --weights with a state dict of that network")
    tensors = read_checkpoint(weights, key)
    return fit(_untrained(name, _classes(tensors)), tensors, weights)


def _untrained(name: str, classes: int | None) -> RawYolo:
    try:
        from ultralytics.nn.tasks import DetectionModel
    except ImportError as error:
        raise UserError(
            f"--model yolo:{name} needs ultralytics ({error}); pip install --no-deps ultralytics ultralytics-thop opencv-python-headless"
        ) from None
    if not name.endswith(".yaml") or "://" in name:
        raise UserError(f"unknown model 'yolo:{name}'; name one of ultralytics' files, as yolo:yolov8n.yaml")
    try:
        made = DetectionModel(name, nc=classes, verbose=False)
    except Exception as error:  # a file that is not there, or is none of a network: ultralytics raises many kinds
        reason = message_of(error, type(error).__name__)
        raise UserError(f"ultralytics builds no detection network of {name!r}: {reason}; check --model") from None
    return raw_yolo(made)


def _classes(tensors: Mapping[str, Tensor]) -> int | None:
    """How many classes a checkpoint's heads tell; None where it has none that are known."""
    last = [name for name in tensors if name.endswith("cv3.0.2.bias")]
    return tensors[last[0]].shape[0] if last else None
