"""Means, variances and ranges of every activation, from BatchNorm statistics alone.

Below: the arithmetic of Gaussians that are clipped or passed through a function. Above: an
interpreter that runs a network on distributions instead of images. A value carries maps of the
activation's own shape (batch 1), so zero padding, concats, slices and pooling mean what they mean for
activations, and what a border sees is exact.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.core.input_spec import InputSpec
from utils.graph.layers import WEIGHTED, ChannelAffine, Clip, Elementwise, per_channel
from utils.graph.nodes import describe, module_of, shape
from utils.graph.ops import is_size, operator_of

SIGMAS = 6.0  # a Gaussian activation is taken to stay within this many standard deviations
CORRELATION = 0.01  # between any two inputs of a layer without BatchNorm, where its range is concerned


# ------------------------------------------------------------------------------------- arithmetic


def clipped_gaussian(mean: Tensor, variance: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of min(max(x, low), high) for Gaussian x; DFQ, appendix C, for two sides.

    All tensors of one shape, or broadcastable; low and high may be infinite. Computed in float64.
    """
    mean, variance, low, high = (t.double() for t in (mean, variance, low, high))
    std = variance.sqrt().clamp_min(1e-12)
    low = torch.maximum(low, torch.minimum(high, mean) - 12 * std)  # the same to 1e-30, and finite
    high = torch.minimum(high, torch.maximum(low, mean) + 12 * std)
    a, b = (low - mean) / std, (high - mean) / std
    below, above = torch.special.ndtr(a), torch.special.ndtr(-b)
    inside = (1 - below - above).clamp_min(0)
    density_a, density_b = _gaussian_density(a), _gaussian_density(b)
    first = low * below + high * above + mean * inside + std * (density_a - density_b)
    second = low**2 * below + high**2 * above + (mean**2 + std**2) * inside
    second = second + 2 * mean * std * (density_a - density_b) + std**2 * (a * density_a - b * density_b)
    return first.float(), (second - first**2).clamp_min(0).float()


