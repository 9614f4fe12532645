"""How ONNX writes the operators of the table: standard operators, the lowest opset that has them.

A form gets the writer (utils/backends/onnx_writer.py), the node and its arguments, and returns the name of the result.
Shapes are those of one image; only the batch is free. A form that cannot write a case returns None, and torch.onnx does.
"""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from utils.graph.nodes import shape

Form = Callable[..., Any]

_END = 2**63 - 1  # of a slice that goes on to the last


# ---------------------------------------------------------------------------------- moving values


def reshape(w: Any, node: fx.Node, x: fx.Node, size: Sequence[int]) -> str | None:
    target = [-1, *shape(node)[1:]] if size[0] == -1 else w.full_shape(node)
    if target is None:
        return None
    return w.add("Reshape", [w.name(x), w.sizes(f"{node.name}_shape", target)], node.name)


def permute(w: Any, node: fx.Node, x: fx.Node, order: Sequence[int]) -> str:
    return w.add("Transpose", [w.name(x)], node.name, perm=[axis % len(order) for axis in order])


def slice_(
    w: Any, node: fx.Node, x: fx.Node, axis: int = 0, start: Any = None, stop: Any = None, step: int = 1
) -> str | None:
    sides = {"starts": start or 0, "ends": _END if stop is None else stop, "axes": axis, "steps": step}
    parts = [_side(w, side, f"{node.name}_{kind}") for kind, side in sides.items()]
    return None if None in parts else w.add("Slice", [w.name(x), *parts], node.name)


def _side(w: Any, side: int | fx.Node, name: str) -> str | None:
    """A size or a place [1]; of a tensor's size that is known with the images alone, or None of what else is not known."""
    if not isinstance(side, fx.Node):
        return w.sizes(name, [side])
    if side.target is not torch.ops.aten.sym_size.int:
        return None
    whole = w.add("Shape", [w.name(side.args[0])], f"{name}_of")
    return w.add("Gather", [whole, w.sizes(f"{name}_axis", [side.args[1]])], name)


def flip(w: Any, node: fx.Node, x: fx.Node, axes: Sequence[int]) -> str:
    values = {"starts": [-1] * len(axes), "ends": [-(2**31)] * len(axes), "axes": list(axes), "steps": [-1] * len(axes)}
    return w.add(
        "Slice", [w.name(x), *(w.sizes(f"{node.name}_{kind}", own) for kind, own in values.items())], node.name
    )


def repeat(w: Any, node: fx.Node, x: fx.Node, times: Sequence[int]) -> str | None:
    if not all(isinstance(count, int) for count in times) or len(times) != len(shape(x)):
        return None
    return w.add("Tile", [w.name(x), w.sizes(f"{node.name}_times", times)], node.name)


def expand(w: Any, node: fx.Node, x: fx.Node, size: Sequence[int | fx.Node]) -> str | None:
    target = [1 if side == -1 else side for side in size]  # 1 keeps a side as it is
    if not any(isinstance(side, fx.Node) for side in target):
        return w.add("Expand", [w.name(x), w.sizes(f"{node.name}_shape", target)], node.name)
    parts = [_side(w, side, f"{node.name}_side_{i}") for i, side in enumerate(target)]
    return (
        None
        if None in parts
        else w.add("Expand", [w.name(x), w.add("Concat", parts, f"{node.name}_shape", axis=0)], node.name)
    )


def index_select(w: Any, node: fx.Node, x: fx.Node, axis: int, index: fx.Node) -> str:
    return w.add("Gather", [w.name(x), w.name(index)], node.name, axis=axis % len(shape(x)))


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
    """The maxima, and where they stood: in the whole tensor for MaxUnpool, in their own channel for all else, as in torch."""
    options = {"kernel_shape": kernel, "strides": stride, "pads": [*padding, *padding], "dilations": dilation}
    values, places = f"{node.name}_values", f"{node.name}_indices"
    w.add("MaxPool", [w.name(x)], node.name, [values, places], ceil_mode=int(ceil_mode), **options)
    if not _all_unpooled(node):
        positions = w.sizes(f"{node.name}_positions", [math.prod(shape(x)[2:])])
        places = w.add("Mod", [places, positions], f"{node.name}_places")
    return [values, places]


def _all_unpooled(pool: fx.Node) -> bool:
    """Whether all that reads a pooling's indices is unpooled to the size of the pooling's input."""
    readers = [reader for part in pool.users if part.args[1] == 1 for reader in part.users]
    unpool = torch.ops.aten.max_unpool2d.default
    return all(reader.target is unpool and shape(reader) == shape(pool.args[0]) for reader in readers)


