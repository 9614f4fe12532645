"""How averages and maxima are written in canonical form: mean.dim, amax, or a pooling with all its numbers."""

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from utils.graph.shape_rules import Rule, each, joined
from utils.graph.translate import Size, Translator, is_free, size_of

aten = torch.ops.aten


def mean(t: Translator, x: fx.Node, axes: Sequence[int]) -> fx.Node:
    """The mean over axes, which are kept with size 1; of a mean, over both's; over reshaped axes, over the original ones."""
    kept = [1 if axis in axes else side for axis, side in enumerate(size_of(x))]
    if x.target is aten.reshape.default:
        groups = _axis_groups(size_of(x.args[0]), size_of(x))
        if groups and all(groups.get(axis) for axis in axes):
            x, axes = x.args[0], sorted(itertools.chain.from_iterable(groups[axis] for axis in axes))
    if x.target is aten.mean.dim:
        x, axes = x.args[0], sorted({*x.args[1], *axes})
    size = [1 if axis in axes else side for axis, side in enumerate(size_of(x))]
    averaged = x if size == list(size_of(x)) else t.emit(aten.mean.dim, (x, list(axes), True), size=size)
    return t.reshape(averaged, kept)


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
    if len(axes) == 1 and (parts := _stacked(x, axes[0])):
        return t.emit(aten.div.Tensor, (_added(t, parts), len(parts)))
    return None if 0 in axes else t.reshape(mean(t, x, axes), t.size())


def _sum(t: Translator, node: fx.Node, x, dim=None, keepdim=False, **_) -> Any:
    """A sum is the mean times the number of positions."""
    axes = _axes(x, dim)
    if len(axes) == 1 and (parts := _stacked(x, axes[0])):
        return _added(t, parts)
    count = math.prod(side for axis, side in enumerate(size_of(x)) if axis in axes)
    if 0 in axes or not node.meta["val"].dtype.is_floating_point or not isinstance(count, int):
        return None
    averaged = t.reshape(mean(t, x, axes), t.size())
    return t.emit(aten.mul.Tensor, (averaged, float(count)))


def _stacked(x: fx.Node, axis: int) -> list[fx.Node]:
    """The tensors that were put one behind the other along an axis, each with a side of 1 there; none where it is otherwise."""
    if x.target is not aten.cat.default or x.args[1] != axis:
        return []
    return list(x.args[0]) if all(size_of(part)[axis] == 1 for part in x.args[0]) else []


def _added(t: Translator, parts: list[fx.Node]) -> fx.Node:
    """Their sum, in the size of the value that is being written."""
    total, *others = (t.reshape(part, t.size()) for part in parts)
    for part in others:
        total = t.emit(aten.add.Tensor, (total, part))
    return total


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
        for axis, count in enumerate(wanted, start=len(size_of(x)) - dims):
            x = _windowed(t, x, axis, count, aten.mean.dim)
        return x

    return rule


def _average(dims: int) -> Rule:
    def rule(
        t: Translator, node: fx.Node, x, kernel, stride=(), padding=0, ceil_mode=False, include=True, divisor=None
    ) -> Any:
        kernel, padding = each(kernel, dims), each(padding, dims)
        if kernel == list(size_of(x)[-dims:]) and not any(padding) and divisor is None:
            return mean(t, x, list(range(len(size_of(x)) - dims, len(size_of(x)))))
        stride = each(stride, dims) if stride not in ((), [], None) else kernel
        rest = (padding, ceil_mode, include, *([divisor] if dims > 1 and divisor is not None else []))
        return t.emit(node.target, (x, kernel, stride, *rest))

    return rule


def _maximum(dims: int) -> Rule:
    def rule(t: Translator, node: fx.Node, x, kernel, stride=(), padding=0, dilation=1, ceil_mode=False) -> Any:
        stride = stride if stride not in ((), [], None) else kernel
        args = (x, *(each(value, dims) for value in (kernel, stride, padding, dilation)), ceil_mode)
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
            x = _windowed(t, x, axis, size[axis], aten.amax.default)
        return x, None

    return rule


