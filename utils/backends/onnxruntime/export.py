"""The quantized network as an ONNX file, which is there only once it is known to work."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor, fx

from utils.backends.base import Kernels, is_own, load_engine, missing_package
from utils.backends.onnx_writer import WITH_INT4, WITH_MIN, onnx_model
from utils.backends.onnxruntime.session import PRECISE, sums_exactly
from utils.backends.parity import Parity, compare, integers_of
from utils.core.errors import UserError
from utils.core.files import atomic_write
from utils.core.input_spec import InputSpec
from utils.core.predictions import Predictions, channel_predictions
from utils.graph.nodes import first_line, module_of, outputs_of, weighted_nodes
from utils.passes.result import Quantized
from utils.quantization.quantizer import Quantizer
from utils.quantization.target import DEFAULT, TARGETS, Target, check_weight_type

PROBES = 8  # images that engine and simulation are compared on


@dataclass(frozen=True)
class Exported:
    """size: of the file in bytes; float_size: of the same weights in float32. kernels: None where the target's engine is
    not here. notes: on what was not checked."""

    file: Path
    size: int
    float_size: int
    opset: int
    parity: Parity
    kernels: Kernels | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        size = (
            f"exported {self.file}: ONNX opset {self.opset}, {self.size / 1e6:.2f} MB, "
            f"{self.size / self.float_size:.2f} of its float32 weights"
        )
        kernels = [str(self.kernels)] if self.kernels else []
        return "\n".join([size, *kernels, f"  {self.parity}", *(f"  note: {note}" for note in self.notes)])


def build(
    quantized: Quantized,
    spec: InputSpec,
    metadata: Mapping[str, Any],
    opset: int | None = None,
    target: Target = TARGETS[DEFAULT],
    weight_type: str | None = None,
) -> onnx.ModelProto:
    """The model, checked by ONNX's own checker, shapes included, and by the rules of its target.

    opset: the lowest that will do, if None. target: the one that the network was quantized for. weight_type: of those that
    the target's files may hold; None: the fastest that is exact here.
    """
    check_weight_type(target, weight_type)
    model = onnx_model(quantized.simulated, spec, metadata, opset, target, weight_type or exact_weight_type(target))
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"the network has no form in ONNX: {first_line(error)}; nothing was exported") from error
    if target.rules:
        module, _, name = target.rules.partition(":")
        getattr(import_module(module), name)(model)
    return model


def exact_weight_type(target: Target) -> str:
    """How a file holds weights if nobody says: int8, or uint8 where ONNX Runtime's sums of products with int8 saturate here."""
    return target.weights[0 if sums_exactly() else -1]


def describe_kernels(model: onnx.ModelProto, quantized: Quantized, engine: str = DEFAULT) -> Kernels:
    return load_engine(engine).find_kernels(model, quantized.simulated)


def check_parity(
    model: onnx.ModelProto,
    simulated: fx.GraphModule,
    images: Tensor,
    predictions: Predictions = channel_predictions,
    engine: str = DEFAULT,
    target: Target = TARGETS[DEFAULT],
) -> Parity:
    """Engine against simulation, layer by layer; over the bounds of utils.backends.parity it is a UserError.

    The engine runs a copy of the model that also hands out its integers. This adds changes of layout between its
    kernels, and leaves the kernels themselves as they are. target: the one that the file was made for, whose share of
    far values is allowed where the engine is its own.
    """
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    for node in simulated.graph.nodes:
        if isinstance(quantizer := module_of(simulated, node), Quantizer):
            name = integers_of(node, quantizer)
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(name.rpartition("_")[2]))
            opened.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    own = is_own(engine, target)
    network = load_engine(engine).network(opened.SerializeToString(), foreign=not own)
    parity = compare(simulated, network.tensors, images, predictions)
    far = target.far if own else 0.0
    parity.check(far, _SATURATION if far else "")
    return parity


_SATURATION = "; on processors without VNNI its kernels saturate where weights are large: pass --bits_weight 7, or run on one with VNNI"


