"""The quantized network as an ONNX file, which is there only once it is known to work."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor, fx

from utils.backends.onnx_writer import onnx_model
from utils.backends.onnxruntime.session import Kernels, OnnxNetwork, find_kernels
from utils.backends.parity import Parity, compare, integers_of
from utils.core.errors import UserError
from utils.core.files import atomic_write
from utils.core.input_spec import InputSpec
from utils.core.predictions import Predictions, channel_predictions
from utils.graph.nodes import first_line, module_of, outputs_of
from utils.passes.result import Quantized
from utils.quantization.quantizer import Quantizer
from utils.quantization.target import DEFAULT, TARGETS, Target

PROBES = 8  # images that engine and simulation are compared on


@dataclass(frozen=True)
class Exported:
    """size: of the file in bytes; float_size: of the same weights in float32."""

    file: Path
    size: int
    float_size: int
    opset: int
    parity: Parity
    kernels: Kernels

    def __str__(self) -> str:
        size = (
            f"exported {self.file}: ONNX opset {self.opset}, {self.size / 1e6:.2f} MB, "
            f"{self.size / self.float_size:.2f} of its float32 weights"
        )
        return f"{size}\n{self.kernels}\n  {self.parity}"


def build(
    quantized: Quantized,
    spec: InputSpec,
    metadata: Mapping[str, Any],
    opset: int | None = None,
    target: Target = TARGETS[DEFAULT],
) -> onnx.ModelProto:
    """The model, checked by ONNX's own checker, shapes included.

    opset: the lowest that will do, if None. target: the one that the network was quantized for.
    """
    model = onnx_model(quantized.simulated, spec, metadata, opset, target)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"the network has no form in ONNX: {first_line(error)}; nothing was exported") from error
    return model


def describe_kernels(model: onnx.ModelProto, quantized: Quantized) -> Kernels:
    return find_kernels(model, quantized.simulated)


def check_parity(
    model: onnx.ModelProto, simulated: fx.GraphModule, images: Tensor, predictions: Predictions = channel_predictions
) -> Parity:
    """Engine against simulation, layer by layer; over the bounds of utils.backends.parity it is a UserError.

    The engine runs a copy of the model that also hands out its uint8 tensors. In ONNX Runtime this adds
    changes of layout between its kernels, and leaves the kernels themselves as they are.
    """
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    for node in simulated.graph.nodes:
        if isinstance(quantizer := module_of(simulated, node), Quantizer):
            name = integers_of(node, quantizer)
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(name.rpartition("_")[2]))
            opened.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    parity = compare(simulated, OnnxNetwork(opened.SerializeToString()).tensors, images, predictions)
    parity.check()
    return parity


def export(
    quantized: Quantized,
    spec: InputSpec,
    file: Path,
    metadata: Mapping[str, Any],
    images: Tensor | None = None,
    predictions: Predictions = channel_predictions,
    opset: int | None = None,
) -> Exported:
    """Write the file, read it back, check it and run it; a file of that name stays as it is until all is well.

    images: to compare engine and simulation on (default: random ones). predictions: of the network's outputs. opset: of
    ONNX (default: the lowest that will do). Too large a difference, bits, operators or an opset that the file cannot have,
    and a file that cannot be written are UserErrors.
    """
    images = spec.probe(PROBES) if images is None else images
    model = build(quantized, spec, metadata, opset)
    parity = check_parity(model, quantized.simulated, images, predictions)
    kernels = describe_kernels(model, quantized)
    with atomic_write(file) as beside:
        onnx.save(model, beside)
        onnx.checker.check_model(str(beside), full_check=True)
        expected = outputs_of(OnnxNetwork(model.SerializeToString())(images))
        if not all(map(torch.equal, outputs_of(OnnxNetwork(beside)(images)), expected)):
            raise UserError(f"{str(file)!r} reads back otherwise than it was written; is the disk sound?")
        size = beside.stat().st_size
    float_size = sum(4 * tensor.numel() for tensor in quantized.simulated.parameters())
    return Exported(file, size, float_size, model.opset_import[0].version, parity, kernels)