def max_unpool(w: Any, node: fx.Node, x: fx.Node, indices: fx.Node, size: Sequence[int]) -> str | None:
    """Where the pooling's input was as large as the result, so that its indices count in the result too."""
    pool = indices.args[0] if indices.target is operator.getitem else None
    pooled = pool is not None and pool.target is torch.ops.aten.max_pool2d_with_indices.default
    if not (pooled and _all_unpooled(pool)):
        return None
    _, kernel, stride, padding, *_ = pool.args
    sides = [(n - 1) * s - 2 * p + k for n, s, p, k in zip(shape(x)[2:], stride, padding, kernel, strict=True)]
    if sides != list(size)[-2:]:  # the window only says how large the result is: any will do
        stride, padding = [1, 1], [0, 0]
        kernel = [whole - n + 1 for whole, n in zip(shape(node)[2:], shape(x)[2:], strict=True)]
    options = {"kernel_shape": kernel, "strides": stride, "pads": [*padding, *padding]}
    return w.add("MaxUnpool", [w.name(x), w.name(indices)], node.name, **options)


def average_pool(
    w: Any, node: fx.Node, x: fx.Node, kernel, stride=None, padding=None, ceil_mode=False, include=True, divisor=None
) -> str | None:
    if len(kernel) != len(shape(x)) - 2:
        return None
    padding, stride = padding or [0] * len(kernel), stride or kernel
    spans = [side + 2 * p - k for side, p, k in zip(shape(x)[2:], padding, kernel, strict=True)]
    partial = ceil_mode and any(span % step for span, step in zip(spans, stride, strict=True))
    options = {"kernel_shape": kernel, "strides": stride}
    if divisor is not None:
        if partial:
            return None
        pooled = w.add(
            "AveragePool", [w.name(x)], f"{node.name}_mean", count_include_pad=1, pads=[*padding, *padding], **options
        )
        return w.add("Mul", [pooled, w.number(f"{node.name}_factor", math.prod(kernel) / divisor)], node.name)
    if not (partial and include):
        options |= {"pads": [*padding, *padding], "ceil_mode": int(partial), "count_include_pad": int(include)}
        return w.add("AveragePool", [w.name(x)], node.name, **options)
    if any(
        (n - 1) * s >= side + 2 * p
        for n, s, side, p in zip(shape(node)[2:], stride, shape(x)[2:], padding, strict=True)
    ):
        return None
    # Engines divide by the whole window; torch by what of it lies in the padded input.
    source = w.name(x)
    if any(padding):
        source = w.add(
            "Pad", [source, w.sizes(f"{node.name}_pads", [0, 0, *padding, 0, 0, *padding])], f"{node.name}_padded"
        )
    return w.add("AveragePool", [source], node.name, ceil_mode=1, count_include_pad=0, **options)


def mean(w: Any, node: fx.Node, x: fx.Node, axes: Sequence[int], keepdim: bool = False) -> str:
    if keepdim and len(shape(x)) > 2 and list(axes) == list(range(2, len(shape(x)))):
        return w.add("GlobalAveragePool", [w.name(x)], node.name)
    return w.add("ReduceMean", [w.name(x)], node.name, axes=list(axes), keepdims=int(keepdim))


def extreme(kind: str) -> Form:
    """Max or Min over axes."""

    def form(w: Any, node: fx.Node, x: fx.Node, axes: Sequence[int], keepdim: bool = False) -> str:
        if kind == "Max" and keepdim and len(shape(x)) > 2 and list(axes) == list(range(2, len(shape(x)))):
            return w.add("GlobalMaxPool", [w.name(x)], node.name)
        return w.add(f"Reduce{kind}", [w.name(x)], node.name, axes=list(axes), keepdims=int(keepdim))

    return form


def variance(
    w: Any, node: fx.Node, x: fx.Node, axes: Sequence[int], *, correction: float = 1, keepdim: bool = False
) -> str | None:
    """The mean square of what is off the mean, times n / (n - correction)."""
    count = math.prod(shape(x)[axis] for axis in axes)
    if not keepdim or count <= correction:
        return None
    own, axes = node.name, list(axes)
    middle = w.add("ReduceMean", [w.name(x)], f"{own}_mean", axes=axes, keepdims=1)
    off = w.add("Sub", [w.name(x), middle], f"{own}_off")
    square = w.add("Mul", [off, off], f"{own}_square")
    if not correction:
        return w.add("ReduceMean", [square], own, axes=axes, keepdims=1)
    biased = w.add("ReduceMean", [square], f"{own}_biased", axes=axes, keepdims=1)
    return w.add("Mul", [biased, w.number(f"{own}_factor", count / (count - correction))], own)


