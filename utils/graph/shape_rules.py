"""How operators that only move values, or pad, are written in canonical form: reshape, permute, slice, cat, expand, pad."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from utils.graph.translate import Translator, is_constant, is_free, size_of

aten = torch.ops.aten
Rule = Callable[..., Any]


def _same(t: Translator, node: fx.Node, x, *_, **__) -> Any:
    """Nothing is done in evaluation; unless the data type changes."""
    source = node.args[0]
    return x if source.meta["val"].dtype == node.meta["val"].dtype else None


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
    if is_free(size[0]) and str(size[0]) == str(t.free()):
        size[0] = t.image_count()
    if any(is_free(side) for side in size):
        return None
    x = x.reshape(before) if isinstance(x, Tensor) else t.reshape(x, before)
    return t.emit(aten.expand.default, (x, size))


def _cat(t: Translator, node: fx.Node, parts, dim=0) -> Any:
    parts = [part for part in parts if 0 not in size_of(part)]
    return parts[0] if len(parts) == 1 else t.emit(aten.cat.default, (parts, dim % len(t.size())))


def _stack(t: Translator, node: fx.Node, parts, dim=0) -> Any:
    axis, size = dim % len(t.size()), t.size()
    thin = (*size[:axis], 1, *size[axis + 1 :])
    if not all(isinstance(part, fx.Node) for part in parts):
        return None
    return t.emit(aten.cat.default, ([t.reshape(part, thin) for part in parts], axis))


def _fold(t: Translator, node: fx.Node, x, size, kernel, dilation, padding, stride) -> Any:
    """Patches of one position each are the map."""
    plain = {*each(kernel, 2), *each(stride, 2)} == {1} and not any(each(padding, 2))
    return t.reshape(x, t.size()) if plain else None


def _stacked_along(axis: int) -> Rule:
    """hstack and its kin: a concat along an axis that follows from the name, of tensors that have it."""

    def rule(t: Translator, node: fx.Node, parts) -> Any:
        return _cat(t, node, parts, axis) if all(len(size_of(part)) > max(axis, 1) for part in parts) else None

    return rule


def _roll(t: Translator, node: fx.Node, x, shifts, dims=()) -> Any:
    if not dims:
        return None
    for shift, dim in zip(each(shifts, len(dims)), dims, strict=True):
        axis, side = dim % len(size_of(x)), size_of(x)[dim]
        if is_free(side):
            return None
        x = (
            joined(t, [t.slice(x, axis, (-shift) % side, side), t.slice(x, axis, 0, (-shift) % side)], axis)
            if shift % side
            else x
        )
    return x


def joined(t: Translator, parts: list[fx.Node], axis: int) -> fx.Node:
    size = list(size_of(parts[0]))
    size[axis] = sum(size_of(part)[axis] for part in parts)
    return t.emit(aten.cat.default, (parts, axis), size=size)


def each(value: int | Sequence[int], dims: int) -> list[int]:
    if isinstance(value, int):
        return [value] * dims
    return list(value) * dims if len(value) == 1 else list(value)


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
        return pad_axes(t, x, before, after, own, value or 0.0)

    return rule


def pad_axes(
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
        x = joined(t, parts, first + i) if len(parts) > 1 else x
    return x


SHAPE_RULES: dict[str, Rule] = {
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
    "copy": _copy,
    "select": _select,
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "unbind", "tensor_split"), _parts),
    **dict.fromkeys(("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes"), _parts),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "stack": _stack,
    **{name: _stacked_along(i) for name, i in (("vstack", 0), ("hstack", 1), ("column_stack", 1), ("dstack", 2))},
    "roll": _roll,
    "col2im": _fold,
    "pad": _pad_rule(None),
    "constant_pad_nd": _pad_rule("constant"),
    **{f"reflection_pad{n}d": _pad_rule("reflect") for n in (1, 2, 3)},
    **{f"replication_pad{n}d": _pad_rule("replicate") for n in (1, 2, 3)},
}
