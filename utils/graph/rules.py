"""How each operator is written in canonical form: rules for the translator, by the operator's name.

A rule gets the translator, the exported node and its arguments, constants among them as values. It returns what the
node becomes, or None to leave it as it is. What changes shape alone becomes reshape; parts become slices; averages over all
positions become mean.dim; layers become modules.
"""

from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn

from utils.graph.dynamic_convolution import convolve_each_image
from utils.graph.einsum import einsum
from utils.graph.index_rules import INDEX_RULES
from utils.graph.layers import make_layer
from utils.graph.pooling_rules import POOLING_RULES, extreme_over_axis
from utils.graph.shape_rules import SHAPE_RULES, Rule, each, pad_axes
from utils.graph.translate import Size, Translator, is_constant, is_free, size_of

aten = torch.ops.aten


# ------------------------------------------------------------------------------------------- layers


def _convolution(dims: int, transposed: bool = False) -> Rule:
    def rule(t: Translator, node: fx.Node, x, weight, bias=None, stride=1, padding=0, *rest) -> Any:
        if transposed:
            output_padding, groups, dilation = [*rest, *(0, 1, 1)[len(rest) :]]
        else:
            (dilation, groups), output_padding = [*rest, *(1, 1)[len(rest) :]], 0
        return _layer(t, x, weight, bias, dims, stride, padding, dilation, groups, transposed, output_padding)

    return rule


def _any_convolution(
    t: Translator, node: fx.Node, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
) -> Any:
    return _layer(t, x, weight, bias, len(stride), stride, padding, dilation, groups, transposed, output_padding)


