"""SSD-Lite with MobileNetV2: the network and the checkpoint layout of qfgaohao's pytorch-ssd."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from modeling.mobilenet_v2 import mobilenet_v2, width_of
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision
from utils.tasks.boxes import BoxCoder, PriorSpec, make_priors

# How the public checkpoints were trained: (x - 127) / 128 over pixels of 0..255, squeezed to a square.
SPEC = InputSpec(size=(300, 300), resize=300, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
WEIGHTS = "https://storage.googleapis.com/models-hao/mb2-ssd-lite-mp-0_686.pth"  # VOC's 20 classes

EXTRAS = ((256, 512), (128, 256), (128, 256), (64, 64))  # hidden and output channels of the blocks after the backbone
_TAP = 14  # the block whose expansion is the first feature map, at stride 16
_FIRST_HALVINGS = 4  # layers of stride 2 before the tap; one more before each further feature map


class SSDLite(nn.Module):
    """Raw heads of SSD-Lite: class logits [N, P, classes], class 0 the background, and box offsets [N, P, 4].

    Boxes from offsets and their choice stay outside, with coder(). classes: background included.
    extras: hidden and output channels of each block of stride 2 after the backbone. priors: one entry
    for the tap in block 14, one for the backbone's output and one for each extra block. divisor: of MobileNetV2's channels.
    """

    def __init__(
        self,
        classes: int,
        width: float = 1.0,
        extras: Sequence[tuple[int, int]] = EXTRAS,
        priors: PriorSpec | None = None,
        divisor: int = 8,
    ):
        super().__init__()
        self.classes, self.priors = classes, priors or PriorSpec()
        self.base_net = mobilenet_v2(width=width, divisor=divisor).features
        channels = [self.base_net[_TAP].conv[0][0].out_channels, self.base_net[-1][0].out_channels]

        self.extras = nn.ModuleList()
        for hidden, out in extras:
            block = torchvision.models.mobilenetv2.InvertedResidual
            self.extras.append(block(channels[-1], out, stride=2, expand_ratio=hidden / channels[-1]))
            channels.append(out)
        if len(channels) != len(self.priors.strides):
            raise ValueError(f"{len(channels)} feature maps, but priors for {len(self.priors.strides)}")
        self.classification_headers = _headers(channels, self.priors.per_cell * classes)
        self.regression_headers = _headers(channels, self.priors.per_cell * 4)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(*self.backbone(images))

    def backbone(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first two feature maps: of the tap and of the backbone's end."""
        for layer in self.base_net[:_TAP]:
            x = layer(x)
        expand, *rest = self.base_net[_TAP].conv  # a block of stride 2, so without a residual
        tap = x = expand(x)
        for layer in (*rest, *self.base_net[_TAP + 1 :]):
            x = layer(x)
        return tap, x

    def heads(self, *maps: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and box offsets from the backbone's feature maps."""
        maps = list(maps)
        for block in self.extras:
            maps.append(block(maps[-1]))
        scores = [_rows(header(x)) for header, x in zip(self.classification_headers, maps, strict=True)]
        offsets = [_rows(header(x)) for header, x in zip(self.regression_headers, maps, strict=True)]
        return torch.cat(scores, 1).unflatten(1, (-1, self.classes)), torch.cat(offsets, 1).unflatten(1, (-1, 4))

    def coder(self, size: tuple[int, int]) -> BoxCoder:
        """The priors for images of that height and width, and how detections are chosen."""
        return ssd_coder(self.priors, size)


def ssd_coder(priors: PriorSpec, size: tuple[int, int]) -> BoxCoder:
    """The coder for feature maps of stride 16, 32, ... of images of that height and width."""
    halvings = range(_FIRST_HALVINGS, _FIRST_HALVINGS + len(priors.strides))
    maps = [tuple(-(-side // 2**halved) for side in size) for halved in halvings]
    return BoxCoder(make_priors(priors, maps, size))


def ssd_lite(tensors: Mapping[str, Tensor]) -> SSDLite:
    """The network that a checkpoint (blocks in torchvision's layout) is for: its classes, width and extra channels."""
    last = f"headers.{len(EXTRAS) + 1}.bias"
    needed = ["base_net.0.0.weight", f"classification_{last}", f"regression_{last}"]
    blocks = [(f"extras.{i}.conv.1.0.weight", f"extras.{i}.conv.2.weight") for i in range(len(EXTRAS))]
    if not {*needed, *sum(blocks, ())} <= tensors.keys():
        return SSDLite(21)
    extras = [(tensors[depthwise].shape[0], tensors[project].shape[0]) for depthwise, project in blocks]
    cells = tensors[f"regression_{last}"].shape[0] // 4
    width, divisor = width_of(tensors, "base_net")
    return SSDLite(tensors[f"classification_{last}"].shape[0] // cells, width, extras, divisor=divisor)


def _headers(channels: Sequence[int], outputs: int) -> nn.ModuleList:
    """A header for each feature map: separable, but a plain 1x1 convolution for the last, smallest one."""
    separable = [
        nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
            nn.Conv2d(width, outputs, 1),
        )
        for width in channels[:-1]
    ]
    return nn.ModuleList([*separable, nn.Conv2d(channels[-1], outputs, 1)])


def _rows(x: Tensor) -> Tensor:
    """[N, priors of a cell * values, H, W] as [N, H * W * priors of a cell * values]."""
    return x.permute(0, 2, 3, 1).flatten(1)