def mapped_gaussian(mean: Tensor, variance: Tensor, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of an elementwise function of Gaussian x, by Gauss-Hermite quadrature."""
    points, weights = np.polynomial.hermite_e.hermegauss(33)
    std, first, second = variance.sqrt(), torch.zeros_like(mean), torch.zeros_like(mean)
    for point, weight in zip(points, weights / math.sqrt(2 * math.pi), strict=True):
        value = function(mean + std * point)
        first += weight * value
        second += weight * value**2
    return first, (second - first**2).clamp_min(0)


def _gaussian_density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)


# ------------------------------------------------------------------------------- distributions


@dataclass(frozen=True)
class Gaussian:
    """mean, variance: [C] of a layer's output, as the BatchNorm folded into it says."""

    mean: Tensor
    variance: Tensor


Statistics = dict[str, Gaussian]  # by the name of the layer


@dataclass(frozen=True)
class Moments:
    """mean, variance, low, high: [1, C, ...] of an activation; low and high bound what is expected.

    Maps that are the same everywhere are expanded views of one value, and stay cheap.
    """

    mean: Tensor
    variance: Tensor
    low: Tensor
    high: Tensor

    def map(self, function: Callable[..., Tensor]) -> "Moments":
        """The same function on each of the four maps: for whatever only moves values about."""
        return Moments(*(function(t) for t in (self.mean, self.variance, self.low, self.high)))

    def range(self) -> tuple[float, float]:
        return float(self.low.min()), float(self.high.max())


@dataclass(frozen=True)
class Together:
    """A sum of two tensors against one of independent ones: ratios of its variance, and of how far it reaches below and
    above its mean. A node of the graph has it where it was measured (utils.calibration.sums)."""

    variance: float = 1.0
    below: float = 1.0
    above: float = 1.0


TOGETHER = "together"  # in a node's meta


@dataclass(frozen=True)
class Unknown:
    """Stands for an activation of which nothing is known. reason: where that began."""

    reason: str


def gaussian(mean: Tensor, variance: Tensor) -> Moments:
    """An unclipped activation, within SIGMAS deviations."""
    reach = SIGMAS * variance.sqrt()
    return Moments(mean, variance, mean - reach, mean + reach)


def larger_gaussian(first: Gaussian, second: Gaussian) -> Gaussian:
    """Mean and variance of max(x, y) for independent Gaussians x and y; Clark, 1961, equations 2 to 4.

    All tensors of one shape, or broadcastable. Computed in float64.
    """
    mean_x, var_x, mean_y, var_y = (t.double() for t in (first.mean, first.variance, second.mean, second.variance))
    spread = (var_x + var_y).sqrt().clamp_min(1e-12)
    ahead = (mean_x - mean_y) / spread
    x_wins, y_wins, density = torch.special.ndtr(ahead), torch.special.ndtr(-ahead), _gaussian_density(ahead)
    mean = mean_x * x_wins + mean_y * y_wins + spread * density
    square = (mean_x**2 + var_x) * x_wins + (mean_y**2 + var_y) * y_wins + (mean_x + mean_y) * spread * density
    return Gaussian(mean.float(), (square - mean**2).clamp_min(0).float())


# ---------------------------------------------------------------------------------- interpreter


def propagate(model: fx.GraphModule, spec: InputSpec, statistics: Statistics) -> dict[str, Moments | Unknown]:
    """Moments of every node's output, by the node's name.

    statistics: what is known of layers that had a BatchNorm; the others follow from their inputs.
    Assumed: channels are independent, but for the range of a layer without BatchNorm; within a pooling window
    values are equal, so that mean and variance pass (a lower bound on a max-pool's mean, an upper one on an
    average's variance).
    """
    interpreter = _MomentsInterpreter(model, spec, statistics)
    with torch.no_grad():
        interpreter.run(None)
    return interpreter.moments


class _MomentsInterpreter(fx.Interpreter):
    def __init__(self, model: fx.GraphModule, spec: InputSpec, statistics: Statistics):
        super().__init__(model, garbage_collect_values=False)
        self.spec, self.statistics = spec, statistics
        self.moments: dict[str, Moments | Unknown] = {}

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            result = self._input()
        elif node.op in ("get_attr", "output"):
            return super().run_node(node)
        else:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            result = self._call(node, args, kwargs)
        if isinstance(result, Moments | Unknown):
            self.moments[node.name] = result
        return result

    def _input(self) -> Moments:
        mean, variance = (per_channel(t, 4).expand(self.spec.shape()) for t in self.spec.prior())
        low, high = (torch.full_like(mean, bound) for bound in self.spec.range())
        return Moments(mean, variance, low, high)

    def _call(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        module = module_of(self.module, node)
        known = self.statistics.get(node.target)
        if known is not None:
            size = shape(node)
            return gaussian(*(per_channel(t, len(size)).expand(size) for t in (known.mean, known.variance)))
        leaves = _flat((args, kwargs))
        unknown = next((value for value in leaves if isinstance(value, Unknown)), None)
        if unknown:
            return unknown
        if not any(isinstance(value, Moments) for value in leaves):  # sizes and the like
            return super().run_node(node)
        if is_size(node):
            return node.target(args[0].mean, *args[1:])
        result = _module(module, args[0]) if module is not None else self._operator(node, args, kwargs)
        return Unknown(f"after {describe(module, node)}") if result is None else result

    def _operator(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        if node.target is operator.getitem:
            return args[0][args[1]]
        rule = operator_of(node).moments
        return None if rule is None else _RULES[rule](node, *args, **kwargs)


def _module(module: nn.Module, x: Moments) -> Moments | None:
    if isinstance(module, WEIGHTED):
        return _layer(module, x)
    if isinstance(module, _BatchNorm) and module.running_var is not None:
        known = batchnorm_output(module)
        return gaussian(*(per_channel(t, x.mean.dim()).expand_as(x.mean) for t in (known.mean, known.variance)))
    if isinstance(module, Clip):
        return _clipped(module, x)
    if isinstance(module, ChannelAffine):
        scale = per_channel(module.scale, x.mean.dim()) if module.scale.dim() else module.scale
        ends = torch.stack([module(x.low), module(x.high)])
        return Moments(module(x.mean), x.variance * scale**2, ends.amin(0), ends.amax(0))
    return _mapped(module, x) if isinstance(module, Elementwise) else None


def _clipped(clip: Clip, x: Moments) -> Moments:
    low, high = (per_channel(t, x.mean.dim()) if t.dim() else t for t in (clip.low, clip.high))
    bounds = x.map(lambda t: _compactly(lambda v: torch.minimum(torch.maximum(v, low), high), t))
    mean, variance = _moments_of(x, lambda m, v: clipped_gaussian(m, v, low, high))
    return Moments(mean, variance, bounds.low, bounds.high)


def _mapped(function: nn.Module, x: Moments) -> Moments | None:
    """A Gaussian's tails reach further than values do: points stay within the bounds, where roots and logarithms end."""

    def moments(mean: Tensor, variance: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return mapped_gaussian(mean, variance, lambda t: function(torch.minimum(torch.maximum(t, low), high)))

    parts = torch.broadcast_tensors(*(_compact(t) for t in (x.mean, x.variance, x.low, x.high)))
    mean, variance = (t.expand_as(x.mean) for t in moments(*parts))
    low, high = torch.broadcast_tensors(_compact(x.low), _compact(x.high))
    grid = torch.stack([function(low + share * (high - low)) for share in torch.linspace(0, 1, 65)])
    low, high = (extreme(grid, dim=0).expand_as(x.mean) for extreme in (torch.amin, torch.amax))
    if not all(bool(t.isfinite().all()) for t in (_compact(mean), _compact(variance), _compact(low), _compact(high))):
        return None
    return Moments(mean, variance, low, high)


def _layer(layer: nn.Module, x: Moments) -> Moments:
    """A layer of which no BatchNorm tells: mean and variance as of independent inputs.

    Features of one object fire together, so sums reach further than that. The range allows for a slight
    correlation c: (1 - c) sum W^2 var + c (sum |W| std)^2, which many inputs make large.
    """

    def without_bias(weight: Tensor, value: Tensor) -> Tensor:
        replaced = {"weight": weight, "bias": torch.zeros_like(layer.bias)}
        return torch.func.functional_call(layer, replaced, (value.contiguous(),))

    mean = layer(x.mean.contiguous())
    variance = without_bias(layer.weight**2, x.variance)
    together = without_bias(layer.weight.abs(), x.variance.sqrt()) ** 2
    reach = SIGMAS * ((1 - CORRELATION) * variance + CORRELATION * together).sqrt()
    return Moments(mean, variance, mean - reach, mean + reach)


def batchnorm_output(norm: _BatchNorm) -> Gaussian:
    """What a BatchNorm's output is distributed as: its bias, and nearly its weight squared.

    Not quite: eps is part of what it divides by, so a channel that is constant has variance 0.
    """
    gain = norm.running_var / (norm.running_var + norm.eps)
    if not norm.affine:
        return Gaussian(torch.zeros_like(gain), gain)
    return Gaussian(norm.bias.detach().clone(), norm.weight.detach() ** 2 * gain)


# ------------------------------------------------------- how moments pass operators, by the table's word for it


def _each(node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """The operator itself on each of the four maps: for whatever moves values, or takes averages or extremes of them."""
    fields = ("mean", "variance", "low", "high")
    maps = []
    for field in fields:
        own_args, own_kwargs = _chosen(args, field), _chosen(kwargs, field)
        maps.append(node.target(*own_args, **own_kwargs))
    if isinstance(maps[0], Tensor):
        return Moments(*maps)
    return tuple(Moments(*parts) for parts in zip(*maps, strict=True))


def _chosen(value: Any, field: str) -> Any:
    if isinstance(value, Moments):
        return getattr(value, field).contiguous()
    if isinstance(value, tuple | list):
        return type(value)(_chosen(entry, field) for entry in value)
    if isinstance(value, dict):
        return {key: _chosen(entry, field) for key, entry in value.items()}
    return value


def _concat(node: fx.Node, parts: list[Any], axis: int = 0) -> Moments | None:
    """Constants among the parts vary by nothing."""
    size = next(part.mean for part in parts if isinstance(part, Moments)).shape[:1]
    known = [part if isinstance(part, Moments) else _constant(part.expand(*size, *part.shape[1:])) for part in parts]
    return _each(node, known, axis)


def _constant(value: Tensor) -> Moments:
    return Moments(value, torch.zeros_like(value), value, value)


def _sum(node: fx.Node, x: Any, y: Any) -> Moments | None:
    minus = node.target is torch.ops.aten.sub.Tensor
    if not (isinstance(x, Moments) and isinstance(y, Moments)):
        return _with_constant(operator.sub if minus else operator.add, x, y)
    if minus:
        y = Moments(-y.mean, y.variance, -y.high, -y.low)
    # As far from the mean as both reach together; what was rectified reaches further than its deviation says.
    mean, known = x.mean + y.mean, node.meta.get(TOGETHER, Together())
    below = known.below * torch.hypot(x.mean - x.low, y.mean - y.low)
    above = known.above * torch.hypot(x.high - x.mean, y.high - y.mean)
    return Moments(mean, known.variance * (x.variance + y.variance), mean - below, mean + above)


def _product(node: fx.Node, x: Any, y: Any) -> Moments | None:
    if not (isinstance(x, Moments) and isinstance(y, Moments)):
        return _with_constant(operator.mul, x, y)
    corners = torch.stack(torch.broadcast_tensors(*(a * b for a in (x.low, x.high) for b in (y.low, y.high))))
    variance = x.variance * y.variance + x.variance * y.mean**2 + y.variance * x.mean**2
    return Moments(x.mean * y.mean, variance, corners.amin(0), corners.amax(0))


def _extreme(node: fx.Node, x: Any, y: Any) -> Moments:
    """The larger of two tensors; the smaller one is the larger of the negatives, negated."""
    x, y = (value if isinstance(value, Moments) else _constant(value.float()) for value in (x, y))
    smaller = node.target is torch.ops.aten.minimum.default
    sign, extreme = (-1, torch.minimum) if smaller else (1, torch.maximum)
    found = larger_gaussian(Gaussian(sign * x.mean, x.variance), Gaussian(sign * y.mean, y.variance))
    return Moments(sign * found.mean, found.variance, extreme(x.low, y.low), extreme(x.high, y.high))


def _normalised(node: fx.Node, x: Any, *args: Any) -> Moments | None:
    """Layer, group and instance normalisation: each group of values has mean 0 and variance 1, then weight and bias."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    size, channels_last = x.mean.shape, node.target is torch.ops.aten.layer_norm.default
    weight, bias = (tensors + [torch.ones(()), torch.zeros(())][len(tensors) :])[:2]
    if not channels_last and weight.dim():
        weight, bias = (per_channel(t, len(size)) if t.dim() else t for t in (weight, bias))
    return gaussian(bias.expand(size).float(), weight.square().expand(size).float())


def _share(node: fx.Node, x: Any, axis: int, *_: Any) -> Moments:
    """A softmax: shares of 1, on average equal ones."""
    mean = torch.full_like(x.mean, 1 / x.mean.shape[axis])
    return Moments(mean, mean.square(), torch.zeros_like(mean), torch.ones_like(mean))


_RULES = {
    "each": _each,
    "concat": _concat,
    "sum": _sum,
    "product": _product,
    "extreme": _extreme,
    "normalised": _normalised,
    "share": _share,
}


def _with_constant(operation: Callable, x: Any, y: Any) -> Moments | None:
    moments, constant = (x, y) if isinstance(x, Moments) else (y, x)
    if not isinstance(constant, int | float | Tensor):
        return None
    mean, *ends = (
        operation(t, y) if moments is x else operation(x, t) for t in (moments.mean, moments.low, moments.high)
    )
    variance = (moments.variance * constant**2 if operation is operator.mul else moments.variance).expand_as(mean)
    return Moments(mean, variance, torch.minimum(*ends), torch.maximum(*ends))


def _flat(value: Any) -> list:
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _flat(item)]
    return _flat(list(value.values())) if isinstance(value, dict) else [value]


def _compact(t: Tensor) -> Tensor:
    """One value of every axis along which an expanded view repeats itself."""
    for axis, stride in enumerate(t.stride()):
        if stride == 0 and t.shape[axis] > 1:
            t = t.narrow(axis, 0, 1)
    return t


def _compactly(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    return function(_compact(t)).expand_as(t)


def _moments_of(x: Moments, function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    mean, variance = _compact(x.mean), _compact(x.variance)
    return tuple(t.expand_as(x.mean) for t in function(*torch.broadcast_tensors(mean, variance)))