def _layer(t, x, weight, bias, dims, stride, padding, dilation, groups, transposed, output_padding) -> Any:
    if isinstance(weight, fx.Node) and not transposed and len(size_of(x)) == dims + 2:
        return convolve_each_image(t, x, weight, bias, stride, padding, dilation, groups)
    if not (isinstance(x, fx.Node) and isinstance(weight, Tensor) and is_constant(bias)) or len(size_of(x)) != dims + 2:
        return None
    stride, dilation, output_padding = (each(value, dims) for value in (stride, dilation, output_padding))
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        before, after = [side // 2 for side in total], [side - side // 2 for side in total]
        if before != after:
            x = pad_axes(t, x, before, after)
            before = [0] * dims
        padding = before
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    options = {"stride": stride, "padding": each(padding, dims), "dilation": dilation, "groups": groups}
    options |= {"output_padding": output_padding} if transposed else {}
    return t.layer(make_layer(kind, weight, bias, **options), x, t.layer_name(weight), t.size())


def _linear(t: Translator, node: fx.Node, x, weight, bias=None) -> Any:
    if not (isinstance(x, fx.Node) and isinstance(weight, Tensor) and weight.dim() == 2 and is_constant(bias)):
        return None
    return t.layer(make_layer(nn.Linear, weight, bias), x, t.layer_name(weight))


def _product(t: Translator, node: fx.Node, x, weight) -> Any:
    """A product with a constant matrix is a linear layer, one from the left of [N, C, L] a convolution of width 1."""
    x, weight = _one_for_all(t, x), _one_for_all(t, weight)
    if isinstance(x, Tensor) and x.dim() == 2 and isinstance(weight, fx.Node) and len(size_of(weight)) == 3:
        options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        return t.layer(make_layer(nn.Conv1d, x[:, :, None], None, **options), weight, t.layer_name(x))
    if not (isinstance(x, fx.Node) and isinstance(weight, Tensor) and weight.dim() == 2 and len(size_of(x)) > 1):
        return None
    return t.layer(make_layer(nn.Linear, weight.T, None), x, t.layer_name(weight))


def _one_for_all(t: Translator, x: Any) -> Any:
    """A constant matrix that was expanded to one for every image, before it was."""
    if isinstance(x, Tensor) and x.dim() == 3 and len(x) == (t.batch or 1) and bool((x == x[:1]).all()):
        return x[0]
    if not (isinstance(x, fx.Node) and x.target is aten.expand.default and x.args[0].op == "get_attr"):
        return x
    tensor = getattr(t.root, x.args[0].target)
    return tensor[0] if tensor.dim() == 3 and len(tensor) == 1 else x


def _addmm(t: Translator, node: fx.Node, bias, x, weight, *, beta=1, alpha=1) -> Any:
    usable = isinstance(x, fx.Node) and isinstance(weight, Tensor) and isinstance(bias, Tensor) and bias.dim() == 1
    if not usable or (beta, alpha) != (1, 1):
        return None
    return t.layer(make_layer(nn.Linear, weight.T, bias), x, t.layer_name(weight))


def _batch_norm(t: Translator, node: fx.Node, x, weight, bias, mean, variance, *rest) -> Any:
    """aten.batch_norm (training, momentum, eps, cudnn) and its decomposed form (momentum, eps)."""
    several = isinstance(node.meta["val"], tuple | list)
    training, eps = (False, rest[-1]) if several and isinstance(rest[0], float) else (rest[0], rest[2])
    if training or mean is None or not isinstance(x, fx.Node) or not is_constant((weight, bias, mean, variance)):
        return None
    dims = max(len(size_of(x)) - 2, 1)
    if dims > 3:
        return None
    norm = batch_norm_module(dims, weight, bias, mean, variance, eps)
    name = t.layer_name(mean)
    size = t.sizes(node.meta["val"][0] if several else node.meta["val"])
    made = t.layer(norm, x, name, size)
    return (made, None, None) if several else made


def batch_norm_module(dims: int, weight, bias, mean, variance, eps: float) -> nn.Module:
    """A BatchNorm of so many spatial dimensions, with these parameters [C]; None where it has none."""
    norm = getattr(nn, f"BatchNorm{dims}d")(len(mean), eps, affine=weight is not None or bias is not None)
    norm.running_mean, norm.running_var = mean.detach().clone(), variance.detach().clone()
    if norm.affine:
        norm.weight.data = torch.ones_like(mean) if weight is None else weight.detach().clone()
        norm.bias.data = torch.zeros_like(mean) if bias is None else bias.detach().clone()
    return norm


# --------------------------------------------------------------------------------------- arithmetic


def _arithmetic(name: str) -> Rule:
    """add, sub, mul, div under any of their names, of tensors and numbers."""
    target = getattr(aten, name).Tensor

    def rule(t: Translator, node: fx.Node, x, y, *, alpha=1, rounding_mode=None) -> Any:
        if rounding_mode is not None:
            return None
        if alpha != 1:
            y = alpha * y if is_constant(y) else t.emit(aten.mul.Tensor, (y, alpha), size=size_of(y))
        if name in ("add", "mul") and isinstance(x, Tensor | int | float):
            x, y = y, x
        return t.emit(target, (_unexpanded(x, y, t.size()), _unexpanded(y, x, t.size())))

    return rule


def _multiplied(t: Translator, node: fx.Node, x, y) -> Any:
    """x * rsqrt(v), x * (c / v) and the like are quotients: what is divided by is never rounded, lest small values be 0."""
    for value, factor in ((x, y), (y, x)):
        if isinstance(value, fx.Node) and isinstance(factor, fx.Node) and (found := _inverse(t, factor)):
            divisor, constants = found
            value = _unexpanded(value, divisor, t.size())
            quotient = t.emit(aten.div.Tensor, (value, divisor), size=_broadcast(value, divisor))
            for constant in constants:
                quotient = t.emit(aten.mul.Tensor, (quotient, constant), size=t.size())
            return quotient
    return _arithmetic("mul")(t, node, x, y)


def _inverse(t: Translator, node: fx.Node) -> tuple[fx.Node, list] | None:
    """What a value is one over, and the constants that it is times; None if it is neither."""
    source, *others = node.args or (None,)
    if node.target is aten.rsqrt.default:
        return t.emit(aten.sqrt.default, (source,), size=size_of(node)), []
    if node.target is aten.reciprocal.default:
        return source, []
    if node.target is aten.pow.Tensor_Scalar and others[0] < 0:
        return t.emit(node.target, (source, -others[0]), size=size_of(node)), []
    if node.target is aten.div.Tensor and _fixed(source):
        return others[0], [] if source == 1 else [source]
    if node.target is aten.mul.Tensor and _fixed(others[0]):
        found = _inverse(t, source)
        return found and (found[0], found[1] if others[0] == 1 else [*found[1], others[0]])
    return None


def _broadcast(x: fx.Node, y: fx.Node) -> Size:
    """The size of an operator's result of two tensors."""
    pairs = zip_longest(reversed(size_of(x)), reversed(size_of(y)), fillvalue=1)
    return tuple(b if not is_free(a) and a == 1 else a for a, b in pairs)[::-1]


def _fixed(operand: Any) -> bool:
    return not isinstance(operand, fx.Node) or operand.op == "get_attr"


def _unexpanded(x: Any, other: Any, size: Size) -> Any:
    """An operand before it was expanded, where arithmetic expands it by itself."""
    if not (isinstance(x, fx.Node) and x.target is aten.expand.default and isinstance(other, fx.Node)):
        return x
    return x.args[0] if size_of(other) == size and len(size_of(x.args[0])) == len(size) else x


def _reversed_subtraction(t: Translator, node: fx.Node, x, y, alpha=1) -> Any:
    return t.emit(aten.sub.Tensor, (y, x)) if alpha == 1 and isinstance(y, fx.Node) else None


def _glu(t: Translator, node: fx.Node, x, dim=-1) -> Any:
    """The first half times the sigmoid of the second."""
    axis = dim % len(size_of(x))
    side = size_of(x)[axis]
    if isinstance(side, torch.SymInt):
        return None
    values, gate = t.slice(x, axis, 0, side // 2), t.slice(x, axis, side // 2, side)
    return t.emit(aten.mul.Tensor, (values, t.emit(aten.sigmoid.default, (gate,))))


def _of_two(name: str) -> Rule:
    """The larger or smaller of two tensors."""

    def rule(t: Translator, node: fx.Node, x, y) -> Any:
        if not node.meta["val"].dtype.is_floating_point:
            return None
        return t.emit(getattr(aten, name).default, (x, y))

    return rule


def _either(binary: str, reduction: str) -> Rule:
    """max and min: of two tensors, or over an axis."""

    def rule(t: Translator, node: fx.Node, x, dim=None, keepdim=False) -> Any:
        if isinstance(dim, fx.Node | Tensor):
            return _of_two(binary)(t, node, x, dim)
        return extreme_over_axis(t, node, getattr(aten, reduction).default, x, dim)

    return rule


def _fake_quantize(t: Translator, node: fx.Node, x, scale, zero, *rest) -> Any:
    """Steps of networks that were trained with quantization, in whose graph they are functions as others are."""
    *enabled, low, high = rest
    several = isinstance(node.meta["val"], tuple | list)
    if not is_constant((scale, zero, enabled)) or not isinstance(x, fx.Node):
        return None
    if not all(bool(flag) for flag in enabled):
        return (x, None) if several else x
    size, scale, zero = size_of(x), float(scale), int(zero)
    steps = t.emit(aten.round.default, (t.emit(aten.div.Tensor, (x, scale), size=size),), size=size)
    steps = t.emit(aten.clamp.default, (steps, low - zero, high - zero), size=size)
    made = t.emit(aten.mul.Tensor, (steps, scale), size=size)
    return (made, None) if several else made


def _rrelu(t: Translator, node: fx.Node, x, *args, **_) -> Any:
    """In evaluation the slope is the middle of its range; the functional form gets, and returns, a noise besides."""
    lower, upper = [value for value in args if isinstance(value, float)][:2] or (1 / 8, 1 / 3)
    several = isinstance(node.meta["val"], tuple | list)
    size = t.sizes(node.meta["val"][0] if several else node.meta["val"])
    made = t.emit(aten.leaky_relu.default, (x, (lower + upper) / 2), size=size)
    return (made, None) if several else made


RULES: dict[str, Rule] = {
    **SHAPE_RULES,
    **POOLING_RULES,
    **INDEX_RULES,
    **{f"conv{n}d": _convolution(n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _convolution(n, transposed=True) for n in (1, 2, 3)},
    "convolution": _any_convolution,
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), _product),
    "addmm": _addmm,
    "einsum": einsum,
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm"), _batch_norm),
    "max": _either("maximum", "amax"),
    "min": _either("minimum", "amin"),
    **dict.fromkeys(("rrelu", "rrelu_with_noise", "rrelu_with_noise_functional"), _rrelu),
    "glu": _glu,
    **{
        f"{start}fake_quantize_per_tensor_affine{end}": _fake_quantize
        for start, end in (("", ""), ("", "_cachemask"), ("_", "_cachemask_tensor_qparams"))
    },
    **dict.fromkeys(("add",), _arithmetic("add")),
    **dict.fromkeys(("sub", "subtract"), _arithmetic("sub")),
    **dict.fromkeys(("mul", "multiply"), _multiplied),
    **dict.fromkeys(("div", "divide", "true_divide"), _arithmetic("div")),
    "rsub": _reversed_subtraction,
}
