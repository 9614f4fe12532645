"""An ONNX model in ONNX Runtime: as a network, and as the list of layers that it runs on integers."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, fx, nn

from utils.backends.onnxruntime.graph import INPUT
from utils.graph.capture import weighted_nodes
from utils.quantization.quantizer import QParams

_PROVIDERS = ["CPUExecutionProvider"]


class OnnxNetwork(nn.Module):
    """The INT8 engine in the place of a network: images [N, C, H, W] -> its output, or a tuple of several.

    model: a file, or the serialised model. threads: of the session; None: as many as torch uses.
    """

    def __init__(self, model: Path | bytes, threads: int | None = None):
        super().__init__()
        options = _options()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        source = model if isinstance(model, bytes) else str(model)
        self.session = onnxruntime.InferenceSession(source, options, providers=_PROVIDERS)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = tuple(self.tensors(images).values())
        return outputs if len(outputs) > 1 else outputs[0]

    def tensors(self, images: Tensor) -> dict[str, Tensor]:
        """The model's outputs by name."""
        names = [output.name for output in self.session.get_outputs()]
        arrays = self.session.run(names, {INPUT: images.cpu().contiguous().numpy()})
        return {name: torch.from_numpy(array).to(images.device) for name, array in zip(names, arrays, strict=True)}


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    if not any(torch.cpu.get_capabilities().get(name) for name in ("avx512_vnni", "avx_vnni")):
        # Before VNNI, x86 kernels for uint8 times int8 saturate at 16 bits unless asked to be exact, and slower.
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3  # errors: warnings are about files optimised for one machine, as below
    return options


@dataclass(frozen=True)
class Kernels:
    """integer: the layers with weights that run on integers. floating: the others, and why. operators: of the whole
    optimised graph, how many of each kind."""

    integer: list[str]
    floating: dict[str, str]
    operators: dict[str, int]

    def __str__(self) -> str:
        layers = len(self.integer) + len(self.floating)
        lines = [f"  ONNX Runtime runs {len(self.integer)} of {layers} layers on integers"]
        return "\n".join(lines + [f"  in float {name}: {reason}" for name, reason in self.floating.items()])


def find_kernels(
    model: onnx.ModelProto,
    simulated: fx.GraphModule,
    weight_grids: Mapping[str, QParams],
    bias_grids: Mapping[str, QParams],
) -> Kernels:
    """What ONNX Runtime makes of the model, by its optimised graph."""
    options = _options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=_PROVIDERS)
        nodes = onnx.load(options.optimized_model_filepath).graph.node
    made = {node.name: node.op_type for node in nodes}  # a fused operator keeps the layer's name
    integer, floating = [], {}
    for node in weighted_nodes(simulated):
        kind = made.get(node.name, "something else")
        if kind in ("QLinearConv", "QGemm"):
            integer.append(node.target)
        elif node.target not in weight_grids:
            floating[node.target] = "its weights have no grid"
        elif node.target not in bias_grids:
            floating[node.target] = "its input has no quantizer"
        else:
            floating[node.target] = f"ONNX Runtime runs it as {kind}"
    kinds = [node.op_type for node in nodes]
    return Kernels(integer, floating, {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)})
