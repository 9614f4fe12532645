"""The simulated network as an ONNX model: the same graph, node by node, with integers where they belong.

Standard operators only. A quantizer becomes QuantizeLinear and DequantizeLinear (QDQ) with its scale and zero
point; weights are initialisers of 8 bits and biases of 32, on the grid of weight scale times input scale, each behind a
DequantizeLinear, or floats. From this form engines make integer kernels by themselves. What is signed is the target's
(utils/quantization/target.py). From opset WITH_INT4 on weights of 4 bits are stored in 4, behind a Cast to 8: ONNX Runtime
does it once, as it loads the file, and takes its integer kernels, where a DequantizeLinear of 4 bits runs in float.
Tensors have the names of the graph's nodes, nodes those of the layers. Sizes are those of one image;
only the batch is dynamic. An operator that the table lacks is written by torch.onnx.
"""

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from utils.backends.base import FLOAT_LAYERS, INPUT, is_own
from utils.backends.batch_axes import BatchAxes
from utils.backends.onnx_modules import MODULES, Value
from utils.backends.torch_onnx import TORCH_OPSET, Input, exported_by_torch, part_of
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.graph.nodes import describe, is_tensor, module_of, shape
from utils.graph.onnx_elementwise import ELEMENTWISE
from utils.graph.ops import operator_of
from utils.quantization.qparams import QParams
from utils.quantization.quantizer import Quantizer
from utils.quantization.target import DEFAULT, TARGETS, Target

OPSET = 13  # of 2020: the first whose DequantizeLinear knows scales per channel
WITH_INT4 = 21  # whose Cast knows integers of 4 bits; ONNX Runtime has it since 1.23
WITH_MIN = 22  # who asks for this has an ONNX Runtime with a Min of uint8, which 1.23 still lacks
IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10}
INT4 = {torch.int8: (TensorProto.INT4, "int4"), torch.uint8: (TensorProto.UINT4, "uint4")}
_KINDS = {torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32, torch.bool: TensorProto.BOOL}
aten = torch.ops.aten


def onnx_model(
    simulated: fx.GraphModule,
    spec: InputSpec,
    metadata: Mapping[str, Any],
    opset: int | None = None,
    target: Target = TARGETS[DEFAULT],
    weight_type: str | None = None,
) -> onnx.ModelProto:
    """What a file holds. metadata: by key, anything that JSON can say. opset: the lowest that will do, if None.

    target: whose engine the network was quantized for. weight_type: one of its weights, the first if None. Caps per channel are written so that any runtime takes them; from
    opset WITH_MIN on as a Min of integers, which is faster.
    Parameters of other than 8 bits (biases: 32), and an operator that neither the table nor torch.onnx can write, are
    a UserError.
    """
    if target.caps == "between" and opset is not None and opset >= WITH_MIN:
        target = replace(target, caps="integers")
    weight_type = weight_type or target.weights[0]
    writer = _Writer(simulated, spec, opset or OPSET, target, weight_type)
    try:
        writer.write_all()
    except _NeedsOpset as needed:
        if opset is not None and opset < TORCH_OPSET:
            raise UserError(
                f"{needed}, which torch.onnx writes, needs opset {TORCH_OPSET} or newer, not {opset}; "
                f"pass --opset {TORCH_OPSET}, or leave out --opset"
            ) from None
        writer = _Writer(simulated, spec, TORCH_OPSET, target, weight_type)
        writer.write_all()
    batch = simulated.meta.get("batch") or "N"
    image = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [batch, *spec.shape()[1:]])
    read = {name for node in writer.nodes for name in node.input}
    constants = [tensor for tensor in writer.initializers if tensor.name in read]
    graph = helper.make_graph(writer.nodes, "dfq", [image], writer.outputs, constants)
    opsets = [helper.make_opsetid("", writer.opset)]
    version = IR_VERSIONS.get(writer.opset, max(IR_VERSIONS.values()))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=version, producer_name="dfq")
    about = {**metadata, FLOAT_LAYERS: writer.float_layers}
    helper.set_model_props(model, {key: json.dumps(value) for key, value in about.items()})
    return model


