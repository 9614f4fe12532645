"""Convolutions whose weights follow from the image, as CondConv has them: a product of matrices for every image.

Authors fold the images into groups: x [1, N C, H, W], weights [N O, C / G, k, k], N G groups. No file format takes a
number of groups that is the batch; what the layer reads under its kernel, times its weights, is the same.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from utils.graph.shape_rules import each, joined, pad_axes
from utils.graph.translate import Size, Translator, size_of

aten = torch.ops.aten


def convolve_each_image(
    t: Translator, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> fx.Node | None:
    """Such a convolution in canonical form; None for any other."""
    if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node) and isinstance(bias, fx.Node | None)):
        return None
    own, channels, filters = (of_each_image(t, side) for side in (groups, size_of(x)[1], size_of(weight)[0]))
    if None in (own, channels, filters) or size_of(x)[0] != 1 or isinstance(padding, str):
        return None
    kernel, sides, free = size_of(weight)[2:], t.size()[2:], t.free()
    stride, padding, dilation = (each(value, len(kernel)) for value in (stride, padding, dilation))
    x = pad_axes(t, t.reshape(x, (free, channels, *size_of(x)[2:])), padding, padding)
    columns = _under_kernel(t, x, kernel, sides, stride, dilation)
    depth = channels // own * math.prod(kernel)
    matrices = t.reshape(weight, (free, own, filters // own, depth))
    columns = t.reshape(columns, (free, own, depth, math.prod(sides)))
    size = (free, own, filters // own, math.prod(sides))
    made = t.emit(aten.matmul.default, (matrices, columns), size=size)
    if bias is not None:
        made = t.emit(aten.add.Tensor, (made, t.reshape(bias, (free, own, filters // own, 1))), size=size)
    return t.reshape(made, t.size())


def of_each_image(t: Translator, number: Any) -> int | None:
    """What a number that is a multiple of the batch is for one image; None for any other."""
    if isinstance(number, fx.Node):
        exported = number.meta.get("exported")
        number = exported.meta.get("val") if exported is not None else None
    if isinstance(number, torch.SymInt):
        expression = number.node.expr
        one, two = (expression.subs(dict.fromkeys(expression.free_symbols, count)) for count in (1, 2))
        return int(one) if two == 2 * one else None
    fits = t.batch and isinstance(number, int) and number % t.batch == 0
    return number // t.batch if fits else None


def _under_kernel(
    t: Translator, x: fx.Node, kernel: Size, sides: Size, stride: Sequence[int], dilation: Sequence[int]
) -> fx.Node:
    """What a kernel lies on at every position: [N, C, places of the kernel, positions]."""
    thin = (*size_of(x)[:2], 1, math.prod(sides))
    parts = []
    for place in itertools.product(*map(range, kernel)):
        part = x
        for axis, offset in enumerate(place):
            start = offset * dilation[axis]
            part = t.slice(part, axis + 2, start, start + (sides[axis] - 1) * stride[axis] + 1, stride[axis])
        parts.append(t.reshape(part, thin))
    return parts[0] if len(parts) == 1 else joined(t, parts, 2)
