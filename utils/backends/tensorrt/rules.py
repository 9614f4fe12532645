"""What TensorRT asks of a file with explicit quantization, each rule with its source, checked without TensorRT.

Nothing here was run on its hardware: a file that keeps these rules is one that its documentation and its ONNX parser
describe as valid.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from utils.backends.base import FLOAT_LAYERS
from utils.core.errors import UserError

GUIDE = 'NVIDIA TensorRT documentation, "Working with Quantized Types"'
PARSER = "onnx-tensorrt, onnxOpImporters.cpp, QuantDequantLinearHelper"
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MOVES = ("Reshape", "Transpose", "Identity", "Flatten", "Squeeze", "Unsqueeze")  # what may stand before a weight


class _File:
    """A model's nodes, by what they make and what reads them."""

    def __init__(self, model: onnx.ModelProto):
        self.model, self.nodes = model, model.graph.node
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.made_by = {name: node for node in self.nodes for name in node.output}

    @cached_property
    def readers(self) -> dict[str, list[onnx.NodeProto]]:
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def float_layers(self) -> list[str]:
        """The layers that the file says are in float on purpose."""
        return json.loads({prop.key: prop.value for prop in self.model.metadata_props}.get(FLOAT_LAYERS, "[]"))

    def of(self, *kinds: str) -> Iterator[onnx.NodeProto]:
        return (node for node in self.nodes if node.op_type in kinds)

    def values(self, name: str) -> np.ndarray | None:
        """A constant, or None for what is computed."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def zero_point(self, node: onnx.NodeProto) -> np.ndarray | None:
        return self.values(node.input[2]) if len(node.input) > 2 else None

    def dequantized(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear that a value comes from, past what only moves it."""
        node = self.made_by.get(self._moved(name))
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def is_weight(self, name: str) -> bool:
        """Whether a value is a constant, quantized or not; else the network computes it."""
        quantized = self.dequantized(name)
        return self._moved(quantized.input[0] if quantized else name) in self.constants

    def _moved(self, name: str) -> str:
        """The tensor whose values a tensor holds, elsewhere or in another shape."""
        while name in self.made_by and self.made_by[name].op_type in _MOVES:
            name = self.made_by[name].input[0]
        return name


def _unsigned(file: _File) -> Iterator[str]:
    for node in file.of("QuantizeLinear", "DequantizeLinear"):
        zero = file.zero_point(node)
        if zero is None or zero.dtype != np.int8:  # without one, ONNX means uint8
            yield f"{node.name}: {'uint8' if zero is None else zero.dtype}"


def _zero_points(file: _File) -> Iterator[str]:
    for node in file.of("QuantizeLinear", "DequantizeLinear"):
        zero = file.zero_point(node)
        if zero is not None and zero.any():
            yield f"{node.name}: zero point {zero.flat[0]}"


def _scales(file: _File) -> Iterator[str]:
    for node in file.of("QuantizeLinear", "DequantizeLinear"):
        scale = file.values(node.input[1])
        if scale is None or not (scale > 0).all():
            yield node.name


def _float_biases(file: _File) -> Iterator[str]:
    for node in file.of(*LAYERS):
        if len(node.input) > 2 and file.dequantized(node.input[2]) is not None:
            yield f"{node.name}: its bias comes from a DequantizeLinear"


def _activation_scales(file: _File) -> Iterator[str]:
    for node in file.of("QuantizeLinear", "DequantizeLinear"):
        scale = file.values(node.input[1])
        if node.input[0] not in file.constants and scale is not None and scale.size != 1:
            yield f"{node.name}: {scale.size} scales"


def _weight_scales(file: _File) -> Iterator[str]:
    for node in file.of("DequantizeLinear"):
        weight, scale = file.values(node.input[0]), file.values(node.input[1])
        if weight is None or scale is None or scale.size == 1:
            continue
        axis = next((one.i for one in node.attribute if one.name == "axis"), 1)
        transposed = any(reader.op_type == "ConvTranspose" for reader in file.readers.get(node.output[0], ()))
        if axis != int(transposed) or weight.shape[axis] != scale.size:
            yield f"{node.name}: {scale.size} scales along axis {axis} of {weight.shape}"


def _inputs_of_layers(file: _File) -> Iterator[str]:
    for node in file.of(*LAYERS):
        quantized = [file.dequantized(name) is not None for name in node.input[:2]]
        meant = node.name.removesuffix("_product") in file.float_layers or not file.is_weight(node.input[1])
        if any(quantized) and not all(quantized) and not meant:
            yield f"{node.name}: its {'weights' if quantized[0] else 'input'} in float, the other quantized"


def _inputs_of_sums(file: _File) -> Iterator[str]:
    for node in file.of("Add"):
        quantized = [file.dequantized(name) is not None for name in node.input]
        if any(quantized) and not all(quantized) and not any(name in file.constants for name in node.input):
            yield f"{node.name}: one input in float, the other quantized"


def _pairs(file: _File) -> Iterator[str]:
    for node in file.of("DequantizeLinear"):
        source = file.made_by.get(node.input[0])
        if node.input[0] not in file.constants and (source is None or source.op_type != "QuantizeLinear"):
            yield f"{node.name}: behind {source.op_type if source is not None else 'an input'}"


@dataclass(frozen=True)
class Rule:
    """text: what must hold. source: who says so. broken: where it does not, in words."""

    text: str
    source: str
    broken: Callable[[_File], Iterator[str]]


RULES = (
    Rule("QuantizeLinear and DequantizeLinear are int8, never uint8 or int32", PARSER, _unsigned),
    Rule("zero points are 0", f"{PARSER}; {GUIDE} (symmetric quantization)", _zero_points),
    Rule("scales are constants above 0", PARSER, _scales),
    Rule(
        "biases are in float: no DequantizeLinear makes one",
        'onnx-tensorrt, issue 850, and microsoft/onnxruntime, issue 14229 ("only activation types allowed")',
        _float_biases,
    ),
    Rule(
        "activations have one scale each", f"{PARSER}; {GUIDE} (recommendations on Q/DQ placement)", _activation_scales
    ),
    Rule("weights have one scale, or one for every output channel", PARSER, _weight_scales),
    Rule(
        "a layer's input and its weights are both quantized, or neither, unless the file says that it is in float",
        f'{GUIDE}, "Quantize all inputs of weighted operations"',
        _inputs_of_layers,
    ),
    Rule(
        "both operands of a sum are quantized, or neither",
        f'{GUIDE}, "Quantize the residual input in skip connections"; one float operand makes the sum float',
        _inputs_of_sums,
    ),
    Rule(
        "nothing stands between a QuantizeLinear and its DequantizeLinear",
        f"{GUIDE}, explicit quantization: layers are fused with the pairs around them, and have no integer arithmetic",
        _pairs,
    ),
)


def check_tensorrt(file: Path | onnx.ModelProto) -> None:
    """Refuse a file that breaks a rule: a UserError that names the rule, its source and the first place."""
    model = file if isinstance(file, onnx.ModelProto) else onnx.load(file)
    read = _File(model)
    for rule in RULES:
        places = list(rule.broken(read))
        if places:
            raise UserError(
                f"TensorRT would not take this file: {rule.text} ({rule.source}); {len(places)} place(s) break it, first "
                f"{places[0]}; nothing was exported"
            )