def checking_engine(target: Target) -> tuple[str, tuple[str, ...]]:
    """The engine that a file for the target is held to here, and what is to be said where that is not the target's own."""
    own = target.engines[0]
    if missing_package(own) is not None:
        package = missing_package(own)
        return DEFAULT, (f"compared in ONNX Runtime: {target.title} is not installed here (pip install {package})",)
    if not is_own(own, target):
        return own, (f"compared in ONNX Runtime, and held to the rules of {target.title}, but not run on its hardware",)
    return own, ()


def _about_processors(target: Target, weight_type: str) -> list[str]:
    """Where the file is exact, and where it is fast, in words."""
    if len(target.weights) == 1:
        return []
    if weight_type == "uint8":
        return [
            "weights are uint8, exact on every processor; int8, by --weight_type int8, is up to twice as fast on those with "
            "VNNI and saturates on other x86"
        ]
    return [
        "weights are int8, exact and fast on processors with VNNI and on ARM; for x86 without VNNI, whose sums saturate, "
        f"export with --weight_type uint8 or set {PRECISE} in the session"
    ]


def _about_caps(model: onnx.ModelProto) -> list[str]:
    """What a faster file would need, in words."""
    capped = sum(node.op_type == "QuantizeLinear" and "_uncapped" in node.output[0] for node in model.graph.node)
    if not capped or model.opset_import[0].version >= WITH_MIN:
        return []
    return [
        f"{capped} layers have caps per channel, written so that an ONNX Runtime of any age runs them; --opset {WITH_MIN} "
        "writes them for new ones, faster"
    ]


def about_widths(model: onnx.ModelProto, quantized: Quantized) -> list[str]:
    """How weights of 4 bits or fewer are stored, in words."""
    grids = [module_of(quantized.simulated, node).weight_qparams for node in weighted_nodes(quantized.simulated)]
    small = sum(grid is not None and grid.bits <= 4 for grid in grids)
    if not small:
        return []
    if any(tensor.data_type in (onnx.TensorProto.UINT4, onnx.TensorProto.INT4) for tensor in model.graph.initializer):
        return [f"{small} layers' weights are stored in 4 bits, which ONNX Runtime 1.23 or newer reads"]
    return [
        f"{small} layers' weights of 4 bits or fewer are stored in 8, as any ONNX Runtime reads them; --opset "
        f"{WITH_INT4} stores them in 4, for 1.23 or newer"
    ]


def export(
    quantized: Quantized,
    spec: InputSpec,
    file: Path,
    metadata: Mapping[str, Any],
    images: Tensor | None = None,
    predictions: Predictions = channel_predictions,
    opset: int | None = None,
    target: Target = TARGETS[DEFAULT],
    weight_type: str | None = None,
) -> Exported:
    """Write the file, read it back, check it and run it; a file of that name stays as it is until all is well.

    images: to compare engine and simulation on (default: random ones). predictions: of the network's outputs. opset: of
    ONNX (default: the lowest that will do). target: the one that the network was quantized for. weight_type: as for
    build(). Too large a difference,
    bits, operators or an opset that the file cannot have, and a file that cannot be written are UserErrors.
    """
    images = spec.probe(PROBES) if images is None else images
    weight_type = weight_type or exact_weight_type(target)
    model = build(quantized, spec, metadata, opset, target, weight_type)
    engine, notes = checking_engine(target)
    parity = check_parity(model, quantized.simulated, images, predictions, engine, target)
    kernels = describe_kernels(model, quantized, engine) if is_own(engine, target) else None
    notes = (*notes, *_about_processors(target, weight_type), *_about_caps(model), *about_widths(model, quantized))
    run = partial(load_engine(engine).network, foreign=not is_own(engine, target))  # both runs of one kind
    with atomic_write(file) as beside:
        onnx.save(model, beside)
        onnx.checker.check_model(str(beside), full_check=True)
        expected = outputs_of(run(model.SerializeToString())(images))
        if not all(map(torch.equal, outputs_of(run(beside)(images)), expected)):
            raise UserError(f"{str(file)!r} reads back otherwise than it was written; is the disk sound?")
        size = beside.stat().st_size
    float_size = sum(4 * tensor.numel() for tensor in quantized.simulated.parameters())
    return Exported(file, size, float_size, model.opset_import[0].version, parity, kernels, notes)