def vector_norm(
    w: Any, node: fx.Node, x: fx.Node, order: float = 2, axes: Any = None, keepdim: bool = False, **_: Any
) -> str | None:
    kinds = {1: "ReduceL1", 2: "ReduceL2"}
    if order not in kinds or axes is None:
        return None
    axes = [axis % len(shape(x)) for axis in ([axes] if isinstance(axes, int) else axes)]
    return w.add(kinds[order], [w.name(x)], node.name, axes=axes, keepdims=int(keepdim)) if 0 not in axes else None


def adaptive_average(w: Any, node: fx.Node, x: fx.Node, output: Any) -> str | None:
    """Windows of several sizes, which may overlap, as products with a matrix for each axis."""
    before, after = list(shape(x)[2:]), list(shape(node)[2:])
    matrices = [F.adaptive_avg_pool1d(torch.eye(a), b).T for a, b in zip(before, after, strict=True)]  # [after, before]
    name, channels = w.name(x), shape(x)[1]
    for axis in reversed(range(len(before))):
        last, done = axis == len(before) - 1, f"{node.name}_{axis}" if axis else node.name
        matrix = w.constant(f"{node.name}_matrix_{axis}", matrices[axis].T if last else matrices[axis])
        if last:
            name = w.add("MatMul", [name, matrix], done)
        elif axis == len(before) - 2:
            name = w.add("MatMul", [matrix, name], done)
        else:
            flat, whole = [-1, channels, before[axis], math.prod(after[axis + 1 :])], [-1, channels, *after]
            name = w.add("Reshape", [name, w.sizes(f"{done}_flat_shape", flat)], f"{done}_flat")
            name = w.add("MatMul", [matrix, name], f"{done}_product")
            name = w.add("Reshape", [name, w.sizes(f"{done}_shape", whole)], done)
    return name


