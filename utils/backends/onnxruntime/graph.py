"""The simulated network as an ONNX model: the same graph, node by node, with integers where they belong.

Standard operators only. A quantizer becomes QuantizeLinear and DequantizeLinear (QDQ) with its scale and zero
point, uint8; weights are int8 initialisers and biases int32 ones, on the grid of weight scale times input
scale, each behind a DequantizeLinear. From this form engines make integer kernels by themselves.
Tensors have the names of the graph's nodes, nodes those of the layers. Sizes are those of one image;
only the batch is dynamic.
"""

import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.graph.layers import CappedReLU, padding, per_channel
from utils.graph.nodes import describe, module_of, shape
from utils.quantization.qparams import QParams
from utils.quantization.quantizer import Quantizer

OPSET, IR_VERSION = 20, 9  # of October 2023
INPUT = "images"


def integers_of(node: fx.Node) -> str:
    """The name of the uint8 tensor that a quantizer's node has become."""
    return f"{node.name}_uint8"


def onnx_model(simulated: fx.GraphModule, spec: InputSpec, metadata: Mapping[str, Any]) -> onnx.ModelProto:
    """What a file holds. metadata: by key, anything that JSON can say.

    Grids of other than 8 bits (biases: 32), and an operator without a rule here, are a UserError.
    """
    writer = _Writer(simulated)
    for node in simulated.graph.nodes:
        writer.write(node)
    image = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", *spec.shape()[1:]])
    graph = helper.make_graph(writer.nodes, "dfq", [image], writer.outputs, writer.initializers)
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="dfq")
    helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    return model


@dataclass(frozen=True)
class _Value:
    """A float tensor of the model. grid: the scale and zero point that its values lie on, if any."""

    name: str
    grid: tuple[float, int] | None = None


class _Writer:
    """What has been written so far, and the values that fx nodes have become."""

    def __init__(self, model: fx.GraphModule):
        self.model = model
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.values: dict[fx.Node, _Value | list[_Value]] = {}

    def write(self, node: fx.Node) -> None:
        """Write what the node does to tensors; what it does to sizes is known already."""
        if node.op == "placeholder":
            self.values[node] = _Value(INPUT)
        elif node.op == "output":
            results = node.args[0] if isinstance(node.args[0], tuple | list) else [node.args[0]]
            self.outputs = [self._output(f"output_{i}", result) for i, result in enumerate(results)]
        elif node.op == "get_attr":
            module, _, attribute = node.target.rpartition(".")
            tensor = getattr(self.model.get_submodule(module), attribute)
            self.values[node] = _Value(self.constant(node.name, tensor))
        elif "tensor_meta" in node.meta:
            module = module_of(self.model, node)
            rule = _RULES.get(node.target if module is None else type(module), _refuse)
            before = len(self.nodes)
            result = rule(self, node, module)
            if isinstance(result, _Value | list):
                self.values[node] = result
            else:
                self.values[node] = self._on_grid(node, result, self.nodes[before:])

    def add(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Append an operator with one output of that name; returns it."""
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: Tensor | np.ndarray) -> str:
        array = value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else value
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def sizes(self, name: str, values: Sequence[int]) -> str:
        return self.constant(name, np.array(values, np.int64))

    def operand(self, node: fx.Node, argument: Any, name: str) -> str:
        """The tensor that an argument stands for; a number becomes a constant."""
        if isinstance(argument, fx.Node) and isinstance(self.values.get(argument), _Value):
            return self.values[argument].name
        if isinstance(argument, int | float):
            return self.constant(f"{node.name}_{name}", np.float32(argument))
        _refuse(self, node, module_of(self.model, node))

    def source(self, node: fx.Node) -> str:
        return self.operand(node, node.args[0], "source")

    def quantize(self, source: str, name: str, grid: tuple[float, int], cap: Tensor | None = None) -> _Value:
        """Round a tensor to a uint8 grid. cap: per-channel bounds that broadcast over it, in steps of the grid."""
        scale = self.constant(f"{name}_scale", np.float32(grid[0]))
        zero = self.constant(f"{name}_zero_point", np.uint8(grid[1]))
        integers = f"{name}_uint8"
        self.add("QuantizeLinear", [source, scale, zero], integers if cap is None else f"{name}_uncapped")
        if cap is not None:
            bounds = self.constant(f"{name}_cap", cap.to(torch.uint8))
            self.add("Min", [f"{name}_uncapped", bounds], integers)
        return _Value(self.add("DequantizeLinear", [integers, scale, zero], name), grid)

    def parameter(self, name: str, values: Tensor, grid: QParams | None, kind: torch.dtype, axis: int = 0) -> str:
        """A weight or bias: integers behind their DequantizeLinear, or floats where it has no grid."""
        if grid is None:
            return self.constant(name, values)
        along = [1] * values.dim()
        along[axis] = -1
        scale, zero = (
            part.reshape(along if grid.per_channel else []).double() for part in (grid.scale, grid.zero_point)
        )
        shift = 128 if grid.quant_min == 0 else 0  # an unsigned grid as int8
        steps = (values.double() / scale).round() + zero - shift
        integers = self.constant(f"{name}_{str(kind).removeprefix('torch.')}", steps.to(kind))
        zero_point = self.constant(f"{name}_zero_point", (grid.zero_point - shift).to(kind))
        scales = self.constant(f"{name}_scale", grid.scale.float())
        options = {"axis": axis} if grid.per_channel else {}
        return self.add("DequantizeLinear", [integers, scales, zero_point], name, **options)

    def _on_grid(self, node: fx.Node, name: str, written: Sequence[onnx.NodeProto]) -> _Value:
        """The node's result; back on the grid of its inputs where it only moved values of one grid."""
        inputs = [self.values[source] for source in node.all_input_nodes if isinstance(self.values.get(source), _Value)]
        grids = {value.grid for value in inputs}
        if len(grids) != 1 or None in grids or not all(_moves(operator) for operator in written):
            return _Value(name)
        return self.quantize(name, f"{name}_on_grid", grids.pop())

    def _output(self, name: str, result: fx.Node) -> onnx.ValueInfoProto:
        self.add("Identity", [self.values[result].name], name)
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape(result)[1:]])


