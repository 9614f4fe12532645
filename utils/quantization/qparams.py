"""Quantization parameters: how they are chosen, and weights and biases that are rounded to them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from utils.graph.layers import grouped_weight

SPANNED = 8  # bits from which a weight grid spans all of a layer's weights
SHARES = [1 - 0.02 * i for i in range(36)]  # of the largest weight that a grid of fewer bits may reach
SAMPLED, SAMPLED_OF_ROW = 2**23, 1024  # weights of a layer, and of one row, by which such a grid is chosen
LARGEST = 64  # of a row, all of which have a part in that
METHODS = ("minmax", "percentile", "mse")  # of choosing a range from a histogram


@dataclass(frozen=True)
class QParams:
    """An affine mapping to integers: real value = scale * (q - zero_point), q in [quant_min, quant_max].

    scale: [] per tensor, [C_out] per output channel (float32).
    zero_point: like scale (int32); an integer, so that 0 is represented exactly.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int

    @property
    def per_channel(self) -> bool:
        return self.scale.dim() > 0

    @property
    def bits(self) -> int:
        return (self.quant_max - self.quant_min).bit_length()


def affine_qparams(low: Tensor, high: Tensor, bits: int) -> QParams:
    """Unsigned, 2^bits steps over [low, high], which is widened to hold 0; low and high: [] or [C]."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    quant_max = 2**bits - 1
    scale = _nonzero((high - low) / quant_max)
    return QParams(scale, (-low / scale).round().clamp(0, quant_max).int(), 0, quant_max)


def symmetric_qparams(largest: Tensor, bits: int) -> QParams:
    """Signed, 2^bits - 1 steps over [-largest, largest]; largest: [] or [C]."""
    quant_max = 2 ** (bits - 1) - 1
    scale = _nonzero(largest / quant_max)
    return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), -quant_max, quant_max)


def activation_qparams(low: Tensor, high: Tensor, bits: int, signed: bool) -> QParams:
    """Of activations in [low, high]: unsigned with a zero point, or signed and symmetric around 0 with all 2^bits steps.

    A signed grid is as fine as the further of the two ends asks for; what is never negative has half of its steps.
    """
    if not signed:
        return affine_qparams(low, high, bits)
    qparams = symmetric_qparams(torch.maximum(-low, high).clamp(min=0), bits)
    return replace(qparams, quant_min=qparams.quant_min - 1)


def _nonzero(scale: Tensor) -> Tensor:
    """Zeros are exact at any scale but 0."""
    return torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))


def fake_quantize(x: Tensor, qparams: QParams, axis: int = 0) -> Tensor:
    """x rounded to integers and back; axis: the one that per-channel parameters run along."""
    scale, zero_point, limits = qparams.scale, qparams.zero_point, (qparams.quant_min, qparams.quant_max)
    if qparams.per_channel:
        return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, *limits)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *limits)


# ----------------------------------------------------------------------------------------- weights


def has_one_scale(layer: nn.Module) -> bool:
    """Whether a layer's weights have no axis of output channels, as those of a grouped transposed convolution."""
    return isinstance(layer, _ConvTransposeNd) and layer.groups > 1


def may_have_zero_points(bits: int, per_channel: bool) -> bool:
    """Whether weights of these bits may have zero points: one in all, or one for every channel where there are fewer than 8.

    Those leave room in 8 bits for being counted from zero. Of weights that do not, ONNX Runtime computes a MobileNetV2 more
    than 20 times slower with a zero point for every channel (results/int4.txt).
    """
    return bits < SPANNED or not per_channel


def choose_weight_qparams(layer: nn.Module, bits: int, per_channel: bool, symmetric: bool) -> QParams:
    """The parameters of a layer's weights, per tensor or, where it can have more scales than one, per output channel.

    With 8 bits and more they span the weights. With fewer they cut the largest, where that rounds all others so much
    finer that the squared error falls.
    """
    weights, one = grouped_weight(layer), not per_channel or has_one_scale(layer)
    rows = weights.reshape(1 if one else weights.shape[0] * weights.shape[1], -1)
    low, high = rows.amin(1), rows.amax(1)
    spanning = bits >= SPANNED
    grid = _weight_grid(low, high, bits, symmetric) if spanning else _nearest_grid(rows, low, high, bits, symmetric)
    return replace(grid, scale=grid.scale[0], zero_point=grid.zero_point[0]) if one else grid


