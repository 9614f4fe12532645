"""The layers of a captured network, and the one view of a layer's weights that all passes share."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

# Layers with weights; each has weight_qparams and bias_qparams, and in_float, which says that it is not to be quantized.
WEIGHTED = (_ConvNd, nn.Linear)


def on_integers(module: nn.Module | None) -> bool:
    """Whether a module is a layer that is to be quantized."""
    return isinstance(module, WEIGHTED) and not module.in_float


class Clip(nn.Module):
    """min(max(x, low), high): ReLU (0, inf), ReLU6 (0, 6), hardtanh, and a ReLU6 after equalization.

    low, high: [] for all channels, or [C]; x: [N, C, ...]. An integer engine does it in the layer's own kernel.
    """

    def __init__(self, low: Tensor | float, high: Tensor | float):
        super().__init__()
        self.register_buffer("low", torch.as_tensor(low, dtype=torch.float32))
        self.register_buffer("high", torch.as_tensor(high, dtype=torch.float32))
        self.inplace = False

    @property
    def rectifies(self) -> bool:
        """Whether it is a ReLU, with or without a cap: nothing below 0 passes."""
        return bool((self.low == 0).all())

    @property
    def capped(self) -> bool:
        return bool(self.high.isfinite().any())

    def forward(self, x: Tensor) -> Tensor:
        if self.low.dim() or self.high.dim():
            low, high = (per_channel(bound, x.dim()) if bound.dim() else bound for bound in (self.low, self.high))
            return torch.clamp(x, low, high, out=x) if self.inplace else torch.clamp(x, low, high)
        low, high = float(self.low), float(self.high)
        if low == 0 and high == math.inf:
            return F.relu(x, self.inplace)
        return F.hardtanh(x, low, high, self.inplace)

    def extra_repr(self) -> str:
        ends = [
            f"{name}={end.min():.4g}" + (f" to {end.max():.4g}" if end.dim() else "")
            for name, end in self.named_buffers()
        ]
        return ", ".join(ends)


class ChannelAffine(nn.Module):
    """x * scale + shift, channel by channel; folded into the layer before it where there is one.

    scale, shift: [] or [C]; x: [N, C, ...].
    """

    def __init__(self, scale: Tensor, shift: Tensor):
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = (per_channel(part, x.dim()) if part.dim() else part for part in (self.scale, self.shift))
        return x * scale + shift


class Elementwise(nn.Module):
    """Any other function of one tensor, value by value: an activation, however it was written.

    inner: its operators, from one placeholder to one output. kind: what a log calls it. homogeneous: whether
    f(s x) = s f(x) for every s > 0, so that a scale passes. gain, level: [] or [C], what x is multiplied by first, and the
    result at last. No scale passes a function that is not homogeneous; equalization ends before it in the gain, and
    begins behind it with the level, both exact.
    """

    def __init__(self, inner: fx.GraphModule, kind: str, homogeneous: bool):
        super().__init__()
        self.inner, self.kind, self.homogeneous = inner, kind, homogeneous
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("level", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        result = self.inner(x * per_channel(self.gain, x.dim()) if self.gain.dim() else x)
        return result * per_channel(self.level, x.dim()) if self.level.dim() else result

    def extra_repr(self) -> str:
        return self.kind


def identity() -> fx.GraphModule:
    """The inner graph of an Elementwise that does nothing."""
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    return fx.GraphModule(nn.Module(), graph)


def per_channel(values: Tensor, dims: int) -> Tensor:
    """[C] as [C, 1, ...], to broadcast over an activation [N, C, ...] of that many dimensions."""
    return values.reshape(-1, *[1] * (dims - 2))


def along_outputs(layer: nn.Module, values: Tensor, dims: int) -> Tensor:
    """[C], to broadcast over a layer's outputs of that many dimensions: along the last of a linear layer's, else the second."""
    return values if isinstance(layer, nn.Linear) else per_channel(values, dims)


def grouped_weight(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
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
    """Multiply every output channel of a layer, bias included, or of an Elementwise, by its factor [C_out]."""
    if isinstance(layer, Elementwise):
        layer.level = layer.level * factor
        return
    view = grouped_weight(layer)
    view.mul_(factor.view(view.shape[0], -1, 1, 1))
    layer.bias.data.mul_(factor)


def scale_inputs(layer: nn.Module, factor: Tensor) -> None:
    """Multiply the weights that read each input channel by its factor [C_in]."""
    view = grouped_weight(layer)
    view.mul_(factor.view(view.shape[0], 1, -1, 1))


def input_sums(layer: nn.Module, values: Tensor) -> Tensor:
    """What constant inputs [C_in] add to each output [C_out], where every tap sees its input."""
    view = grouped_weight(layer)
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


def make_layer(kind: type[nn.Module], weight: Tensor, bias: Tensor | None, **options: Any) -> nn.Module:
    """A layer of that class with copies of these parameters; without a bias it gets one of zeros, for passes to write to.

    options: of a convolution: stride, padding, dilation, groups, output_padding.
    """
    if kind is nn.Linear:
        layer = kind(weight.shape[1], weight.shape[0], device="meta")
    else:
        inputs, outputs = weight.shape[1] * options["groups"], weight.shape[0]
        if issubclass(kind, _ConvTransposeNd):
            inputs, outputs = weight.shape[0], weight.shape[1] * options["groups"]
        layer = kind(
            inputs, outputs, tuple(weight.shape[2:]), device="meta", **{k: _hashable(v) for k, v in options.items()}
        )
    layer.weight = nn.Parameter(weight.detach().clone().contiguous(), requires_grad=False)
    bias = (
        torch.zeros(channels_out(layer), dtype=weight.dtype, device=weight.device)
        if bias is None
        else bias.detach().clone()
    )
    layer.bias = nn.Parameter(bias, requires_grad=False)
    layer.weight_qparams = layer.bias_qparams = None
    layer.in_float = False
    return layer.eval()


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