_MOVING = {"Concat", "DepthToSpace", "Expand", "GlobalMaxPool", "MaxPool", "Pad", "Reshape", "Slice", "Transpose"}


def _moves(operator: onnx.NodeProto) -> bool:
    """Whether an operator's output holds nothing but values of its input, and zeros."""
    nearest = any(attribute.name == "mode" and attribute.s == b"nearest" for attribute in operator.attribute)
    return operator.op_type in _MOVING or nearest


def _refuse(w: _Writer, node: fx.Node, module: nn.Module | None) -> None:
    raise UserError(
        f"{describe(module, node)} cannot be exported: there is no rule for it as it is used at node {node.name!r}; "
        "run without --export and --engine onnxruntime, or write that part of the network with common operators"
    )


# ------------------------------------------------------------------- quantizers and layers with weights


def _quantizer(w: _Writer, node: fx.Node, module: Quantizer) -> _Value:
    _check_bits(module.qparams, 8, f"the activations of {node.name!r}")
    cap = module.cap
    if cap is not None:
        reached = bool((cap < module.step_max).any())
        cap = per_channel(cap + module.zero_point, len(shape(node)))[None] if reached else None
    return w.quantize(w.source(node), node.name, (module.scale, module.zero_point), cap)


def _parameters(w: _Writer, node: fx.Node, layer: nn.Module, axis: int = 0) -> list[str]:
    weights, biases = layer.weight_qparams, layer.bias_qparams
    if weights is not None:
        _check_bits(weights, 8, f"the weights of layer {node.target!r}")
    if biases is not None:
        _check_bits(biases, 32, f"the bias of layer {node.target!r}")
    return [
        w.parameter(f"{node.name}_weight", layer.weight, weights, torch.int8, axis),
        w.parameter(f"{node.name}_bias", layer.bias, biases, torch.int32),
    ]


def _check_bits(grid: QParams, bits: int, what: str) -> None:
    found = grid.bits
    if found != bits:
        raise UserError(
            f"{what} have {found} bits; INT8 engines take weights and activations of 8 bits and biases of 32: "
            "leave out --bits_weight, --bits_activation and --bits_bias"
        )


