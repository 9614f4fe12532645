"""Affine quantizers: grids, fake-quantized weights and biases, and the module that quantizes activations."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from utils.graph.layers import per_channel, taps


@dataclass(frozen=True)
class QParams:
    """A grid: real value = scale * (q - zero_point), with q in [lowest, highest].

    scale: [] for one grid per tensor, [C_out] for one per output channel (float32).
    zero_point: like scale (int32); an integer, so that 0 is on the grid.
    """

    scale: Tensor
    zero_point: Tensor
    lowest: int
    highest: int

    @property
    def per_channel(self) -> bool:
        return self.scale.dim() > 0


def affine_grid(low: Tensor, high: Tensor, bits: int) -> QParams:
    """The unsigned grid of 2^bits steps over [low, high], widened to hold 0; low and high: [] or [C]."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    highest = 2**bits - 1
    scale = _nonzero((high - low) / highest)
    return QParams(scale, (-low / scale).round().clamp(0, highest).int(), 0, highest)


def symmetric_grid(largest: Tensor, bits: int) -> QParams:
    """The signed grid of 2^bits - 1 steps over [-largest, largest]; largest: [] or [C]."""
    highest = 2 ** (bits - 1) - 1
    scale = _nonzero(largest / highest)
    return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), -highest, highest)


def _nonzero(scale: Tensor) -> Tensor:
    """A tensor of zeros is exact on any grid; a scale of 0 is none."""
    return torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))


def weight_grid(layer: nn.Module, bits: int, channelwise: bool, symmetric: bool) -> QParams:
    """The grid of a layer's weights, per tensor or per output channel."""
    view = taps(layer)  # [groups, out, in, positions]
    low, high = view.amin((2, 3)).reshape(-1), view.amax((2, 3)).reshape(-1)
    if not channelwise:
        low, high = low.min(), high.max()
    if symmetric:
        return symmetric_grid(torch.maximum(-low, high), bits)
    return affine_grid(low, high, bits)


def fake_quantize(x: Tensor, grid: QParams, axis: int = 0) -> Tensor:
    """x rounded to the grid and back; axis: the one that a per-channel grid runs along."""
    if grid.per_channel:
        return torch.fake_quantize_per_channel_affine(x, grid.scale, grid.zero_point, axis, grid.lowest, grid.highest)
    return torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero_point, grid.lowest, grid.highest)


def quantize_weight(layer: nn.Module, grid: QParams) -> None:
    """Round a layer's weights to the grid, in place."""
    view = taps(layer)
    groups, out = view.shape[:2]
    if grid.per_channel:
        rows = view.reshape(groups * out, -1)
        view.copy_(fake_quantize(rows, grid).view(view.shape))
    else:
        view.copy_(fake_quantize(view, grid))


def bias_grid(bias: Tensor, bits: int, accumulator_scale: Tensor | None) -> QParams:
    """The grid of a bias [C_out].

    32 bits: an integer engine's accumulator, scale s_w * s_x ([] or [C_out]), which must be given.
    Fewer: a symmetric grid over the bias's own range.
    """
    if bits < 32:
        return symmetric_grid(bias.abs().max(), bits)
    scale = _nonzero(accumulator_scale)
    return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), -(2**31) + 1, 2**31 - 1)


def leave_room(grid: QParams, bias: Tensor, input_scale: float) -> QParams:
    """A layer's weight grid, made coarser where the bias [C_out] would overflow an int32 accumulator.

    That is where weights are nothing beside their bias, as those of dead channels. The bias gets half of
    the accumulator, the products the rest.
    """
    least = bias.abs() / (2**30 * input_scale)
    return replace(grid, scale=torch.maximum(grid.scale, least if grid.per_channel else least.max()))


def quantize_bias(bias: Tensor, grid: QParams) -> Tensor:
    """The bias rounded to its grid; in float64, since float32 cannot count to 2^31."""
    scale = grid.scale.double()
    return ((bias.double() / scale).round().clamp(grid.lowest, grid.highest) * scale).float()


class Quantizer(nn.Module):
    """Rounds activations [N, C, ...] to one grid per tensor.

    cap: [C], or None: a channel's own upper bound, rounded to the grid. With a grid that starts at
    0 this is also the ReLU, the ReLU6 or the CappedReLU before it.
    inplace: overwrite the input, where the caller knows that nobody else reads it.
    before, after: what values are multiplied by before and after rounding: 1 / scale and scale,
    unless what stands around has taken them over; before may be [C, 1, ...].
    divisor: the scale, to be divided by instead, as an engine's QuantizeLinear does.
    """

    def __init__(self, grid: QParams, cap: Tensor | None = None, inplace: bool = False):
        super().__init__()
        self.grid, self.inplace = grid, inplace
        self.scale, self.zero_point = float(grid.scale), int(grid.zero_point)
        self.before, self.after = 1 / self.scale, self.scale
        self.divisor: float | None = None
        self.register_buffer("cap", None if cap is None else (cap / self.scale).round().clamp(max=float(self.highest)))
        self.register_buffer("floor", torch.tensor(float(self.lowest)), persistent=False)

    @property
    def lowest(self) -> int:
        """The grid's lowest step, counted from zero."""
        return self.grid.lowest - self.zero_point

    @property
    def highest(self) -> int:
        return self.grid.highest - self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        # Equal to torch.fake_quantize_per_tensor_affine, which writes a mask besides, in fewer passes over
        # memory. Rounding is to even, before the clamp, as in that kernel.
        if self.divisor is not None:
            steps = x.div_(self.divisor) if self.inplace else x / self.divisor
        elif not isinstance(self.before, Tensor) and self.before == 1:
            steps = x if self.inplace else x.clone()
        else:
            steps = x.mul_(self.before) if self.inplace else x * self.before
        steps.round_()
        if self.cap is None:
            steps.clamp_(self.lowest, self.highest)
        else:
            torch.clamp(steps, self.floor, per_channel(self.cap, x.dim()), out=steps)
        return steps if self.after == 1 else steps.mul_(self.after)

    def extra_repr(self) -> str:
        low, high = (self.scale * step for step in (self.lowest, self.highest))
        capped = "" if self.cap is None else f", capped channels={int((self.cap < self.highest).sum())}"
        return f"[{low:.4g}, {high:.4g}] in {self.grid.highest - self.grid.lowest + 1} steps, zero at {self.zero_point}{capped}"
