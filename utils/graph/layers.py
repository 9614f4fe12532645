"""Layers that the passes put into a network, and the one view of a layer's weights that they share."""

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

WEIGHTED = (_ConvNd, nn.Linear)  # layers with weights that are quantized


class CappedReLU(nn.Module):
    """min(max(x, 0), cap) with a cap of its own for every channel: ReLU6 after equalization.

    cap: [C]; infinite where nothing is capped. x: [N, C, ...].
    """

    def __init__(self, cap: Tensor):
        super().__init__()
        self.register_buffer("cap", cap)

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0).minimum(per_channel(self.cap, x.dim()))

    def extra_repr(self) -> str:
        return f"channels={len(self.cap)}, lowest={self.cap.min():.3g}, highest={self.cap.max():.3g}"


CLIPS = (nn.ReLU, nn.ReLU6, CappedReLU)  # one kernel with the layer before them


class IntegerSum(nn.Module):
    """The sum of two tensors of steps, in steps of a third grid, as ONNX Runtime's QLinearAdd rounds it.

    first, second, total: scale and zero point of each uint8 grid; steps are counted from the zero point. That
    kernel multiplies and adds in float32, fused: fixed + ratio * unsigned second + ratio * unsigned first.
    """

    def __init__(self, first: tuple[float, int], second: tuple[float, int], total: tuple[float, int]):
        super().__init__()
        scales = torch.tensor([first[0], second[0], total[0]])
        self.ratios = (scales[:2] / scales[2]).tolist()
        self.zero_points = first[1], second[1], total[1]
        offset = torch.tensor(self.ratios[1]) * self.zero_points[1]
        offset = (self.ratios[0] * self.zero_points[0] + offset.double()).float()  # one rounding: fused
        self.register_buffer("fixed", self.zero_points[2] - offset, persistent=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        sum_ = torch.add(self.fixed, second + self.zero_points[1], alpha=self.ratios[1])
        sum_.add_(first + self.zero_points[0], alpha=self.ratios[0])
        return sum_.round_().sub_(self.zero_points[2])


class PositionSum(nn.Module):
    """[N, C, H, W] -> [N, C, 1, 1], the sum of each channel's values."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3), keepdim=True)


def per_channel(values: Tensor, dims: int) -> Tensor:
    """[C] as [C, 1, ...], to broadcast over an activation [N, C, ...] of that many dimensions."""
    return values.reshape(-1, *[1] * (dims - 2))


def taps(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weight as a view [groups, out / groups, in / groups, kernel positions].

    One shape for dense, grouped, depthwise and transposed convolutions and for linear layers, so
    that a pass states its arithmetic once. Writing to the view writes to the layer.
    weight: a tensor shaped like the layer's weight, to view instead of it.
    """
    weight = layer.weight.data if weight is None else weight
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, _ConvTransposeNd):  # stored as [in, out / groups, ...]
        return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1).transpose(1, 2)
    return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)


def channels_in(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def channels_out(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def scale_outputs(layer: nn.Module, factor: Tensor) -> None:
    """Multiply every output channel, bias included, by its factor [C_out]."""
    view = taps(layer)
    view.mul_(factor.view(view.shape[0], -1, 1, 1))
    layer.bias.data.mul_(factor)


def scale_inputs(layer: nn.Module, factor: Tensor) -> None:
    """Multiply the weights that read each input channel by its factor [C_in]."""
    view = taps(layer)
    view.mul_(factor.view(view.shape[0], 1, -1, 1))


def input_sums(layer: nn.Module, values: Tensor) -> Tensor:
    """What constant inputs [C_in] add to each output [C_out], where every tap sees its input."""
    view = taps(layer)
    return (view.sum(3) * values.view(view.shape[0], 1, -1)).sum(2).reshape(-1)


def sees_padding(layer: nn.Module) -> bool:
    """Whether some output positions of the layer read zeros beyond the border."""
    if isinstance(layer, nn.Linear):
        return False
    if isinstance(layer, _ConvTransposeNd):
        return any(size > 1 for size in layer.kernel_size)
    return layer.padding == "same" or any(pad != 0 for pad in layer.padding)


def padding(layer: nn.Module) -> tuple[list[int], list[int]]:
    """Zeros before and after each spatial axis of a convolution's input."""
    if layer.padding == "valid":
        return [0] * len(layer.kernel_size), [0] * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [total // 2 for total in totals], [total - total // 2 for total in totals]
    return list(layer.padding), list(layer.padding)


def ensure_bias(layer: nn.Module) -> None:
    """Give a layer without bias one of zeros, so that passes can write to it."""
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros(channels_out(layer), dtype=layer.weight.dtype), requires_grad=False)