def _windowed(t: Translator, x: fx.Node, axis: int, count: int, reduction: Any) -> fx.Node:
    """The maximum or mean of so many windows along an axis, as adaptive pooling lays them."""
    side = size_of(x)[axis]
    if side == count:
        return x
    thin = tuple(1 if i == axis else own for i, own in enumerate(size_of(x)))
    windows = [t.slice(x, axis, i * side // count, -(-(i + 1) * side // count)) for i in range(count)]
    reduced = [t.emit(reduction, (window, [axis], True), size=thin) for window in windows]
    return reduced[0] if count == 1 else joined(t, reduced, axis)


def extreme_over_axis(t: Translator, node: fx.Node, reduction: Any, x, dim=None) -> Any:
    """max and min over one axis, whose places nobody reads."""
    if dim is None or not isinstance(node.meta["val"], tuple | list) or _reads_second(node):
        return None
    return _reduced(t, reduction, x, [dim % len(size_of(x))], t.sizes(node.meta["val"][0])), None


def _extreme(name: str) -> Rule:
    def rule(t: Translator, node: fx.Node, x, dim=(), keepdim=False) -> Any:
        axes = _axes(x, list(dim) or None)
        return None if 0 in axes else _reduced(t, getattr(aten, name).default, x, axes, t.size())

    return rule


def _reduced(t: Translator, reduction: Any, x: fx.Node, axes: list[int], size: Size) -> fx.Node | None:
    thin = tuple(1 if i in axes else side for i, side in enumerate(size_of(x)))
    return t.reshape(t.emit(reduction, (x, axes, True), size=thin), size)


def _spread(root: bool, with_mean: bool) -> Rule:
    """Variances and standard deviations, alone or with the mean."""

    def rule(t: Translator, node: fx.Node, x, dim=None, unbiased=None, keepdim=False, *, correction=None) -> Any:
        if isinstance(dim, bool):  # the overload without axes
            dim, unbiased = None, dim
        axes = _axes(x, dim)
        if 0 in axes:
            return None
        less = correction if correction is not None else int(unbiased is not False)
        thin = tuple(1 if i in axes else side for i, side in enumerate(size_of(x)))
        options = {"correction": less, "keepdim": True}
        made = t.emit(aten.var.correction, (x, axes), options, size=thin)
        made = t.emit(aten.sqrt.default, (made,), size=thin) if root else made
        if not with_mean:
            return t.reshape(made, t.size())
        sizes = [t.sizes(value) for value in node.meta["val"]]
        return t.reshape(made, sizes[0]), t.reshape(mean(t, x, axes), sizes[1])

    return rule


def _items(t: Translator, node: fx.Node, args: Sequence) -> tuple[fx.Node, ...]:
    """An operator of several results, and each of them."""
    whole = t.emit(node.target, args, size=())
    return tuple(t.emit(operator.getitem, (whole, i), size=t.sizes(v)) for i, v in enumerate(node.meta["val"]))


def _reads_second(node: fx.Node) -> bool:
    return any(user.args[1] == 1 and user.users for user in node.users)


POOLING_RULES: dict[str, Rule] = {
    "mean": _mean,
    "sum": _sum,
    **{name: _extreme(name) for name in ("amax", "amin")},
    **{name: _spread("std" in name, "mean" in name) for name in ("var", "std", "var_mean", "std_mean")},
    **{f"adaptive_avg_pool{n}d": _adaptive_average(n) for n in (1, 2, 3)},
    **{f"_adaptive_avg_pool{n}d": _adaptive_average(n) for n in (2, 3)},
    **{f"avg_pool{n}d": _average(n) for n in (1, 2, 3)},
    **{f"max_pool{n}d": _maximum(n) for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": _maximum(n) for n in (1, 2, 3)},
    **{f"adaptive_max_pool{n}d": _adaptive_maximum(n) for n in (1, 2, 3)},
}
