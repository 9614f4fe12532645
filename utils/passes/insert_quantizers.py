"""Activation quantizers: one wherever an integer engine writes a tensor."""

import torch
from torch import fx, nn

from utils.calibration.moments import Unknown
from utils.calibration.ranges import RangeOf
from utils.graph.layers import Clip
from utils.graph.nodes import insert_module, is_tensor, module_of, shape, tidy
from utils.graph.ops import keeps_grid, operator_of
from utils.passes.log import PassLog
from utils.quantization.placement import is_concat, value_sources
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
        qparams = affine_qparams(torch.tensor(low), torch.tensor(high), bits)
        clip = module_of(model, node)
        if isinstance(clip, Clip) and _clips_alike(clip, low):
            quantizer = Quantizer(qparams, None if bool((clip.high >= high).all()) else clip.high)
            model.set_submodule(node.target, quantizer)
        else:
            quantizer = Quantizer(qparams)
            insert_module(model, node, f"{node.name}_quantizer", quantizer)
        log.applied(ACTION, node.name, quantizer.extra_repr())
    tidy(model)


def _clips_alike(clip: Clip, low: float) -> bool:
    """Whether a quantizer over a range from there also is the clip's lower bound."""
    return clip.low.dim() == 0 and float(clip.low) <= min(low, 0.0)


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
        if is_concat(node) and node.users and not isinstance(together := range_of(node), Unknown):
            sources = {source for part in node.args[0] for source in value_sources(part)}
            if all(source in ranges and _feeds_only(source, node) for source in sources):
                ranges.update(dict.fromkeys(sources, together))
            else:
                ranges[node] = together
    return ranges


def written_tensors(model: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose output an integer engine writes with parameters of its own; concats aside."""
    return [node for node in model.graph.nodes if _is_written(model, node)]


def _is_written(model: fx.GraphModule, node: fx.Node) -> bool:
    if node.op in ("output", "get_attr") or not node.users or not is_tensor(node) or not shape(node):
        return False
    if keeps_grid(node) or is_concat(node) or not node.meta["tensor_meta"].dtype.is_floating_point:
        return False
    sinks = [module_of(model, user) for user in node.users]
    if len(sinks) == 1 and isinstance(sinks[0], Clip):
        return False  # one kernel with its activation
    only_output = all(user.op == "output" for user in node.users)
    if only_output and isinstance(module_of(model, node), nn.Linear):
        return False  # an integer engine hands out its accumulator, scaled
    row = operator_of(node)
    return not (only_output and row is not None and row.kind == "resize")  # nothing computes with it any more


def _feeds_only(node: fx.Node, concat: fx.Node) -> bool:
    """Whether every sink of a value, past whatever only moves it, is this concat."""
    return all(user is concat or (keeps_grid(user) and _feeds_only(user, concat)) for user in node.users)
