"""How each operator is written in canonical form: rules for the translator, by the operator's name.

A rule gets the translator, the exported node and its arguments, constants among them as values. It returns what the
node becomes, or None to leave it as it is. What changes shape alone becomes reshape; parts become slices; averages over all
positions become mean.dim; layers become modules.
"""

import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from utils.graph.layers import make_layer
from utils.graph.translate import Size, Translator, is_constant, is_free, size_of

aten = torch.ops.aten
Rule = Callable[..., Any]


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
    if not (isinstance(x, fx.Node) and isinstance(weight, Tensor) and is_constant(bias)) or len(size_of(x)) != dims + 2:
        return None
    stride, dilation, output_padding = (_each(value, dims) for value in (stride, dilation, output_padding))
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        before, after = [side // 2 for side in total], [side - side // 2 for side in total]
        if before != after:
            x = _pad(t, x, before, after)
            before = [0] * dims
        padding = before
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    options = {"stride": stride, "padding": _each(padding, dims), "dilation": dilation, "groups": groups}
    options |= {"output_padding": output_padding} if transposed else {}
    return t.layer(make_layer(kind, weight, bias, **options), x, t.layer_name(weight), t.size())


def _linear(t: Translator, node: fx.Node, x, weight, bias=None) -> Any:
    if not (isinstance(x, fx.Node) and isinstance(weight, Tensor) and weight.dim() == 2 and is_constant(bias)):
        return None
    return t.layer(make_layer(nn.Linear, weight, bias), x, t.layer_name(weight))


def _product(t: Translator, node: fx.Node, x, weight) -> Any:
    """A product with a constant matrix is a linear layer."""
    if not (isinstance(x, fx.Node) and isinstance(weight, Tensor) and weight.dim() == 2 and len(size_of(x)) > 1):
        return None
    return t.layer(make_layer(nn.Linear, weight.T, None), x, t.layer_name(weight))


def _einsum(t: Translator, node: fx.Node, equation: str, operands: Sequence, *_, **__) -> Any:
    """A product of the last axis with a constant matrix is a linear layer."""
    found = re.fullmatch(r"(\w+)(\w),(\w)(\w)->(\w+)(\w)", equation.replace(" ", "").replace("...", "_"))
    if len(operands) != 2 or not found or not isinstance(operands[1], Tensor):
        return None
    axes, summed, first, second, kept, made = found.groups()
    if axes != kept or summed in axes or {first, second} != {summed, made} or not isinstance(operands[0], fx.Node):
        return None
    weight = operands[1] if second == summed else operands[1].T
    return t.layer(make_layer(nn.Linear, weight, None), operands[0], t.layer_name(operands[1]))


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


# ----------------------------------------------------------------------------- what does nothing, shapes, parts


def _same(t: Translator, node: fx.Node, x, *_, **__) -> Any:
    """Nothing is done in evaluation; unless the data type changes."""
    source = node.args[0]
    return x if source.meta["val"].dtype == node.meta["val"].dtype else None


def _same_first(t: Translator, node: fx.Node, x, *_, **__) -> Any:
    return (x, None)


def _dropout(t: Translator, node: fx.Node, x, p, train) -> Any:
    return None if train else x


def _reshape(t: Translator, node: fx.Node, x, *_, **__) -> Any:
    return t.reshape(x, t.size())


def _permute(t: Translator, node: fx.Node, x, *args, **kwargs) -> Any:
    dims = len(size_of(x))
    sides = [2, 3, 5, 7, 11, 13, 17, 19][:dims]
    moved = node.target(torch.empty(sides, device="meta"), *args, **kwargs).shape
    order = [sides.index(side) for side in moved]
    return x if order == list(range(dims)) else t.emit(aten.permute.default, (x, order))


def _slice(t: Translator, node: fx.Node, x, dim=0, start=None, end=None, step=1) -> Any:
    axis, size = dim % len(size_of(x)), size_of(x)
    if t.size() == size and step == 1:
        return x
    if is_free(size[axis]) or not is_constant((start, end)):
        return None
    return t.slice(x, axis, *slice(start, end, step).indices(size[axis]))


def _slice_scatter(t: Translator, node: fx.Node, x, source, dim=0, start=None, end=None, step=1) -> Any:
    """A slice written in place: what is before it, the new values, what is behind it."""
    axis, size = dim % len(size_of(x)), size_of(x)
    if not is_constant((start, end)) or step != 1 or not isinstance(x, fx.Node):
        return None
    if size_of(source)[axis] == size[axis]:
        return source
    if is_free(size[axis]):
        return None
    start, end, _ = slice(start, end).indices(size[axis])
    parts = [t.slice(x, axis, 0, start)] if start else []
    parts += [source] + ([t.slice(x, axis, end, size[axis])] if end < size[axis] else [])
    return _joined(t, parts, axis)


def _copy(t: Translator, node: fx.Node, x, source, *_) -> Any:
    """What is copied over a tensor takes its place."""
    return source if isinstance(source, fx.Node) and size_of(source) == t.size() else None


def _narrow(t: Translator, node: fx.Node, x, dim, start, length) -> Any:
    return _slice(t, node, x, dim, start, start + length) if is_constant((start, length)) else None


def _select(t: Translator, node: fx.Node, x, dim, index) -> Any:
    axis, size = dim % len(size_of(x)), size_of(x)
    if is_free(size[axis]) or not isinstance(index, int):
        return None
    index %= size[axis]
    return t.reshape(t.slice(x, axis, index, index + 1), t.size())


def _parts(t: Translator, node: fx.Node, x, *args, **kwargs) -> Any:
    """chunk, split and their kin: a slice for each part."""
    name = node.target._schema.name.partition("::")[2]
    place = 0 if name == "unbind" else 1
    axis = (args[place] if len(args) > place else kwargs.get("dim", 0)) % len(size_of(x))
    if is_free(size_of(x)[axis]):
        return None
    parts, start = [], 0
    for value in node.meta["val"]:
        stop = start + (1 if name == "unbind" else value.shape[axis])
        part = t.slice(x, axis, start, stop)
        parts.append(t.reshape(part, t.sizes(value)) if name == "unbind" else part)
        start = stop
    return tuple(parts)


def _expand(t: Translator, node: fx.Node, x, *_, **__) -> Any:
    before, after = size_of(x), t.size()
    before = (1,) * (len(after) - len(before)) + before
    if before == after:
        return t.reshape(x, after)
    size = [-1 if a == b else b for a, b in zip(before, after, strict=True)]
    if any(is_free(side) for side in size):
        return None
    return t.emit(aten.expand.default, (t.reshape(x, before), size))


def _cat(t: Translator, node: fx.Node, parts, dim=0) -> Any:
    parts = [part for part in parts if 0 not in size_of(part)]
    return parts[0] if len(parts) == 1 else t.emit(aten.cat.default, (parts, dim % len(t.size())))


def _stack(t: Translator, node: fx.Node, parts, dim=0) -> Any:
    axis, size = dim % len(t.size()), t.size()
    thin = (*size[:axis], 1, *size[axis + 1 :])
    if not all(isinstance(part, fx.Node) for part in parts):
        return None
    return t.emit(aten.cat.default, ([t.reshape(part, thin) for part in parts], axis))


def _roll(t: Translator, node: fx.Node, x, shifts, dims=()) -> Any:
    if not dims:
        return None
    for shift, dim in zip(_each(shifts, len(dims)), dims, strict=True):
        axis, side = dim % len(size_of(x)), size_of(x)[dim]
        if is_free(side):
            return None
        x = (
            _joined(t, [t.slice(x, axis, (-shift) % side, side), t.slice(x, axis, 0, (-shift) % side)], axis)
            if shift % side
            else x
        )
    return x


def _joined(t: Translator, parts: list[fx.Node], axis: int) -> fx.Node:
    size = list(size_of(parts[0]))
    size[axis] = sum(size_of(part)[axis] for part in parts)
    return t.emit(aten.cat.default, (parts, axis), size=size)


# ------------------------------------------------------------------------------------------ padding


def _pad_rule(mode: str | None) -> Rule:
    def rule(t: Translator, node: fx.Node, x, amounts, *rest, **kwargs) -> Any:
        own, value = mode, 0.0
        if mode is None:  # aten.pad: the mode, then the value
            own, value, *_ = [*rest, *(kwargs.get("mode", "constant"), kwargs.get("value"))[len(rest) :]]
        elif mode == "constant":
            value = rest[0] if rest else kwargs.get("value", 0.0)
        before, after = list(amounts[0::2])[::-1], list(amounts[1::2])[::-1]  # torch counts from the last axis
        if own == "circular":
            return _wrap(t, x, before, after)
        return _pad(t, x, before, after, own, value or 0.0)

    return rule


def _pad(
    t: Translator, x: fx.Node, before: list[int], after: list[int], mode: str = "constant", value: float = 0.0
) -> fx.Node:
    """Pad the last axes; a negative amount cuts."""
    size = list(size_of(x))
    first = len(size) - len(before)
    for i, (low, high) in enumerate(zip(before, after, strict=True)):
        if low < 0 or high < 0:
            x = t.slice(x, first + i, max(-low, 0), size[first + i] - max(-high, 0))
    before, after = [max(side, 0) for side in before], [max(side, 0) for side in after]
    if not any(before + after):
        return x
    size = list(size_of(x))
    for i, (low, high) in enumerate(zip(before, after, strict=True)):
        size[first + i] = size[first + i] + low + high
    amounts = list(itertools.chain.from_iterable(zip(before[::-1], after[::-1], strict=True)))
    return t.emit(aten.pad.default, (x, amounts, mode, value if mode == "constant" else None), size=size)


def _wrap(t: Translator, x: fx.Node, before: list[int], after: list[int]) -> fx.Node:
    """Circular padding: the far end's slices before and after."""
    first = len(size_of(x)) - len(before)
    for i, (low, high) in enumerate(zip(before, after, strict=True)):
        side = size_of(x)[first + i]
        parts = [t.slice(x, first + i, side - low, side)] if low else []
        parts += [x] + ([t.slice(x, first + i, 0, high)] if high else [])
        x = _joined(t, parts, first + i) if len(parts) > 1 else x
    return x


# ------------------------------------------------------------------------------------------ pooling


def mean(t: Translator, x: fx.Node, axes: Sequence[int]) -> fx.Node:
    """The mean over axes, which are kept with size 1; of a mean, over both's; over reshaped axes, over the original ones."""
    if x.target is aten.reshape.default:
        groups = _axis_groups(size_of(x.args[0]), size_of(x))
        if groups and all(groups.get(axis) for axis in axes):
            x, axes = x.args[0], sorted(itertools.chain.from_iterable(groups[axis] for axis in axes))
    if x.target is aten.mean.dim:
        x, axes = x.args[0], sorted({*x.args[1], *axes})
    size = [1 if axis in axes else side for axis, side in enumerate(size_of(x))]
    if size == list(size_of(x)):
        return x
    return t.emit(aten.mean.dim, (x, list(axes), True), size=size)


def _axis_groups(before: Size, after: Size) -> dict[int, list[int]]:
    """For each axis after a reshape the axes before it that it holds entirely; {} where they do not match up."""
    groups, i = {}, 0
    for j, side in enumerate(after):
        own, product = [], 1
        while i < len(before) and (product != side or before[i] == 1) and (not own or product * before[i] <= side):
            product = product * before[i]
            own.append(i)
            i += 1
            if is_free(side) or is_free(product):
                break
        if product != side:
            return {}
        groups[j] = own
    return groups if i == len(before) else {}


def _mean(t: Translator, node: fx.Node, x, dim=None, keepdim=False, **_) -> Any:
    axes = _axes(x, dim)
    return None if 0 in axes else t.reshape(mean(t, x, axes), t.size())


def _sum(t: Translator, node: fx.Node, x, dim=None, keepdim=False, **_) -> Any:
    """A sum is the mean times the number of positions."""
    axes = _axes(x, dim)
    count = math.prod(side for axis, side in enumerate(size_of(x)) if axis in axes)
    if 0 in axes or not node.meta["val"].dtype.is_floating_point or not isinstance(count, int):
        return None
    averaged = t.reshape(mean(t, x, axes), t.size())
    return t.emit(aten.mul.Tensor, (averaged, float(count)))


def _axes(x: fx.Node, dim: Any) -> list[int]:
    dims = len(size_of(x))
    every = dim is None or dim == []
    return list(range(dims)) if every else sorted(axis % dims for axis in ([dim] if isinstance(dim, int) else dim))


def _adaptive_average(dims: int) -> Rule:
    def rule(t: Translator, node: fx.Node, x, output) -> Any:
        sides, wanted = size_of(x)[-dims:], t.size()[-dims:]
        if sides == wanted:
            return x
        if set(wanted) == {1}:
            return mean(t, x, list(range(len(size_of(x)) - dims, len(size_of(x)))))
        if all(side % parts == 0 for side, parts in zip(sides, wanted, strict=True)):
            kernel = [side // parts for side, parts in zip(sides, wanted, strict=True)]
            return t.emit(getattr(aten, f"avg_pool{dims}d").default, (x, kernel, kernel))
        return None

    return rule


def _average(dims: int) -> Rule:
    def rule(
        t: Translator, node: fx.Node, x, kernel, stride=(), padding=0, ceil_mode=False, include=True, divisor=None
    ) -> Any:
        kernel, padding = _each(kernel, dims), _each(padding, dims)
        if kernel == list(size_of(x)[-dims:]) and not any(padding) and divisor is None:
            return mean(t, x, list(range(len(size_of(x)) - dims, len(size_of(x)))))
        stride = _each(stride, dims) if stride not in ((), [], None) else kernel
        rest = (padding, ceil_mode, include, *([divisor] if dims > 1 and divisor is not None else []))
        return t.emit(node.target, (x, kernel, stride, *rest))

    return rule


def _maximum(dims: int) -> Rule:
    def rule(t: Translator, node: fx.Node, x, kernel, stride=(), padding=0, dilation=1, ceil_mode=False) -> Any:
        stride = stride if stride not in ((), [], None) else kernel
        args = (x, *(_each(value, dims) for value in (kernel, stride, padding, dilation)), ceil_mode)
        if not isinstance(node.meta["val"], tuple | list):
            return t.emit(node.target, args)
        size = t.sizes(node.meta["val"][0])
        if not _reads_second(node):
            return t.emit(getattr(aten, f"max_pool{dims}d").default, args, size=size), None
        return _items(t, node, args)

    return rule


def _adaptive_maximum(dims: int) -> Rule:
    def rule(t: Translator, node: fx.Node, x, output) -> Any:
        size = t.sizes(node.meta["val"][0])
        if _reads_second(node):
            return _items(t, node, (x, output))
        for axis in range(len(size) - dims, len(size)):
            x = _windowed_maximum(t, x, axis, size[axis])
        return x, None

    return rule


def _windowed_maximum(t: Translator, x: fx.Node, axis: int, count: int) -> fx.Node:
    """The maxima of so many windows along an axis, as adaptive pooling lays them."""
    side = size_of(x)[axis]
    thin = tuple(1 if i == axis else own for i, own in enumerate(size_of(x)))
    windows = [t.slice(x, axis, i * side // count, -(-(i + 1) * side // count)) for i in range(count)]
    maxima = [t.emit(aten.amax.default, (window, [axis], True), size=thin) for window in windows]
    return maxima[0] if count == 1 else _joined(t, maxima, axis)


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


def _max(t: Translator, node: fx.Node, x, dim=None, keepdim=False) -> Any:
    if isinstance(dim, fx.Node | Tensor):
        return _of_two("maximum")(t, node, x, dim)
    return _max_dim(t, node, x, dim, keepdim)


def _min(t: Translator, node: fx.Node, x, dim=None, keepdim=False) -> Any:
    return _of_two("minimum")(t, node, x, dim) if isinstance(dim, fx.Node | Tensor) else None


def _max_dim(t: Translator, node: fx.Node, x, dim=None, keepdim=False) -> Any:
    if dim is None or not isinstance(node.meta["val"], tuple | list) or _reads_second(node):
        return None
    axis = dim % len(size_of(x))
    thin = tuple(1 if i == axis else side for i, side in enumerate(size_of(x)))
    return t.reshape(t.emit(aten.amax.default, (x, [axis], True), size=thin), t.sizes(node.meta["val"][0])), None


def _amax(t: Translator, node: fx.Node, x, dim=(), keepdim=False) -> Any:
    axes = _axes(x, list(dim) or None)
    if 0 in axes:
        return None
    thin = tuple(1 if i in axes else side for i, side in enumerate(size_of(x)))
    return t.reshape(t.emit(aten.amax.default, (x, axes, True), size=thin), t.size())


def _items(t: Translator, node: fx.Node, args: Sequence) -> tuple[fx.Node, ...]:
    """An operator of several results, and each of them."""
    whole = t.emit(node.target, args, size=())
    return tuple(t.emit(operator.getitem, (whole, i), size=t.sizes(v)) for i, v in enumerate(node.meta["val"]))


def _reads_second(node: fx.Node) -> bool:
    return any(user.args[1] == 1 and user.users for user in node.users)


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


def _unexpanded(x: Any, other: Any, size: Size) -> Any:
    """An operand before it was expanded, where arithmetic expands it by itself."""
    if not (isinstance(x, fx.Node) and x.target is aten.expand.default and isinstance(other, fx.Node)):
        return x
    return x.args[0] if size_of(other) == size and len(size_of(x.args[0])) == len(size) else x


def _reversed_subtraction(t: Translator, node: fx.Node, x, y, alpha=1) -> Any:
    return t.emit(aten.sub.Tensor, (y, x)) if alpha == 1 and isinstance(y, fx.Node) else None


def _each(value: int | Sequence[int], dims: int) -> list[int]:
    if isinstance(value, int):
        return [value] * dims
    return list(value) * dims if len(value) == 1 else list(value)


RULES: dict[str, Rule] = {
    **{f"conv{n}d": _convolution(n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _convolution(n, transposed=True) for n in (1, 2, 3)},
    "convolution": _any_convolution,
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm"), _product),
    "addmm": _addmm,
    "einsum": _einsum,
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm"), _batch_norm),
    **dict.fromkeys(
        ("clone", "contiguous", "alias", "detach", "detach_", "lift_fresh", "lift_fresh_copy", "to", "_to_copy"), _same
    ),
    "type_as": _same,
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), _dropout),
    **dict.fromkeys(("dropout_", "feature_dropout_", "alpha_dropout_", "feature_alpha_dropout_"), _dropout),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(("view_as", "reshape_as", "ravel", "_reshape_alias"), _reshape),
    **dict.fromkeys(
        ("permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "numpy_T", "mT"), _permute
    ),
    "slice": _slice,
    "narrow": _narrow,
    "slice_scatter": _slice_scatter,
    "copy": _copy,
    "select": _select,
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "unbind", "tensor_split"), _parts),
    **dict.fromkeys(("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes"), _parts),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "stack": _stack,
    "roll": _roll,
    "pad": _pad_rule(None),
    "constant_pad_nd": _pad_rule("constant"),
    **{f"reflection_pad{n}d": _pad_rule("reflect") for n in (1, 2, 3)},
    **{f"replication_pad{n}d": _pad_rule("replicate") for n in (1, 2, 3)},
    "mean": _mean,
    "sum": _sum,
    "amax": _amax,
    "max": _max,
    "min": _min,
    "glu": _glu,
    **{f"adaptive_avg_pool{n}d": _adaptive_average(n) for n in (1, 2, 3)},
    **{f"_adaptive_avg_pool{n}d": _adaptive_average(n) for n in (2, 3)},
    **{f"avg_pool{n}d": _average(n) for n in (1, 2, 3)},
    **{f"max_pool{n}d": _maximum(n) for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": _maximum(n) for n in (1, 2, 3)},
    **{f"adaptive_max_pool{n}d": _adaptive_maximum(n) for n in (1, 2, 3)},
    **dict.fromkeys(("add",), _arithmetic("add")),
    **dict.fromkeys(("sub", "subtract"), _arithmetic("sub")),
    **dict.fromkeys(("mul", "multiply"), _arithmetic("mul")),
    **dict.fromkeys(("div", "divide", "true_divide"), _arithmetic("div")),
    "rsub": _reversed_subtraction,
}
