"""An ONNX model in ONNX Runtime: as a network, and as the list of layers that it runs on integers."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from utils.backends.base import INPUT, Kernels
from utils.core.errors import UserError
from utils.graph.nodes import first_line, module_of, weighted_nodes
from utils.quantization.quantizer import Quantizer

_PROVIDERS = ["CPUExecutionProvider"]
PRECISE = "session.x64quantprecision=1"  # makes int8 weights uint8 where their sums would saturate
# Of files for other engines. The first rounds the weights of a float layer that reads a tensor of one scale; the second moves
# quantizers past reshapes, from opset 21 on with a zero point of the wrong type where they are int8.
_REWRITES = ["WeightBiasQuantization", "QDQPropagationTransformer"]


_FLOAT_CONVOLUTIONS = ("Conv", "FusedConv", "ConvTranspose")


class OnnxNetwork(nn.Module):
    """The INT8 engine in the place of a network: images [N, C, H, W] -> its output, or a tuple of several.

    model: a file, or the serialised model. threads: of the session; None: as many as torch uses. foreign: as Engine.network
    has it.
    """

    def __init__(self, model: Path | bytes, threads: int | None = None, foreign: bool = False):
        super().__init__()
        options = _options()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        source = model if isinstance(model, bytes) else str(model)
        try:
            self.session = onnxruntime.InferenceSession(
                source, options, providers=_PROVIDERS, disabled_optimizers=_REWRITES if foreign else None
            )
        except Exception as error:  # its exceptions have no base of their own
            raise UserError(
                f"ONNX Runtime {onnxruntime.__version__} refuses the network: {first_line(error)[:240]}; nothing was exported"
            ) from error

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = tuple(self.tensors(images).values())
        return outputs if len(outputs) > 1 else outputs[0]

    def tensors(self, images: Tensor) -> dict[str, Tensor]:
        """The model's outputs by name; of a model that fixes its batch, of so many images at a time."""
        batch = self.session.get_inputs()[0].shape[0]
        if isinstance(batch, int) and len(images) > batch:
            parts = [self.tensors(part) for part in images.split(batch)]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        names = [output.name for output in self.session.get_outputs()]
        arrays = self.session.run(names, {INPUT: images.cpu().contiguous().numpy()})
        return {name: torch.from_numpy(array).to(images.device) for name, array in zip(names, arrays, strict=True)}


def network(model: Path | bytes, threads: int | None = None, foreign: bool = False) -> OnnxNetwork:
    """As utils.backends.base.Engine says."""
    return OnnxNetwork(model, threads, foreign)


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: warnings are about files optimised for one machine, as below
    if not sums_exactly():  # with VNNI it would cost half of the speed and change no number
        options.add_session_config_entry(*PRECISE.split("="))
    return options


@cache
def sums_exactly() -> bool:
    """Whether a session with default options adds products of uint8 and int8 exactly here.

    x86 processors without VNNI add two of them in 16 bits, which saturate. One sum of the largest products tells.
    """
    largest, count = 255 * 127, 64
    terms = helper.make_tensor_value_info("a", TensorProto.UINT8, [1, count])
    total = helper.make_tensor_value_info("sum", TensorProto.INT32, [1, 16])
    weights = numpy_helper.from_array(np.full((count, 16), 127, np.int8), "weights")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "weights"], ["sum"])], "sums", [terms], [total], [weights]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=_PROVIDERS)
    (found,) = session.run(None, {"a": np.full((1, count), 255, np.uint8)})
    return bool((found == largest * count).all())


def find_kernels(model: onnx.ModelProto, simulated: fx.GraphModule) -> Kernels:
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
        layer, kind = module_of(simulated, node), made.get(node.name, "something else")
        if kind in ("QLinearConv", "QGemm"):
            integer.append(node.target)
        elif layer.weight_qparams is None:
            floating[node.target] = "its weights are not quantized"
        elif layer.bias_qparams is None:
            floating[node.target] = "its bias is not quantized"
        elif kind in _FLOAT_CONVOLUTIONS and not any(
            isinstance(module_of(simulated, user), Quantizer) for user in node.users
        ):
            floating[node.target] = "what it gives is not quantized, and ONNX Runtime has no integer kernel for that"
        else:
            floating[node.target] = f"ONNX Runtime runs it as {kind}"
    kinds = [node.op_type for node in nodes]
    return Kernels("ONNX Runtime", integer, floating, {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)})
