"""DeepLabV3+ on MobileNetV2, in the layout of jfzhang95's checkpoints.

Chen et al., Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation
(ECCV 2018, arXiv 1802.02611). Every activation and padding is a module called once, and sizes come
from the tensors, so that torch.export captures it for images of any size.
"""

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.mobilenet_v2 import to_torchvision_layout, width_of
from utils.core.torchvision_compat import torchvision

# expansion, channels, blocks and stride of each stage of MobileNetV2
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
OUTPUT_STRIDE = 16  # from here on dilation takes the place of stride


class PaddedBlock(torchvision.models.mobilenetv2.InvertedResidual):
    """MobileNetV2's block with the zeros around its input instead of around the depthwise convolution's.

    The 1x1 convolution in front turns those zeros into activations of its bias. The residual is the
    block's input without them.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, dilation: int):
        super().__init__(inputs, outputs, stride, expansion)
        depthwise = self.conv[-3][0]
        depthwise.padding, depthwise.dilation = (0, 0), (dilation, dilation)
        self.pad = nn.ZeroPad2d(dilation)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.pad(x))
        return x + y if self.use_res_connect else y


class Backbone(nn.Module):
    """MobileNetV2 without its last 1x1 convolution.

    images [N, 3, H, W] -> low [N, low_channels, H/4, W/4], high [N, high_channels, H/16, W/16].
    """

    def __init__(self, width: float, stages: Sequence[tuple[int, int, int, int]], divisor: int = 8):
        super().__init__()
        make_divisible = torchvision.models.mobilenetv2._make_divisible
        channels = make_divisible(32 * width, divisor)
        blocks = [torchvision.ops.Conv2dNormActivation(3, channels, stride=2, activation_layer=nn.ReLU6)]
        reached, dilation = 2, 1
        for expansion, outputs, count, stride in stages:
            own_dilation = dilation
            if reached == OUTPUT_STRIDE:
                stride, dilation = 1, dilation * stride
            reached *= stride
            outputs = make_divisible(outputs * width, divisor)
            for i in range(count):
                blocks.append(PaddedBlock(channels, outputs, 1 if i else stride, expansion, own_dilation))
                channels = outputs
            if reached == 4:
                self.low_end, self.low_channels = len(blocks), channels
        self.high_channels = channels
        self.features = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for count, block in enumerate(self.features, start=1):
            x = block(x)
            if count == self.low_end:
                low = x
        return low, x


class AtrousBranch(nn.Module):
    """One dilated convolution of the pyramid."""

    def __init__(self, inputs: int, outputs: int, dilation: int):
        super().__init__()
        size, padding = (1, 0) if dilation == 1 else (3, dilation)
        self.atrous_conv = nn.Conv2d(inputs, outputs, size, padding=padding, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.atrous_conv(x)))


class AtrousPyramid(nn.Module):
    """Atrous spatial pyramid pooling: four dilations and the global mean, side by side."""

    def __init__(self, inputs: int, channels: int, dilations: Sequence[int]):
        super().__init__()
        self.aspp1, self.aspp2, self.aspp3, self.aspp4 = (
            AtrousBranch(inputs, channels, dilation) for dilation in dilations
        )
        pooled = nn.Conv2d(inputs, channels, 1, bias=False)
        self.global_avg_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), pooled, nn.BatchNorm2d(channels), nn.ReLU())
        self.conv1 = nn.Conv2d(5 * channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.aspp1(x), self.aspp2(x), self.aspp3(x), self.aspp4(x)]
        branches.append(_resize(self.global_avg_pool(x), x))
        return self.dropout(self.relu(self.bn1(self.conv1(torch.cat(branches, dim=1)))))


class Decoder(nn.Module):
    """Refines the pyramid's output with the backbone's low-level features."""

    def __init__(self, low_channels: int, reduced: int, channels: int, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(low_channels, reduced, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(reduced)
        self.relu = nn.ReLU()
        self.last_conv = nn.Sequential(
            nn.Conv2d(channels + reduced, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(channels, classes, 1),
        )

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        low = self.relu(self.bn1(self.conv1(low)))
        return self.last_conv(torch.cat((_resize(high, low), low), dim=1))


class DeepLab(nn.Module):
    """DeepLabV3+ with output stride 16: images [N, 3, H, W] -> logits [N, classes, H, W].

    width: MobileNetV2's width multiplier. channels: of the pyramid and the decoder. reduced: what
    the decoder reduces the low-level features to. stages: as STAGES. dilations: of the pyramid.
    divisor: of MobileNetV2's channels.
    """

    def __init__(
        self,
        classes: int = 21,
        width: float = 1.0,
        channels: int = 256,
        reduced: int = 48,
        stages: Sequence[tuple[int, int, int, int]] = STAGES,
        dilations: Sequence[int] = (1, 6, 12, 18),
        divisor: int = 8,
    ):
        super().__init__()
        self.backbone = Backbone(width, stages, divisor)
        self.aspp = AtrousPyramid(self.backbone.high_channels, channels, dilations)
        self.decoder = Decoder(self.backbone.low_channels, reduced, channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        low, high = self.backbone(images)
        return _resize(self.decoder(self.aspp(high), low), images)


def deeplab_for(tensors: Mapping[str, Tensor]) -> DeepLab:
    """The network with the classes, channels and width of a checkpoint (in the layout of to_deeplab_layout)."""
    sizes = {
        name: tensors[key].shape[0]
        for name, key in (
            ("channels", "aspp.conv1.weight"),
            ("reduced", "decoder.conv1.weight"),
            ("classes", "decoder.last_conv.8.weight"),
        )
        if key in tensors
    }
    if "backbone.features.0.0.weight" in tensors:
        sizes["width"], sizes["divisor"] = width_of(tensors, "backbone.features")
    return DeepLab(**sizes)


def to_deeplab_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint with every tensor once and MobileNetV2's blocks under torchvision's names.

    jfzhang95's checkpoints hold the backbone twice, the second time cut in two for the decoder's sake.
    """
    aliases = r"^backbone\.(low|high)_level_features\."
    return to_torchvision_layout({re.sub(aliases, "backbone.features.", key): value for key, value in tensors.items()})


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)