def _convolution(w: _Writer, node: fx.Node, layer: nn.Module) -> str:
    if layer.padding_mode != "zeros":
        _refuse(w, node, layer)
    transposed = isinstance(layer, _ConvTransposeNd)
    grid = layer.weight_qparams
    if transposed and layer.groups > 1 and grid is not None and grid.per_channel:
        _refuse(w, node, layer)  # stored as [in, out / groups, ...]: no axis holds all output channels
    before, after = padding(layer)
    source = node.args[0]
    pad = module_of(w.model, source)
    if isinstance(pad, nn.ZeroPad2d) and not transposed:
        left, right, top, bottom = pad.padding
        before, after, source = (
            [before[0] + top, before[1] + left],
            [after[0] + bottom, after[1] + right],
            source.args[0],
        )
    attributes = {
        "kernel_shape": layer.kernel_size,
        "strides": layer.stride,
        "dilations": layer.dilation,
        "pads": [*before, *after],
        "group": layer.groups,
    }
    if transposed:
        attributes["output_padding"] = layer.output_padding
    inputs = [w.values[source].name, *_parameters(w, node, layer, axis=1 if transposed else 0)]
    return w.add("ConvTranspose" if transposed else "Conv", inputs, node.name, **attributes)


def _zero_pad(w: _Writer, node: fx.Node, module: nn.ZeroPad2d) -> str | _Value:
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if all(isinstance(module_of(w.model, user), convolutions) for user in node.users):
        return w.values[node.args[0]]  # they pad it themselves
    left, right, top, bottom = module.padding
    return _pad(w, node, [0, 0, top, left, 0, 0, bottom, right])


def _pad(w: _Writer, node: fx.Node, amounts: Sequence[int]) -> str:
    return w.add("Pad", [w.source(node), w.sizes(f"{node.name}_pads", amounts)], node.name)


def _linear(w: _Writer, node: fx.Node, layer: nn.Linear) -> str:
    weight, bias = _parameters(w, node, layer)
    if len(shape(node)) == 2:
        return w.add("Gemm", [w.source(node), weight, bias], node.name, transB=1)
    turned = w.add("Transpose", [weight], f"{weight}_turned", perm=[1, 0])
    product = w.add("MatMul", [w.source(node), turned], f"{node.name}_product")
    return w.add("Add", [product, bias], node.name)


def _functional_linear(w: _Writer, node: fx.Node, _: None) -> str:
    source, weight, *bias = [*node.args, *node.kwargs.values()]
    if len(shape(node)) != 2:
        _refuse(w, node, None)
    inputs = [w.values[part].name for part in (source, weight, *bias) if part is not None]
    return w.add("Gemm", inputs, node.name, transB=1)


# ---------------------------------------------------------------------------- activations and arithmetic


def _elementwise(kind: str, *attributes: str, **constants: Any) -> Callable:
    """An operator with one input. attributes: the module's own that it has under the same name."""

    def rule(w: _Writer, node: fx.Node, module: nn.Module | None) -> str:
        own = {name: getattr(module, name) for name in attributes}
        return w.add(kind, [w.source(node)], node.name, **own, **constants)

    return rule


def _leaky_relu(w: _Writer, node: fx.Node, module: nn.LeakyReLU) -> str:
    return w.add("LeakyRelu", [w.source(node)], node.name, alpha=module.negative_slope)


def _prelu(w: _Writer, node: fx.Node, module: nn.PReLU) -> str:
    slope = w.constant(f"{node.name}_slope", per_channel(module.weight, len(shape(node))))
    return w.add("PRelu", [w.source(node), slope], node.name)


def _relu6(w: _Writer, node: fx.Node, module: nn.ReLU6) -> str:
    bounds = [w.constant(f"{node.name}_{name}", np.float32(value)) for name, value in (("low", 0), ("high", 6))]
    return w.add("Clip", [w.source(node), *bounds], node.name)


def _capped_relu(w: _Writer, node: fx.Node, module: CappedReLU) -> str:
    positive = w.add("Relu", [w.source(node)], f"{node.name}_relu")
    return w.add(
        "Min", [positive, w.constant(f"{node.name}_cap", per_channel(module.cap, len(shape(node))))], node.name
    )


def _silu(w: _Writer, node: fx.Node, module: nn.SiLU) -> str:
    gate = w.add("Sigmoid", [w.source(node)], f"{node.name}_gate")
    return w.add("Mul", [w.source(node), gate], node.name)


