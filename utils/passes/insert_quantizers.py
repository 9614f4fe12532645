"""Activation quantizers: one wherever an integer engine writes a tensor."""

import torch
import torch.nn.functional as F
from torch import fx, nn

from utils.calibration.moments import Unknown
from utils.calibration.ranges import RangeOf
from utils.graph.capture import insert_module, is_tensor, module_of, shape, tidy
from utils.graph.layers import CLIPS
from utils.passes.log import PassLog
from utils.quantization.placement import keeps_qparams, value_sources
from utils.quantization.qparams import affine_qparams
from utils.quantization.quantizer import Quantizer

ACTION = "inserted quantizers"


def insert_quantizers(model: fx.GraphModule, range_of: RangeOf, bits: int, log: PassLog) -> None:
    """Put a quantizer behind every node that an integer engine writes a tensor for.

    That is: the network's input, a layer's output behind its ReLU or ReLU6, sums, products and other
    functions, average pooling and interpolation. What only moves values keeps its input's parameters. The
    inputs of a concat share theirs if nothing else reads them; otherwise its output is quantized. The
    network's output is left as it is where that costs an engine nothing: linear layers, interpolation.
    """
    for node, (low, high) in _tensor_ranges(model, range_of, log).items():
        quantizer = Quantizer(affine_qparams(torch.tensor(low), torch.tensor(high), bits))
        activation = module_of(model, node)
        if isinstance(activation, CLIPS) and quantizer.step_min == 0:
            cap = getattr(activation, "cap", None)
            quantizer = Quantizer(quantizer.qparams, None if cap is None or bool((cap >= high).all()) else cap)
            model.set_submodule(node.target, quantizer)
        else:
            insert_module(model, node, f"{node.name}_quantizer", quantizer)
        log.applied(ACTION, node.name, quantizer.extra_repr())
    tidy(model)


def _tensor_ranges(model: fx.GraphModule, range_of: RangeOf, log: PassLog) -> dict[fx.Node, tuple[float, float]]:
    """The range of every tensor that gets a quantizer."""
    ranges = {}
    for node in written_tensors(model):
        known = range_of(node)
        if isinstance(known, Unknown):
            log.skipped(ACTION, node.name, f"nothing is known {known.reason}")
        else:
            ranges[node] = known
    for node in model.graph.nodes:
        if node.target is torch.cat and not isinstance(together := range_of(node), Unknown):
            sources = {source for part in node.args[0] for source in value_sources(model, part)}
            if all(source in ranges and _feeds_only(model, source, node) for source in sources):
                ranges.update(dict.fromkeys(sources, together))
            else:
                ranges[node] = together
    return ranges


def written_tensors(model: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose output an integer engine writes with parameters of its own; concats aside."""
    return [node for node in model.graph.nodes if _is_written(model, node)]


def _is_written(model: fx.GraphModule, node: fx.Node) -> bool:
    module = module_of(model, node)
    if node.op in ("output", "get_attr") or not is_tensor(node) or not shape(node) or not node.users:
        return False
    if keeps_qparams(model, node) or node.target is torch.cat:
        return False
    readers = [module_of(model, user) for user in node.users]
    if len(readers) == 1 and isinstance(readers[0], CLIPS):
        return False  # one kernel with its activation
    only_output = all(user.op == "output" for user in node.users)
    if only_output and isinstance(module, nn.Linear):
        return False  # an integer engine hands out its accumulator, scaled
    interpolates = isinstance(module, nn.Upsample | nn.UpsamplingBilinear2d) or node.target is F.interpolate
    return not (interpolates and only_output)  # nothing computes with it any more


def _feeds_only(model: fx.GraphModule, node: fx.Node, concat: fx.Node) -> bool:
    """Whether every reader of a value, past whatever only moves it, is this concat."""
    users = node.users
    return all(user is concat or (keeps_qparams(model, user) and _feeds_only(model, user, concat)) for user in users)
