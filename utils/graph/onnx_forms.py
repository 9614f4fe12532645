"""How ONNX writes the operators of the table: standard operators, the lowest opset that has them.

A form gets the writer (utils/backends/onnxruntime/writer.py), the node and its arguments, and returns the name of the result.
Shapes are those of one image; only the batch is free. A form that cannot write a case returns None, and torch.onnx does.
"""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from utils.graph.nodes import shape

Form = Callable[..., Any]


# ---------------------------------------------------------------------------------- moving values


def reshape(w: Any, node: fx.Node, x: fx.Node, size: Sequence[int]) -> str:
    batch_first = size[0] == -1 or -1 not in size
    target = [-1, *shape(node)[1:]] if batch_first and -1 not in list(size)[1:] else list(size)
    return w.add("Reshape", [w.name(x), w.sizes(f"{node.name}_shape", target)], node.name)


def permute(w: Any, node: fx.Node, x: fx.Node, order: Sequence[int]) -> str:
    return w.add("Transpose", [w.name(x)], node.name, perm=[axis % len(order) for axis in order])


def slice_(w: Any, node: fx.Node, x: fx.Node, axis: int, start: int, stop: int, step: int = 1) -> str:
    parts = (("starts", [start]), ("ends", [stop]), ("axes", [axis]), ("steps", [step]))
    return w.add("Slice", [w.name(x), *(w.sizes(f"{node.name}_{kind}", values) for kind, values in parts)], node.name)


def expand(w: Any, node: fx.Node, x: fx.Node, size: Sequence[int]) -> str:
    target = [1 if side == -1 else side for side in size]  # 1 keeps a side as it is
    return w.add("Expand", [w.name(x), w.sizes(f"{node.name}_shape", target)], node.name)


def concat(w: Any, node: fx.Node, parts: Sequence[fx.Node], axis: int = 0) -> str:
    return w.add("Concat", [w.name(part) for part in parts], node.name, axis=axis)


def pixel_shuffle(w: Any, node: fx.Node, x: fx.Node, factor: int) -> str:
    return w.add("DepthToSpace", [w.name(x)], node.name, blocksize=factor, mode="CRD")