def adaptive_maximum(w: Any, node: fx.Node, x: fx.Node, output: Any) -> list[str] | None:
    """Windows of several sizes, one axis after the other: the maximum of each axis' own slices."""
    if any(user.target is operator.getitem and user.args[1] == 1 and user.users for user in node.users):
        return None
    output = [output] * (len(shape(x)) - 2) if isinstance(output, int) else output
    name = w.name(x)
    for axis, (side, parts) in enumerate(zip(shape(x)[2:], output, strict=True), start=2):
        maxima = []
        for i in range(parts):
            own = f"{node.name}_{axis}_{i}"
            ends = [i * side // parts], [-((i + 1) * side // -parts)], [axis]
            limits = [w.sizes(f"{own}_{kind}", end) for kind, end in zip(("start", "stop", "axis"), ends, strict=True)]
            window = w.add("Slice", [name, *limits], f"{own}_window")
            maxima.append(w.add("ReduceMax", [window], own, axes=[axis], keepdims=1))
        name = w.add("Concat", maxima, f"{node.name}_{axis}", axis=axis)
    return [name]


def resize(w: Any, node: fx.Node, x: fx.Node, *args: Any) -> str | None:
    """Interpolation to the size at hand."""
    name = node.target._schema.name.partition("::")[2]
    kind = name.removeprefix("_").removeprefix("upsample_")[:-2]
    mode = {"bicubic": "cubic"}.get(kind, "nearest" if kind.startswith("nearest") else "linear")
    attributes: dict[str, Any] = {"mode": mode, "cubic_coeff_a": -0.75}
    if kind == "nearest_exact":
        attributes |= {"coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_ceil"}
    elif mode == "nearest":
        attributes |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    else:
        aligned = args[1] if len(args) > 1 else node.kwargs.get("align_corners", False)
        attributes["coordinate_transformation_mode"] = "align_corners" if aligned else "pytorch_half_pixel"
    before, after = shape(x)[2:], shape(node)[2:]
    given = args[-1] if attributes["coordinate_transformation_mode"] != "align_corners" else None
    factors = given or list(
        itertools.starmap(_factor, zip(before, after, strict=True))
    )  # torch steps by what was given
    factors = torch.tensor([1.0, 1.0, *factors])
    if [math.floor(side * float(factor)) for side, factor in zip(before, factors[2:], strict=True)] != list(after):
        return None
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


def log_softmax(w: Any, node: fx.Node, x: fx.Node, axis: int, *_: Any) -> str:
    return w.add("LogSoftmax", [w.name(x)], node.name, axis=axis % len(shape(x)))


def softmax(w: Any, node: fx.Node, x: fx.Node, axis: int, *_: Any) -> str:
    """exp(x - max) / sum. Of a quantized input in these parts: engines have an integer kernel for the whole, which errs."""
    axis = axis % len(shape(x))
    if not w.on_grid(x):
        return w.add("Softmax", [w.name(x)], node.name, axis=axis)
    top = w.add("ReduceMax", [w.name(x)], f"{node.name}_max", axes=[axis], keepdims=1)
    powers = w.add("Exp", [w.add("Sub", [w.name(x), top], f"{node.name}_below")], f"{node.name}_exp")
    total = w.add("ReduceSum", [powers], f"{node.name}_sum", axes=[axis], keepdims=1)
    return w.add("Div", [powers, total], node.name)


def attention(
    w: Any, node: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node, *more: Any, **options: Any
) -> str | None:
    """softmax(query key^T / sqrt(d)) value."""
    scale = options.pop("scale", None) or shape(query)[-1] ** -0.5
    if any(more) or any(options.values()):
        return None
    order = [*range(len(shape(key)) - 2), len(shape(key)) - 1, len(shape(key)) - 2]
    turned = w.add("Transpose", [w.name(key)], f"{node.name}_key", perm=order)
    scaled = w.add("Mul", [w.name(query), w.number(f"{node.name}_scale", scale)], f"{node.name}_query")
    weights = w.add("MatMul", [scaled, turned], f"{node.name}_product")
    weights = w.add("Softmax", [weights], f"{node.name}_weights", axis=len(order) - 1)
    return w.add("MatMul", [weights, w.name(value)], node.name)


# ------------------------------------------------------------------------------------------ norms


def layer_norm(
    w: Any,
    node: fx.Node,
    x: fx.Node,
    sides: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> str | None:
    groups = math.prod(shape(x)[1 : len(shape(x)) - len(sides)])
    if w.batch_axes.of(x) != [0] or len(sides) == len(shape(x)):
        return None
    normed = _normed(w, node, w.name(x), [-1, groups, math.prod(sides)], eps)
    return _scaled_shifted(w, node, normed, weight, bias, 0)


def group_norm(
    w: Any, node: fx.Node, x: fx.Node, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> str | None:
    if w.batch_axes.of(x) != [0]:
        return None
    normed = _normed(w, node, w.name(x), [-1, groups, math.prod(shape(x)[1:]) // groups], eps)
    return _scaled_shifted(w, node, normed, weight, bias, len(shape(x)) - 2)


def instance_norm(
    w: Any, node: fx.Node, x: fx.Node, weight, bias, mean, variance, own_statistics, momentum, eps, *_: Any
) -> str | None:
    return group_norm(w, node, x, shape(x)[1], weight, bias, eps) if own_statistics else None


def _normed(w: Any, node: fx.Node, name: str, size: list[int], eps: float) -> str:
    """Each row of [N, groups, row] less its mean, over its standard deviation; in the node's shape again."""
    rows = w.add("Reshape", [name, w.sizes(f"{node.name}_rows_shape", size)], f"{node.name}_rows")
    parts = [
        w.constant(f"{node.name}_{kind}", value)
        for kind, value in (("ones", torch.ones(size[1])), ("zeros", torch.zeros(size[1])))
    ]
    normed = w.add("InstanceNormalization", [rows, *parts], f"{node.name}_normed_rows", epsilon=eps)
    return w.add("Reshape", [normed, w.sizes(f"{node.name}_shape", [-1, *shape(node)[1:]])], f"{node.name}_normed")


def _scaled_shifted(w: Any, node: fx.Node, name: str, weight: Any, bias: Any, trailing: int) -> str:
    """name * weight + bias; trailing: how many axes follow that of the weights."""
    for kind, part in (("Mul", weight), ("Add", bias)):
        if part is not None:
            values = w.tensor(part)
            values = values.reshape(*values.shape, *[1] * trailing)
            done = f"{node.name}_{kind.lower()}"
            name = w.add(kind, [name, w.constant(f"{done}_values", values)], done)
    return name
