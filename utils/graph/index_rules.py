"""How operators that pick or write positions by number become canonical: slices, or index_select along one axis."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from utils.graph.shape_rules import Rule, each, joined, pad_axes
from utils.graph.translate import Size, Translator, is_constant, is_free, size_of

aten = torch.ops.aten


def picked(t: Translator, x: fx.Node, axis: int, index: Sequence[int]) -> fx.Node:
    """The positions of an axis by number, in that order: a slice where they are evenly spaced."""
    index = [int(i) % size_of(x)[axis] for i in index]
    step = index[1] - index[0] if len(index) > 1 else 1
    if step > 0 and index == list(range(index[0], index[-1] + 1, step)):
        return t.slice(x, axis, index[0], index[-1] + 1, step)
    size = list(size_of(x))
    size[axis] = len(index)
    return t.emit(aten.index_select.default, (x, axis, torch.tensor(index)), size=size)


def _index_select(t: Translator, node: fx.Node, x, dim, index) -> Any:
    axis = dim % len(size_of(x))
    if not isinstance(index, Tensor) or not isinstance(x, fx.Node) or is_free(size_of(x)[axis]):
        return None
    return picked(t, x, axis, index.reshape(-1).tolist())


def _index(t: Translator, node: fx.Node, x, indices) -> Any:
    """x[:, index] with one constant index, of numbers or a mask."""
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1 or not isinstance(given[0][1], Tensor) or not isinstance(x, fx.Node):
        return None
    axis, index = given[0]
    if index.dtype == torch.bool:
        index = index.nonzero()[:, 0] if index.dim() == 1 else None
    if index is None or not index.numel() or is_free(size_of(x)[axis]):
        return None
    return t.reshape(picked(t, x, axis, index.reshape(-1).tolist()), t.size())


def _repeat_interleave(t: Translator, node: fx.Node, x, repeats, dim=None, **_) -> Any:
    if dim is None or not isinstance(repeats, int) or not isinstance(x, fx.Node):
        return None
    axis = dim % len(size_of(x))
    side = size_of(x)[axis]
    return None if is_free(side) else picked(t, x, axis, torch.arange(side).repeat_interleave(repeats).tolist())


def _unfold(t: Translator, node: fx.Node, x, dim, size, step) -> Any:
    """Windows along an axis, their positions as a new last axis."""
    axis, before = dim % len(size_of(x)), size_of(x)
    if is_free(before[axis]):
        return None
    windows = (before[axis] - size) // step + 1
    x = picked(t, x, axis, [i * step + j for i in range(windows) for j in range(size)])
    split = (*before[:axis], windows, size, *before[axis + 1 :])
    order = [i for i in range(len(split)) if i != axis + 1] + [axis + 1]
    return _permuted(t, t.reshape(x, split), order)


def _im2col(t: Translator, node: fx.Node, x, kernel, dilation=1, padding=0, stride=1) -> Any:
    """F.unfold: every tap of a kernel, at all its positions."""
    kernel, dilation, padding, stride = (each(value, 2) for value in (kernel, dilation, padding, stride))
    if len(size_of(x)) != 4:
        return None
    if any(padding):
        x = pad_axes(t, x, padding, padding)
    batch, channels, *sides = size_of(x)
    counts = [(n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(sides, dilation, kernel, stride, strict=True)]
    for i, axis in enumerate((2, 3)):
        taps = [j * dilation[i] + k * stride[i] for j in range(kernel[i]) for k in range(counts[i])]
        x = picked(t, x, axis, taps)
    x = t.reshape(x, (batch, channels, kernel[0], counts[0], kernel[1], counts[1]))
    x = _permuted(t, x, [0, 1, 2, 4, 3, 5])
    return t.reshape(x, (batch, channels * math.prod(kernel), math.prod(counts)))


def _slice_scatter(t: Translator, node: fx.Node, x, source, dim=0, start=None, end=None, step=1) -> Any:
    """A slice written in place: what is before it, the new values, what is behind it; of every other position, a choice
    from both tensors."""
    axis, size = dim % len(size_of(x)), size_of(x)
    if not is_constant((start, end)) or not isinstance(x, fx.Node):
        return None
    if size_of(source)[axis] == size[axis]:
        return source
    if is_free(size[axis]):
        return None
    start, end, _ = slice(start, end).indices(size[axis])
    if end <= start:  # nothing is written
        return x
    if step != 1:
        return _interleaved(t, x, source, axis, range(start, end, step))
    parts = [t.slice(x, axis, 0, start)] if start else []
    parts += [source] + ([t.slice(x, axis, end, size[axis])] if end < size[axis] else [])
    return joined(t, parts, axis)


def _interleaved(t: Translator, x: fx.Node, source: fx.Node | Tensor, axis: int, positions: Sequence[int]) -> fx.Node:
    order = list(range(size_of(x)[axis]))
    for i, position in enumerate(positions):
        order[position] = len(order) + i
    return picked(t, joined(t, [x, source], axis), axis, order)


def _select_scatter(t: Translator, node: fx.Node, x, source, dim, index) -> Any:
    """One position written in place: a slice of one."""
    axis, size = dim % len(size_of(x)), size_of(x)
    if not (isinstance(x, fx.Node) and isinstance(source, fx.Node) and isinstance(index, int)) or is_free(size[axis]):
        return None
    thin = t.reshape(source, (*size[:axis], 1, *size[axis + 1 :]))
    index %= size[axis]
    return None if thin is None else _slice_scatter(t, node, x, thin, axis, index, index + 1)


def _permuted(t: Translator, x: fx.Node, order: Sequence[int]) -> fx.Node:
    size: Size = tuple(size_of(x)[axis] for axis in order)
    return t.emit(aten.permute.default, (x, list(order)), size=size)


INDEX_RULES: dict[str, Rule] = {
    "index_select": _index_select,
    "index": _index,
    "repeat_interleave": _repeat_interleave,
    "unfold": _unfold,
    "im2col": _im2col,
    "slice_scatter": _slice_scatter,
    "select_scatter": _select_scatter,
}