class _NeedsOpset(Exception):
    """Of an operator that torch.onnx has to write, in words: it writes newer opsets alone."""


class _Writer:
    """What has been written so far, and the values that fx nodes have become."""

    def __init__(self, model: fx.GraphModule, spec: InputSpec, opset: int, target: Target, weight_type: str):
        self.model, self.opset, self.batch_axes = model, opset, BatchAxes(model, spec)
        self.target, self.weight_type = target, weight_type
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.values: dict[fx.Node, Value | list[Value]] = {}
        self.float_layers: list[str] = []

    def write_all(self) -> None:
        for node in self.model.graph.nodes:
            self.write(node)

    def write(self, node: fx.Node) -> None:
        """Write what the node does to tensors; what it does to sizes is known already."""
        if node.op == "placeholder":
            self.values[node] = Value(INPUT)
        elif node.op == "output":
            self._outputs(node)
        elif node.op == "get_attr":
            self.values[node] = Value(self.constant(node.name, self.tensor(node)))
        elif node.op == "call_module":
            module = module_of(self.model, node)
            rule = next(rule for kind, rule in MODULES.items() if isinstance(module, kind))
            result = rule(self, node, module)
            self.values[node] = result if isinstance(result, Value) else Value(result)
        elif node.target is operator.getitem:
            self.values[node] = self.values[node.args[0]][node.args[1]]
        elif "tensor_meta" in node.meta and node.users:  # else it is a size, or a check
            self._operator(node)

    def _operator(self, node: fx.Node) -> None:
        row = operator_of(node)
        form = row.onnx or ELEMENTWISE.get(node.target)
        result = form(self, node, *node.args, **node.kwargs) if form else None
        if result is None:
            result = self.by_torch(node, *part_of(self.model, node))
        if isinstance(result, list):
            values = [Value(name) for name in result]
            self.values[node] = [self._on_grid(node, result[0], result[0]), *values[1:]] if row.keeps_grid else values
        elif row.keeps_grid:
            self.values[node] = self._on_grid(node, result, node.name)
        else:
            self.values[node] = Value(result)

    # ---------------------------------------------------------------- what forms (utils/graph/onnx_forms) call

    def add(
        self, kind: str, inputs: Sequence[str], name: str, outputs: Sequence[str] | None = None, **attributes: Any
    ) -> str:
        """Append an operator with one output of that name, or with these outputs; returns the first."""
        if "axes" in attributes and (kind == "ReduceSum" or self.opset >= 18):  # where they became an input
            inputs = [*inputs, self.sizes(f"{name}_axes", attributes.pop("axes"))]
        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs or [name]), name=name, **attributes))
        return (outputs or [name])[0]

    def constant(self, name: str, value: Tensor | np.ndarray) -> str:
        array = value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else value
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def packed(self, name: str, values: Tensor) -> str:
        """A constant of integers of 4 bits, signed or not as the values' type, two in a byte, the first in the lower half."""
        halves = nn.functional.pad(values.flatten().view(torch.uint8) & 15, (0, values.numel() % 2)).numpy()
        bytes_ = (halves[::2] | halves[1::2] << 4).tobytes()
        kind, suffix = INT4[values.dtype]
        name = f"{name}_{suffix}"
        self.initializers.append(helper.make_tensor(name, kind, list(values.shape), bytes_, raw=True))
        return name

    def number(self, name: str, value: float) -> str:
        return self.constant(name, np.float32(value))

    def sizes(self, name: str, values: Sequence[int]) -> str:
        return self.constant(name, np.array(values, np.int64))

    def tensor(self, node: fx.Node) -> Tensor:
        """The constant that a get_attr node stands for."""
        module, _, attribute = node.target.rpartition(".")
        return getattr(node.graph.owning_module.get_submodule(module), attribute)

    def name(self, node: fx.Node) -> str:
        return self.values[node].name

    def operand(self, argument: Any, name: str) -> str:
        """The tensor that an argument stands for, as floats; a number becomes a constant."""
        if not isinstance(argument, fx.Node):
            return self.number(name, argument)
        meta = argument.meta.get("tensor_meta")
        if meta is None or meta.dtype.is_floating_point:
            return self.name(argument)
        return self.add("Cast", [self.name(argument)], f"{name}_as_float", to=TensorProto.FLOAT)

    def on_grid(self, node: fx.Node) -> bool:
        """Whether a tensor comes from a DequantizeLinear, so that an engine may run what reads it on integers."""
        return self.values[node].grid is not None

    def full_shape(self, node: fx.Node) -> list[int] | None:
        """The node's shape with -1 for the batch; None where several axes grow with it."""
        free = self.batch_axes.of(node)
        return [-1 if axis in free else side for axis, side in enumerate(shape(node))] if len(free) < 2 else None

    def quantize(self, source: str, name: str, grid: tuple[float, int], cap: Tensor | None = None) -> Value:
        """Round a tensor to a grid of 8 bits. cap: per-channel bounds that broadcast over it, in steps of the grid."""
        kind = np.dtype(np.int8 if self.target.signed else np.uint8)
        scale = self.constant(f"{name}_scale", np.float32(grid[0]))
        zero = self.constant(f"{name}_zero_point", np.asarray(grid[1], kind))
        integers = f"{name}_{kind.name}"
        self.add("QuantizeLinear", [source, scale, zero], integers if cap is None else f"{name}_uncapped")
        if cap is not None:
            bounds = self.constant(f"{name}_cap", cap.numpy().astype(kind))
            self.add("Min", [f"{name}_uncapped", bounds], integers)
        return Value(self.add("DequantizeLinear", [integers, scale, zero], name), grid)

    def layer_input(self, node: fx.Node, layer: nn.Module) -> str:
        """What a layer reads. For one that is kept in float, dequantized with the same scale for every channel.

        ONNX Runtime rounds the float weights of a layer to int8 where its input has a single scale (its transformer
        WeightBiasQuantization, on by default).
        """
        value = self.values[node]
        if value.grid is None or layer.weight_qparams is not None or (channels := shape(node)[1]) == 1:
            return value.name
        if not is_own(DEFAULT, self.target):  # TensorRT takes no activations with scales by channel
            return value.name
        name = f"{value.name}_by_channel"
        if name not in {tensor.output[0] for tensor in self.nodes}:
            scales = self.constant(f"{name}_scale", np.full(channels, value.grid[0], np.float32))
            zeros = self.constant(f"{name}_zero_point", np.full(channels, value.grid[1], np.uint8))
            self.add("DequantizeLinear", [f"{value.name}_uint8", scales, zeros], name, axis=1)
        return name

    def _free(self, names: Sequence[str]) -> None:
        """Rename the tensors inside that have an output's name, as where a layer is called as what it hands out."""
        made = {output for node in self.nodes for output in node.output}
        taken = {name: f"{name}_inside" for name in names if name in made}
        for node in self.nodes:
            for values in (node.input, node.output):
                values[:] = [taken.get(value, value) for value in values]

        def renamed(value: Value | list[Value]) -> Value | list[Value]:
            if isinstance(value, list):
                return [renamed(part) for part in value]
            return replace(value, name=taken.get(value.name, value.name))

        self.values = {node: renamed(value) for node, value in self.values.items()}

    def parameter(self, name: str, values: Tensor, qparams: QParams | None, kind: torch.dtype, axis: int = 0) -> str:
        """A weight or bias: integers behind their DequantizeLinear, or floats where it is not quantized."""
        if qparams is None:
            return self.constant(name, values)
        along = [1] * values.dim()
        along[axis] = -1
        along = along if qparams.per_channel else []
        packed = kind in INT4 and qparams.bits <= 4 and self.opset >= WITH_INT4
        zero_point = _zero_point(qparams, kind, packed)
        zero = zero_point.reshape(along)
        steps = ((values.double() / qparams.scale.reshape(along).double()).round() + zero).to(kind)
        if not packed:
            integers = self.constant(f"{name}_{_word(kind)}", steps)
        elif len(zero_point.unique()) == 1:
            integers = self.cast(self.packed(name, steps), f"{name}_{_word(kind)}", kind)
        else:  # a zero point for every channel, which no kernel is to know
            middle = 128 if kind == torch.uint8 else 0
            wide = self.cast(self.packed(name, steps), f"{name}_int32", torch.int32)
            own = self.constant(f"{name}_own_zero_point", (zero - middle).int())
            counted = self.add("Sub", [wide, own], f"{name}_from_zero")
            integers = self.cast(counted, f"{name}_{_word(kind)}", kind)
            zero_point = torch.full_like(zero_point, middle)
        zeros = self.constant(f"{name}_zero_point", zero_point.to(kind))
        scales = self.constant(f"{name}_scale", qparams.scale.float())
        options = {"axis": axis} if qparams.per_channel else {}
        return self.add("DequantizeLinear", [integers, scales, zeros], name, **options)

    def cast(self, source: str, name: str, kind: torch.dtype) -> str:
        return self.add("Cast", [source], name, to=getattr(TensorProto, _word(kind).upper()))

    # ------------------------------------------------------------------------------------ the rest

    def _on_grid(self, node: fx.Node, result: str, name: str) -> Value:
        """What only moved values of one grid, back on it; where a quantizer alone reads them, they stay as they are: of two
        quantizers in a row ONNX Runtime makes one, and then leaves the layer behind it in float."""
        if node.users and all(isinstance(module_of(self.model, user), Quantizer) for user in node.users):
            return Value(result)
        read = [s for s in node.all_input_nodes if is_tensor(s) and s.meta["tensor_meta"].dtype.is_floating_point]
        inputs = [self.values[source] for source in read if isinstance(self.values.get(source), Value)]
        grids = {value.grid for value in inputs}
        if len(grids) != 1 or None in grids:
            return Value(result)
        return self.quantize(result, f"{name}_on_grid", grids.pop())

    def _outputs(self, node: fx.Node) -> None:
        results = node.args[0] if isinstance(node.args[0], tuple | list) else [node.args[0]]
        names = self.model.meta.get("outputs") or [f"output_{i}" for i in range(len(results))]
        self._free(names)
        for name, result in zip(names, results, strict=True):
            self.add("Identity", [self.name(result)], f"{name}_handed_out", [name])
            batch = self.model.meta.get("batch") or "N"
            kind = _KINDS.get(result.meta["tensor_meta"].dtype, TensorProto.FLOAT)
            info = helper.make_tensor_value_info(name, kind, [batch, *shape(result)[1:]])
            self.outputs.append(info)

    def by_torch(self, node: fx.Node, module: nn.Module, inputs: Sequence[fx.Node]) -> str | list[str]:
        what = describe(module_of(self.model, node), node)
        if self.opset < TORCH_OPSET:
            raise _NeedsOpset(what)
        read = [
            Input(
                self.name(source),
                torch.zeros(self.batch_axes.for_two(source), dtype=source.meta["tensor_meta"].dtype),
                self.batch_axes.of(source),
            )
            for source in inputs
        ]
        nodes, initializers, outputs = exported_by_torch(module, read, self.opset, node.name, what)
        self.nodes += nodes
        self.initializers += initializers
        return outputs[0] if is_tensor(node) else outputs


def _word(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _zero_point(qparams: QParams, kind: torch.dtype, packed: bool) -> Tensor:
    """From where a file counts a parameter's steps, like qparams.zero_point; packed: in 4 bits.

    From 0, or from the middle of unsigned integers, where there is room for that: in 8 bits for weights of fewer, whatever
    their zero point. So engines need no zero points of weights. What fills its integers keeps its own.
    """
    half = 8 if packed else 128
    middle = half if kind == torch.uint8 else 0
    if qparams.quant_min < 0 or (qparams.bits < 8 and not packed):
        return torch.full_like(qparams.zero_point, middle)
    return qparams.zero_point - (half - middle)