def pixel_unshuffle(w: Any, node: fx.Node, x: fx.Node, factor: int) -> str:
    _, channels, height, width = shape(x)
    split = [-1, channels, height // factor, factor, width // factor, factor]
    parts = w.add("Reshape", [w.name(x), w.sizes(f"{node.name}_split", split)], f"{node.name}_parts")
    turned = w.add("Transpose", [parts], f"{node.name}_turned", perm=[0, 1, 3, 5, 2, 4])
    return w.add("Reshape", [turned, w.sizes(f"{node.name}_shape", [-1, *shape(node)[1:]])], node.name)


def channel_shuffle(w: Any, node: fx.Node, x: fx.Node, groups: int) -> str:
    _, channels, *sides = shape(x)
    split = w.sizes(f"{node.name}_split", [-1, groups, channels // groups, *sides])
    parts = w.add("Reshape", [w.name(x), split], f"{node.name}_parts")
    turned = w.add("Transpose", [parts], f"{node.name}_turned", perm=[0, 2, 1, *range(3, 3 + len(sides))])
    return w.add("Reshape", [turned, w.sizes(f"{node.name}_shape", [-1, channels, *sides])], node.name)


def pad(w: Any, node: fx.Node, x: fx.Node, amounts: Sequence[int], mode: str, value: float | None) -> str | None:
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if mode not in modes:
        return None
    before, after = padding_by_axis(amounts, len(shape(x)))
    inputs = [w.name(x), w.sizes(f"{node.name}_pads", [*before, *after])]
    inputs += [w.number(f"{node.name}_value", value)] if value else []
    return w.add("Pad", inputs, node.name, mode=modes[mode])


def padding_by_axis(amounts: Sequence[int], dims: int) -> tuple[list[int], list[int]]:
    """torch counts from the last axis: what to add before and after each, the first axis first."""
    amounts = [*amounts, *[0] * (2 * dims - len(amounts))]
    return list(amounts[0::2])[::-1], list(amounts[1::2])[::-1]


# --------------------------------------------------------------------------------------- pooling


def max_pool(w: Any, node: fx.Node, x: fx.Node, kernel, stride, padding, dilation, ceil_mode) -> str:
    options = {"kernel_shape": kernel, "strides": stride, "pads": [*padding, *padding], "dilations": dilation}
    return w.add("MaxPool", [w.name(x)], node.name, ceil_mode=int(ceil_mode), **options)


def max_pool_with_indices(w: Any, node: fx.Node, x: fx.Node, kernel, stride, padding, dilation, ceil_mode) -> list[str]:
    """The maxima, and where in the whole tensor they stood; MaxUnpool reads these as MaxPool wrote them."""
    options = {"kernel_shape": kernel, "strides": stride, "pads": [*padding, *padding], "dilations": dilation}
    outputs = [f"{node.name}_values", f"{node.name}_indices"]
    w.add("MaxPool", [w.name(x)], node.name, outputs, ceil_mode=int(ceil_mode), **options)
    return outputs


def max_unpool(w: Any, node: fx.Node, x: fx.Node, indices: fx.Node, size: Sequence[int]) -> str | None:
    pool = indices.args[0] if indices.target is operator.getitem else None
    if pool is None or pool.target is not torch.ops.aten.max_pool2d_with_indices.default:
        return None
    _, kernel, stride, padding, *_ = pool.args
    sides = [(n - 1) * s - 2 * p + k for n, s, p, k in zip(shape(x)[2:], stride, padding, kernel, strict=True)]
    if sides != list(size)[-2:]:
        return None
    options = {"kernel_shape": kernel, "strides": stride, "pads": [*padding, *padding]}
    return w.add("MaxUnpool", [w.name(x), w.name(indices)], node.name, **options)


def average_pool(
    w: Any, node: fx.Node, x: fx.Node, kernel, stride=None, padding=None, ceil_mode=False, include=True, divisor=None
) -> str | None:
    if divisor is not None or len(kernel) != len(shape(x)) - 2:
        return None
    padding = padding or [0] * len(kernel)
    if ceil_mode and len(kernel) == 2 and _overhangs(shape(x)[2:], shape(node)[2:], kernel, stride or kernel, padding):
        sides = zip(shape(x)[2:], kernel, stride or kernel, padding, strict=True)
        matrices = [F.avg_pool1d(torch.eye(n), k, s, p, True, include).T for n, k, s, p in sides]
        return _by_matrices(w, node, x, *matrices)
    options = {"kernel_shape": kernel, "strides": stride or kernel, "pads": [*padding, *padding]}
    return w.add(
        "AveragePool", [w.name(x)], node.name, ceil_mode=int(ceil_mode), count_include_pad=int(include), **options
    )


def mean(w: Any, node: fx.Node, x: fx.Node, axes: Sequence[int], keepdim: bool = True) -> str:
    if len(shape(x)) > 2 and list(axes) == list(range(2, len(shape(x)))):
        return w.add("GlobalAveragePool", [w.name(x)], node.name)
    return w.add("ReduceMean", [w.name(x)], node.name, axes=list(axes), keepdims=1)


def reduce_max(w: Any, node: fx.Node, x: fx.Node, axes: Sequence[int], keepdim: bool = True) -> str:
    if len(shape(x)) > 2 and list(axes) == list(range(2, len(shape(x)))):
        return w.add("GlobalMaxPool", [w.name(x)], node.name)
    return w.add("ReduceMax", [w.name(x)], node.name, axes=list(axes), keepdims=1)


def adaptive_average(w: Any, node: fx.Node, x: fx.Node, output: Any) -> str:
    """Windows of several sizes, which may overlap, as products with two matrices."""
    before, after = shape(x)[2:], shape(node)[2:]
    matrices = (F.adaptive_avg_pool1d(torch.eye(size), parts).T for size, parts in zip(before, after, strict=True))
    return _by_matrices(w, node, x, *matrices)


def _overhangs(before: Sequence[int], after: Sequence[int], kernel, stride, padding) -> bool:
    """Whether a last window reaches beyond the padded border, where engines divide by another count than torch."""
    sides = zip(before, after, kernel, stride, padding, strict=True)
    return any((out - 1) * s + k > n + 2 * p for n, out, k, s, p in sides)


def _by_matrices(w: Any, node: fx.Node, x: fx.Node, rows: Tensor, columns: Tensor) -> str:
    """Averages along both spatial axes. rows, columns: [outputs, inputs]."""
    wide = w.add("MatMul", [w.name(x), w.constant(f"{node.name}_columns", columns.T)], f"{node.name}_wide")
    return w.add("MatMul", [w.constant(f"{node.name}_rows", rows), wide], node.name)


def resize(w: Any, node: fx.Node, x: fx.Node, *args: Any) -> str | None:
    """Interpolation to the size at hand."""
    name = node.target._schema.name.partition("::")[2]
    mode = {"nearest": "nearest", "linear": "linear", "bilinear": "linear", "trilinear": "linear", "bicubic": "cubic"}[
        name.removeprefix("upsample_")[:-2]
    ]
    attributes: dict[str, Any] = {"mode": mode, "cubic_coeff_a": -0.75}
    if mode == "nearest":
        attributes |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    else:
        aligned = args[1] if len(args) > 1 else node.kwargs.get("align_corners", False)
        attributes["coordinate_transformation_mode"] = "align_corners" if aligned else "pytorch_half_pixel"
    before, after = shape(x)[2:], shape(node)[2:]
    factors = torch.tensor([1.0, 1.0, *itertools.starmap(_factor, zip(before, after, strict=True))])
    return w.add("Resize", [w.name(x), "", w.constant(f"{node.name}_scales", factors)], node.name, **attributes)


def _factor(before: int, after: int) -> float:
    """The smallest float32 that makes at least `after` of `before`: engines round the product down."""
    factor = torch.tensor(after / before, dtype=torch.float32)
    while float(factor) * before < after:
        factor = torch.nextafter(factor, torch.tensor(math.inf))
    return float(factor)


# ------------------------------------------------------------------------------------- arithmetic


def binary(kind: str) -> Form:
    def form(w: Any, node: fx.Node, x: Any, y: Any) -> str:
        operands = [w.operand(value, f"{node.name}_{side}") for value, side in ((x, "first"), (y, "second"))]
        return w.add(kind, operands, node.name)

    return form


def unary(kind: str, **attributes: Any) -> Form:
    def form(w: Any, node: fx.Node, x: Any) -> str:
        return w.add(kind, [w.operand(x, f"{node.name}_operand")], node.name, **attributes)

    return form


def softmax(w: Any, node: fx.Node, x: fx.Node, axis: int, *_: Any) -> str:
    return w.add("Softmax", [w.name(x)], node.name, axis=axis % len(shape(x)))


# ---------------------------------------------------------------- elementwise operators, inside activations


def _clamp(w: Any, node: fx.Node, x: Any, low: Any = None, high: Any = None) -> str | None:
    if any(isinstance(bound, fx.Node | Tensor) for bound in (low, high)):
        return None
    bounds = [
        w.number(f"{node.name}_{name}", bound) if bound is not None else ""
        for name, bound in (("low", low), ("high", high))
    ]
    return w.add("Clip", [w.operand(x, f"{node.name}_operand"), *bounds], node.name)


def _silu(w: Any, node: fx.Node, x: fx.Node) -> str:
    gate = w.add("Sigmoid", [w.name(x)], f"{node.name}_gate")
    return w.add("Mul", [w.name(x), gate], node.name)


def _hardswish(w: Any, node: fx.Node, x: fx.Node) -> str:
    gate = w.add("HardSigmoid", [w.name(x)], f"{node.name}_gate", alpha=1 / 6, beta=0.5)
    return w.add("Mul", [w.name(x), gate], node.name)


def _mish(w: Any, node: fx.Node, x: fx.Node) -> str:
    soft = w.add("Softplus", [w.name(x)], f"{node.name}_softplus")
    return w.add("Mul", [w.name(x), w.add("Tanh", [soft], f"{node.name}_tanh")], node.name)


def _gelu(w: Any, node: fx.Node, x: fx.Node, *, approximate: str = "none") -> str | None:
    """x * (1 + erf(x / sqrt 2)) / 2."""
    if approximate != "none":
        return None
    scaled = w.add("Mul", [w.name(x), w.number(f"{node.name}_root", math.sqrt(0.5))], f"{node.name}_scaled")
    both = w.add(
        "Add", [w.add("Erf", [scaled], f"{node.name}_erf"), w.number(f"{node.name}_one", 1.0)], f"{node.name}_both"
    )
    half = w.add("Mul", [w.name(x), w.number(f"{node.name}_half", 0.5)], f"{node.name}_halved")
    return w.add("Mul", [half, both], node.name)


def _leaky_relu(w: Any, node: fx.Node, x: fx.Node, slope: float = 0.01) -> str:
    return w.add("LeakyRelu", [w.name(x)], node.name, alpha=slope)


def _elu(
    w: Any, node: fx.Node, x: fx.Node, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> str | None:
    return w.add("Elu", [w.name(x)], node.name, alpha=alpha) if (scale, input_scale) == (1.0, 1.0) else None


def _prelu(w: Any, node: fx.Node, x: fx.Node, slope: fx.Node) -> str:
    values = w.tensor(slope)
    values = values.view(-1, *[1] * (len(shape(node)) - 2)) if len(shape(node)) > 1 else values
    return w.add("PRelu", [w.name(x), w.constant(f"{node.name}_slope", values)], node.name)


def _power(w: Any, node: fx.Node, x: fx.Node, exponent: float) -> str:
    return w.add("Pow", [w.name(x), w.number(f"{node.name}_exponent", exponent)], node.name)


aten = torch.ops.aten

ELEMENTWISE: dict[object, Form] = {
    aten.relu.default: unary("Relu"),
    aten.sigmoid.default: unary("Sigmoid"),
    aten.tanh.default: unary("Tanh"),
    aten.abs.default: unary("Abs"),
    aten.neg.default: unary("Neg"),
    aten.exp.default: unary("Exp"),
    aten.log.default: unary("Log"),
    aten.erf.default: unary("Erf"),
    aten.sqrt.default: unary("Sqrt"),
    aten.reciprocal.default: unary("Reciprocal"),
    aten.hardsigmoid.default: unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    aten.selu.default: unary("Selu"),
    aten.hardswish.default: _hardswish,
    aten.silu.default: _silu,
    aten.mish.default: _mish,
    aten.gelu.default: _gelu,
    aten.elu.default: _elu,
    aten.leaky_relu.default: _leaky_relu,
    aten.prelu.default: _prelu,
    aten.hardtanh.default: lambda w, node, x, low=-1.0, high=1.0: _clamp(w, node, x, low, high),
    aten.relu6.default: lambda w, node, x: _clamp(w, node, x, 0.0, 6.0),
    aten.clamp.default: _clamp,
    aten.clamp_min.default: lambda w, node, x, low: _clamp(w, node, x, low, None),
    aten.clamp_max.default: lambda w, node, x, high: _clamp(w, node, x, None, high),
    aten.pow.Tensor_Scalar: _power,
    aten.square.default: lambda w, node, x: w.add("Mul", [w.name(x), w.name(x)], node.name),
    aten.add.Tensor: binary("Add"),
    aten.sub.Tensor: binary("Sub"),
    aten.mul.Tensor: binary("Mul"),
    aten.div.Tensor: binary("Div"),
    aten.maximum.default: binary("Max"),
    aten.minimum.default: binary("Min"),
}