def _nearest_grid(rows: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> QParams:
    """[C]. The grid of the least squared error for each row [C, N], of those that span shares of its range."""
    unit = torch.maximum(-low, high).clamp_min(torch.finfo(low.dtype).tiny)  # squares of weights may be 0 or infinite
    some, counts = _sample(rows / unit[:, None])

    def error(share: float) -> Tensor:
        grid = _weight_grid(low / unit * share, high / unit * share, bits, symmetric)
        return ((fake_quantize(some, grid) - some).square() * counts).sum(1)

    best = torch.stack([error(share) for share in SHARES]).argmin(0)
    share = low.new_tensor(SHARES)[best]
    return _weight_grid(low * share, high * share, bits, symmetric)


def _sample(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Values [C, n] of rows [C, N], and by how much each counts: all alike, but for layers of more than SAMPLED weights.

    There the largest of a row, which a grid may cut, count once, and evenly spread ones for all others.
    """
    length, count = rows.shape[1], max(SAMPLED // len(rows), SAMPLED_OF_ROW)
    if length <= count + LARGEST:
        return rows, rows.new_ones(())
    index = torch.arange(count, device=rows.device) * (length - 1) // (count - 1)
    largest = rows.gather(1, rows.abs().topk(LARGEST, 1).indices)
    spread = rows[:, index]
    other = (spread.abs() < largest.abs().amin(1, keepdim=True)).to(rows.dtype)
    share = (length - LARGEST) / other.sum(1, keepdim=True).clamp_min(1)
    return torch.cat([spread, largest], 1), torch.cat([other * share, torch.ones_like(largest)], 1)


def _weight_grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> QParams:
    """[C]. With fewer bits than 8 a symmetric grid has one more step below than above, since each of them counts."""
    if not symmetric:
        return affine_qparams(low, high, bits)
    grid = symmetric_qparams(torch.maximum(-low, high), bits)
    return replace(grid, quant_min=grid.quant_min - (bits < SPANNED))


def fit_bias_to_int32(qparams: QParams, bias: Tensor, input_scale: float) -> QParams:
    """A layer's weight parameters, at a larger scale where its bias [C_out] would overflow an int32 accumulator.

    The accumulator counts in weight scale times input scale, so the bias of a layer whose weights are nothing
    beside it, as those of dead channels, takes too many steps. The bias gets half of the accumulator. The rest is
    for the products, and for what bias correction adds later: a mean of products' errors, smaller than they are.
    """
    least = bias.abs() / (2**30 * input_scale)
    return replace(qparams, scale=torch.maximum(qparams.scale, least if qparams.per_channel else least.max()))


def round_weight(layer: nn.Module, qparams: QParams) -> None:
    """Round a layer's weights to the nearest steps, in place."""
    view = grouped_weight(layer)
    groups, out = view.shape[:2]
    if qparams.per_channel:
        rows = view.reshape(groups * out, -1)
        view.copy_(fake_quantize(rows, qparams).view(view.shape))
    else:
        view.copy_(fake_quantize(view, qparams))


# ------------------------------------------------------------------------------------------ biases


def choose_bias_qparams(bias: Tensor, bits: int, accumulator_scale: Tensor | None) -> QParams:
    """The parameters of a bias [C_out].

    32 bits: those of an integer engine's accumulator, scale s_w * s_x ([] or [C_out]), which must be given.
    Fewer: symmetric over the bias's own range.
    """
    if bits < 32:
        return symmetric_qparams(bias.abs().max(), bits)
    scale = _nonzero(accumulator_scale)
    return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), -(2**31) + 1, 2**31 - 1)


def overflows(bias: Tensor, qparams: QParams) -> bool:
    """Whether a bias has a value beyond the range of its parameters."""
    return bool(((bias.double() / qparams.scale.double()).round().abs() > qparams.quant_max).any())


def round_bias(bias: Tensor, qparams: QParams) -> Tensor:
    """The bias rounded to steps; in float64, since float32 cannot count to 2^31."""
    scale = qparams.scale.double()
    return ((bias.double() / scale).round().clamp(qparams.quant_min, qparams.quant_max) * scale).float()
