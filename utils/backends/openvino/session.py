"""An ONNX model in OpenVINO: as a network, and as the list of layers that it runs on integers."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import torch
from torch import Tensor, fx, nn

from utils.backends.base import Kernels
from utils.core.errors import UserError
from utils.graph.nodes import first_line, module_of, weighted_nodes

_LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")  # as its execution graph names them


class OpenVinoNetwork(nn.Module):
    """The INT8 engine in the place of a network: images [N, C, H, W] -> its output, or a tuple of several.

    model: a file, or the serialised model. threads: None: as many as torch uses. What does not run on integers runs in
    float32: by itself OpenVINO takes bfloat16 where the processor has it.
    """

    def __init__(self, model: Path | bytes, threads: int | None = None):
        super().__init__()
        try:
            core = openvino.Core()
            self.read = core.read_model(model if isinstance(model, bytes) else str(model))
            options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
            self.compiled = core.compile_model(self.read, "CPU", options)
        except Exception as error:  # what it throws has no class of its own
            raise UserError(
                f"OpenVINO {openvino.__version__} refuses the network: {first_line(error)[:240]}; nothing was exported"
            ) from error

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = tuple(self.tensors(images).values())
        return outputs if len(outputs) > 1 else outputs[0]

    def tensors(self, images: Tensor) -> dict[str, Tensor]:
        """The model's outputs by name; of a model that fixes its batch, of so many images at a time."""
        shape = self.compiled.input(0).get_partial_shape()
        if shape[0].is_static and len(images) > (batch := shape[0].get_length()):
            parts = [self.tensors(part) for part in images.split(batch)]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        results = self.compiled([images.cpu().contiguous().numpy()])
        return {
            output.get_any_name(): torch.from_numpy(np.array(results[i])).to(images.device)
            for i, output in enumerate(self.compiled.outputs)
        }


def network(model: Path | bytes, threads: int | None = None, foreign: bool = False) -> OpenVinoNetwork:
    """As utils.backends.base.Engine says; it rewrites no weights."""
    return OpenVinoNetwork(model, threads)


def find_kernels(model: onnx.ModelProto, simulated: fx.GraphModule) -> Kernels:
    """What OpenVINO makes of the model, by the precision in which its execution graph runs each layer."""
    run = [
        _execution(node) for node in OpenVinoNetwork(model.SerializeToString()).compiled.get_runtime_model().get_ops()
    ]
    precisions = {
        name.partition("/")[0].removesuffix("_product"): precision  # OpenVINO adds its own after a stroke
        for kind, precision, names in run
        if kind in _LAYERS
        for name in names
    }
    integer, floating = [], {}
    for node in weighted_nodes(simulated):
        precision = precisions.get(node.name, "another layer")
        if precision in ("u8", "i8"):
            integer.append(node.target)
        elif module_of(simulated, node).weight_qparams is None:
            floating[node.target] = "its weights are not quantized"
        else:
            floating[node.target] = f"OpenVINO runs it in {precision}"
    kinds = [f"{kind} {precision}" for kind, precision, _ in run if kind not in ("Const", "Input", "Output")]
    return Kernels("OpenVINO", integer, floating, {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)})


def _execution(node: Any) -> tuple[str, str, list[str]]:
    """The kind of a node of the execution graph, its precision, and the names of the nodes that went into it."""
    about = node.get_rt_info()
    kind, precision, names = (
        about[key].astype(str) for key in ("layerType", "runtimePrecision", "originalLayersNames")
    )
    return kind, precision, names.split(",")