def _binary(kind: str) -> Callable:
    def rule(w: _Writer, node: fx.Node, _: None) -> str:
        if len(node.args) != 2 or node.kwargs:
            _refuse(w, node, None)
        return w.add(
            kind, [w.operand(node, argument, f"operand_{i}") for i, argument in enumerate(node.args)], node.name
        )

    return rule


def _softmax(w: _Writer, node: fx.Node, module: nn.Softmax | None) -> str:
    axis = _argument(node, 1, "dim", None) if module is None else module.dim
    return _refuse(w, node, module) if axis is None else w.add("Softmax", [w.source(node)], node.name, axis=axis)


def _reduce(kind: str) -> Callable:
    def rule(w: _Writer, node: fx.Node, _: None) -> str:
        axes = _argument(node, 1, "dim", None)
        if axes is None:
            _refuse(w, node, None)
        axes = w.sizes(f"{node.name}_axes", axes if isinstance(axes, tuple | list) else [axes])
        kept = int(_argument(node, 2, "keepdim", False))
        return w.add(kind, [w.source(node), axes], node.name, keepdims=kept)

    return rule


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    """An argument of a function or method, wherever it stands."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


# --------------------------------------------------------------------------------- pooling and resizing


def _pool(kind: str) -> Callable:
    def rule(w: _Writer, node: fx.Node, module: nn.MaxPool2d | nn.AvgPool2d) -> str:
        if getattr(module, "divisor_override", None) or getattr(module, "return_indices", False):
            _refuse(w, node, module)
        pads = [*_pair(module.padding), *_pair(module.padding)]
        attributes = {"kernel_shape": _pair(module.kernel_size), "strides": _pair(module.stride), "pads": pads}
        attributes["ceil_mode"] = int(module.ceil_mode)
        if kind == "MaxPool":
            attributes["dilations"] = _pair(module.dilation)
        else:
            attributes["count_include_pad"] = int(module.count_include_pad)
        return w.add(kind, [w.source(node)], node.name, **attributes)

    return rule


def _adaptive_pool(kind: str) -> Callable:
    def rule(w: _Writer, node: fx.Node, module: nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d) -> str | _Value:
        before, after = shape(node.args[0])[2:], shape(node)[2:]
        if before == after:
            return w.values[node.args[0]]
        if math.prod(after) == 1:
            return w.add(f"Global{kind}", [w.source(node)], node.name)
        if all(size % parts == 0 for size, parts in zip(before, after, strict=True)):
            kernel = [size // parts for size, parts in zip(before, after, strict=True)]
            return w.add(kind, [w.source(node)], node.name, kernel_shape=kernel, strides=kernel)
        if kind == "MaxPool":
            _refuse(w, node, module)
        rows, columns = (_averages(*pair) for pair in zip(before, after, strict=True))
        wide = w.add("MatMul", [w.source(node), w.constant(f"{node.name}_columns", columns.T)], f"{node.name}_wide")
        return w.add("MatMul", [w.constant(f"{node.name}_rows", rows), wide], node.name)

    return rule


def _averages(size: int, parts: int) -> Tensor:
    """Adaptive average pooling of one axis as a matrix [parts, size]; windows may overlap."""
    return F.adaptive_avg_pool1d(torch.eye(size), parts).T


def _resize(w: _Writer, node: fx.Node, module: nn.Upsample | None) -> str:
    """Interpolation to the size at hand."""
    if module is None:
        mode, aligned = _argument(node, 3, "mode", "nearest"), _argument(node, 4, "align_corners", False)
    else:
        mode, aligned = module.mode, module.align_corners
    kinds = {"nearest": "nearest", "bilinear": "linear", "bicubic": "cubic"}
    if mode not in kinds:
        _refuse(w, node, module)
    attributes = {"mode": kinds[mode], "cubic_coeff_a": -0.75}
    attributes["coordinate_transformation_mode"] = "align_corners" if aligned else "half_pixel"
    if mode == "nearest":
        attributes |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    factors = [_factor(*sides) for sides in zip(shape(node.args[0])[2:], shape(node)[2:], strict=True)]
    scales = w.constant(f"{node.name}_scales", np.array([1, 1, *factors], np.float32))
    return w.add("Resize", [w.source(node), "", scales], node.name, **attributes)


def _factor(before: int, after: int) -> np.float32:
    """The smallest float32 that makes at least `after` of `before`: engines round the product down."""
    factor = np.float32(after / before)
    while float(factor) * before < after:
        factor = np.nextafter(factor, np.float32(np.inf))
    return factor


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


# ------------------------------------------------------------------------------------- moving values


def _reshape(w: _Writer, node: fx.Node, module: nn.Module | None) -> str:
    """Any change of shape alone. The batch is, or leads, the first axis."""
    return w.add("Reshape", [w.source(node), w.sizes(f"{node.name}_shape", [-1, *shape(node)[1:]])], node.name)


def _same(w: _Writer, node: fx.Node, module: nn.Module | None) -> _Value:
    return w.values[node.args[0]]


def _expand(w: _Writer, node: fx.Node, _: None) -> str:
    return w.add("Expand", [w.source(node), w.sizes(f"{node.name}_shape", shape(node))], node.name)


def _permute(w: _Writer, node: fx.Node, _: None) -> str:
    order = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
    return _transpose_to(w, node, list(order))


def _transpose(w: _Writer, node: fx.Node, _: None) -> str:
    order = list(range(len(shape(node))))
    first, second = node.args[1:]
    order[first], order[second] = order[second], order[first]
    return _transpose_to(w, node, order)


def _transpose_to(w: _Writer, node: fx.Node, order: list[int]) -> str:
    return w.add("Transpose", [w.source(node)], node.name, perm=[axis % len(order) for axis in order])


def _concat(w: _Writer, node: fx.Node, _: None) -> str:
    parts = [w.operand(node, part, "part") for part in node.args[0]]
    return w.add("Concat", parts, node.name, axis=_argument(node, 1, "dim", 0))


def _stack(w: _Writer, node: fx.Node, _: None) -> str:
    axis, size = _argument(node, 1, "dim", 0), list(shape(node))
    size[axis] = 1
    thin = w.sizes(f"{node.name}_shape", [-1, *size[1:]])
    parts = [
        w.add("Reshape", [w.operand(node, part, "part"), thin], f"{node.name}_part_{i}")
        for i, part in enumerate(node.args[0])
    ]
    return w.add("Concat", parts, node.name, axis=axis)


def _split(w: _Writer, node: fx.Node, _: None) -> list[_Value]:
    """Slices; each stays on the grid of the whole."""
    axis, start, parts = _argument(node, 2, "dim", 0), 0, []
    for i, part in enumerate(node.meta["tensor_meta"]):
        name, stop = f"{node.name}_{i}", start + part.shape[axis]
        sliced = _slice(w, w.source(node), name, [(axis, start, stop, 1)])
        grid = w.values[node.args[0]].grid
        parts.append(_Value(sliced) if grid is None else w.quantize(sliced, f"{name}_on_grid", grid))
        start = stop
    return parts


def _getitem(w: _Writer, node: fx.Node, _: None) -> str | _Value:
    source, index = node.args
    if isinstance(w.values[source], list):
        return w.values[source][index]
    index = index if isinstance(index, tuple) else (index,)
    if index.count(Ellipsis):
        at = index.index(Ellipsis)
        missing = len(shape(source)) - sum(part is not None for part in index) + 1
        index = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
    ranges = []
    for axis, part in enumerate(part for part in index if part is not None):
        if isinstance(part, int):
            part = part % shape(source)[axis]
            ranges.append((axis, part, part + 1, 1))
        elif isinstance(part, slice) and all(isinstance(end, int | None) for end in (part.start, part.stop, part.step)):
            if part != slice(None):
                ranges.append((axis, *part.indices(shape(source)[axis])))
        else:
            _refuse(w, node, None)
    sliced = _slice(w, w.source(node), f"{node.name}_slice", ranges) if ranges else w.source(node)
    return w.add("Reshape", [sliced, w.sizes(f"{node.name}_shape", [-1, *shape(node)[1:]])], node.name)


def _slice(w: _Writer, source: str, name: str, ranges: Sequence[tuple[int, int, int, int]]) -> str:
    """ranges: (axis, start, stop, step) for each axis that is cut."""
    axes, starts, stops, steps = (
        w.sizes(f"{name}_{kind}", values)
        for kind, values in zip(("axes", "starts", "stops", "steps"), zip(*ranges, strict=True), strict=True)
    )
    return w.add("Slice", [source, starts, stops, axes, steps], name)


def _functional_pad(w: _Writer, node: fx.Node, _: None) -> str:
    amounts = list(node.args[1])
    if node.kwargs.get("mode", "constant") != "constant" or any(node.args[2:]) or node.kwargs.get("value"):
        _refuse(w, node, None)
    dims = len(shape(node))
    amounts += [0] * (2 * dims - len(amounts))  # torch counts from the last axis
    return _pad(w, node, [*amounts[0::2][::-1], *amounts[1::2][::-1]])


def _pixel_shuffle(w: _Writer, node: fx.Node, module: nn.PixelShuffle) -> str:
    return w.add("DepthToSpace", [w.source(node)], node.name, blocksize=module.upscale_factor, mode="CRD")


def _channel_shuffle(w: _Writer, node: fx.Node, module: nn.ChannelShuffle) -> str:
    _, channels, *sides = shape(node)
    split = w.sizes(f"{node.name}_split", [-1, module.groups, channels // module.groups, *sides])
    groups = w.add("Reshape", [w.source(node), split], f"{node.name}_groups")
    turned = w.add("Transpose", [groups], f"{node.name}_turned", perm=[0, 2, 1, *range(3, 3 + len(sides))])
    return w.add("Reshape", [turned, w.sizes(f"{node.name}_shape", [-1, channels, *sides])], node.name)


_RULES: dict[Any, Callable[[_Writer, fx.Node, nn.Module | None], str | _Value | list[_Value]]] = {
    Quantizer: _quantizer,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _convolution),
    nn.Linear: _linear,
    F.linear: _functional_linear,
    nn.ReLU: _elementwise("Relu"),
    nn.ReLU6: _relu6,
    CappedReLU: _capped_relu,
    nn.LeakyReLU: _leaky_relu,
    nn.PReLU: _prelu,
    nn.ELU: _elementwise("Elu", "alpha"),
    nn.GELU: _elementwise("Gelu", "approximate"),
    nn.SiLU: _silu,
    nn.Mish: _elementwise("Mish"),
    nn.Softplus: _elementwise("Softplus"),
    nn.Sigmoid: _elementwise("Sigmoid"),
    nn.Hardsigmoid: _elementwise("HardSigmoid", alpha=1 / 6, beta=0.5),
    nn.Hardswish: _elementwise("HardSwish"),
    nn.Tanh: _elementwise("Tanh"),
    **dict.fromkeys((nn.Softmax, F.softmax, torch.softmax, "softmax"), _softmax),
    operator.add: _binary("Add"),
    operator.mul: _binary("Mul"),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), _binary("Sub")),
    **dict.fromkeys((operator.truediv, torch.div, "div"), _binary("Div")),
    **dict.fromkeys((operator.matmul, torch.matmul, "matmul"), _binary("MatMul")),
    **dict.fromkeys((torch.sum, "sum"), _reduce("ReduceSum")),
    **dict.fromkeys((torch.mean, "mean"), _reduce("ReduceMean")),
    nn.MaxPool2d: _pool("MaxPool"),
    nn.AvgPool2d: _pool("AveragePool"),
    nn.AdaptiveAvgPool2d: _adaptive_pool("AveragePool"),
    nn.AdaptiveMaxPool2d: _adaptive_pool("MaxPool"),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d, F.interpolate), _resize),
    nn.Flatten: _reshape,
    **dict.fromkeys((torch.flatten, "flatten", torch.reshape, "reshape", "view", "unflatten"), _reshape),
    **dict.fromkeys((torch.unsqueeze, "unsqueeze", torch.squeeze, "squeeze"), _reshape),
    "contiguous": _same,
    **dict.fromkeys(("expand", "expand_as"), _expand),
    **dict.fromkeys((torch.permute, "permute"), _permute),
    **dict.fromkeys((torch.transpose, "transpose"), _transpose),
    torch.cat: _concat,
    torch.stack: _stack,
    **dict.fromkeys((torch.split, "split", torch.chunk, "chunk"), _split),
    operator.getitem: _getitem,
    nn.ZeroPad2d: _zero_pad,
    F.pad: _functional_pad,
    nn.PixelShuffle: _pixel_shuffle,
    nn.ChannelShuffle: _channel_shuffle,
}
