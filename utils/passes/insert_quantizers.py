"""Activation quantizers: one wherever an integer engine writes a tensor."""

from collections.abc import Container, Mapping

import torch
from torch import fx

from utils.calibration.moments import Unknown
from utils.calibration.ranges import RangeOf
from utils.graph.layers import WEIGHTED, ChannelAffine, Clip, Elementwise, on_integers
from utils.graph.nodes import insert_module, is_tensor, module_of, shape, tidy
from utils.graph.ops import keeps_grid, operator_of
from utils.passes.log import PassLog
from utils.quantization.placement import is_concat, value_sources
from utils.quantization.qparams import activation_qparams
from utils.quantization.quantizer import Quantizer
from utils.quantization.target import DEFAULT, TARGETS, Target

ACTION = "inserted quantizers"


def insert_quantizers(
    model: fx.GraphModule,
    range_of: RangeOf,
    bits: int,
    log: PassLog,
    target: Target = TARGETS[DEFAULT],
    other_bits: Mapping[str, int] | None = None,
) -> None:
    """Put a quantizer behind every node that the target's engine writes a tensor of integers for.

    That is: the network's input, a layer's output behind its ReLU or ReLU6, sums, products and other
    functions, average pooling and interpolation. What only moves values keeps its input's parameters. The
    inputs of a concat share theirs if nothing else reads them; otherwise its output is quantized, unless it joins what
    is computed in float for a function that is. What the network hands out is left as it is, whatever made it: a range
    would cut it, and 256 steps would make classes tie.
    other_bits: by a node's name, where its quantizer has other bits.
    """
    for node, (low, high) in _tensor_ranges(model, range_of, log, target).items():
        own_bits = (other_bits or {}).get(node.name, bits)
        qparams = activation_qparams(torch.tensor(low), torch.tensor(high), own_bits, target.signed)
        clip = module_of(model, node)
        if isinstance(clip, Clip) and (_clips_alike(clip, low) or (target.signed and clip.low.dim() == 0)):
            cap = None if bool((clip.high >= high).all()) else clip.high
            quantizer = Quantizer(qparams, cap, low=float(clip.low) if target.signed else None)
            model.set_submodule(node.target, quantizer)
        else:
            quantizer = Quantizer(qparams)
            insert_module(model, node, f"{node.name}_quantizer", quantizer)
        log.applied(ACTION, node.name, quantizer.extra_repr())
    tidy(model)


def _clips_alike(clip: Clip, low: float) -> bool:
    """Whether a quantizer over a range from there also is the clip's lower bound."""
    return clip.low.dim() == 0 and float(clip.low) <= min(low, 0.0)


def _tensor_ranges(
    model: fx.GraphModule, range_of: RangeOf, log: PassLog, target: Target
) -> dict[fx.Node, tuple[float, float]]:
    """The range of every tensor that gets a quantizer."""
    ranges = {}
    for node in written_tensors(model, target):
        known = range_of(node)
        if isinstance(known, Unknown):
            log.skipped(ACTION, node.name, f"nothing is known {known.reason}")
        else:
            ranges[node] = known
    for node in model.graph.nodes:
        if _is_written_concat(model, node, ranges):
            together = range_of(node)
            if isinstance(together, Unknown):
                continue
            sources = value_sources(node)
            if all(source in ranges and feeds_only(source, node) for source in sources):
                ranges.update(dict.fromkeys(sources, together))
            else:
                ranges[node] = together
    return ranges


def written_tensors(model: fx.GraphModule, target: Target = TARGETS[DEFAULT]) -> list[fx.Node]:
    """The nodes whose output the target's engine writes with parameters of its own; concats aside.

    Those that an integer kernel writes, or reads. Between functions that engines compute in float anyway, an
    activation and a normalisation, or the parts of an attention, a quantizer would only add noise.
    """
    written: list[fx.Node] = []
    for node in model.graph.nodes:
        if _can_be_written(model, node) and (
            _by_integers(model, node, written) or (_for_integers(model, node) and not _is_divisor(model, node))
        ):
            written.append(node)
    return written if target.quantizes_summands else [node for node in written if not _added_in_float(model, node)]


def _added_in_float(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a layer's kernel adds the other operand of a sum to its accumulator, before anything is rounded.

    Of two layers that feed one sum the later one does.
    """
    if not isinstance(module_of(model, node), WEIGHTED) or len(node.users) != 1:
        return False
    total = next(iter(node.users))
    if total.target is not torch.ops.aten.add.Tensor or any(not isinstance(part, fx.Node) for part in total.args):
        return False
    layers = [part for part in total.args if isinstance(module_of(model, part), WEIGHTED) and len(part.users) == 1]
    order = list(model.graph.nodes)
    return all(shape(part) == shape(total) for part in total.args) and node is max(layers, key=order.index)


def _by_integers(model: fx.GraphModule, node: fx.Node, written: list[fx.Node]) -> bool:
    """Whether an integer kernel computes a node: a layer with its clip, and what engines do to integers."""
    module, row = module_of(model, node), operator_of(node)
    if module is not None:
        return on_integers(module) or (isinstance(module, Clip) and _by_integers(model, node.args[0], written))
    if row is None or row.kind not in ("sum", "product", "average", "resize"):
        return False
    operands = [source for source in node.all_input_nodes if source.op != "get_attr"]
    return all(source in written for operand in operands for source in value_sources(operand))


def _for_integers(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an integer kernel reads a node, past whatever only moves values: a layer, a sum, a product."""
    row = operator_of(node)
    if row is not None and row.moments == "share":
        return False  # engines have a softmax of integers, and each rounds it in its own way
    for user in node.users:
        row = operator_of(user)
        if on_integers(module_of(model, user)) or (row is not None and row.kind in ("sum", "product")):
            return True
        if (is_concat(user) or keeps_grid(user)) and _for_integers(model, user):
            return True
    return False


def _is_divisor(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether something is divided by a value, or by a function or average of it, and no layer reads it: small values
    would be 0."""
    modules = {user: module_of(model, user) for user in node.users}
    if any(on_integers(module) for module in modules.values()):
        return False
    for user, module in modules.items():
        row = operator_of(user)
        passes = isinstance(module, ChannelAffine | Elementwise) or (
            row is not None and (row.kind == "average" or keeps_grid(user))
        )
        if (user.target is torch.ops.aten.div.Tensor and user.args[1] is node) or (passes and _is_divisor(model, user)):
            return True
    return False


def quantized_tensors(model: fx.GraphModule, target: Target = TARGETS[DEFAULT]) -> list[fx.Node]:
    """The nodes that get a quantizer if their ranges are known, in the graph's order; of concats the output stands for its inputs too."""
    written = set(written_tensors(model, target))
    return [n for n in model.graph.nodes if n in written or _is_written_concat(model, n, written)]


def _is_written_concat(model: fx.GraphModule, node: fx.Node, written: Container[fx.Node]) -> bool:
    """Whether a node is a concat of tensors of integers, or for an integer kernel. written: what else gets a quantizer."""
    if not is_concat(node) or not node.users or handed_out(node):
        return False
    return _for_integers(model, node) or all(source in written for source in value_sources(node))


def averaged_into_output(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the network hands out what is made of this value without any layer."""
    readers = list(node.users)
    return bool(readers) and all(
        user.op != "output" and not isinstance(module_of(model, user), WEIGHTED) and handed_out(user)
        for user in readers
    )


def _ends_in_functions(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether all that reads a value is the network's output, past functions, sums, products and averages of logits alone.

    Nothing there gains by integers, while a range would cut the largest logits and 256 steps would make classes tie.
    """

    def passes(user: fx.Node) -> bool:
        if is_concat(user) or keeps_grid(user):
            return True
        module, row = module_of(model, user), operator_of(user)
        if module is not None:
            return isinstance(module, ChannelAffine | Elementwise)
        averages_logits = row.kind == "average" and len(shape(node)) <= 3
        softmax = row.moments == "share" or user.target is torch.ops.aten.log_softmax.int
        return averages_logits or softmax or row.kind in ("sum", "product")

    return bool(node.users) and all(
        user.op == "output" or (is_tensor(user) and passes(user) and _ends_in_functions(model, user))
        for user in node.users
    )


def _can_be_written(model: fx.GraphModule, node: fx.Node) -> bool:
    if node.op in ("output", "get_attr") or not node.users or not is_tensor(node) or not shape(node):
        return False
    if keeps_grid(node) or is_concat(node) or not node.meta["tensor_meta"].dtype.is_floating_point:
        return False
    sinks = [module_of(model, user) for user in node.users]
    if len(sinks) == 1 and isinstance(sinks[0], Clip):
        return False  # one kernel with its activation
    return node.op == "placeholder" or not _ends_in_functions(model, node)


def handed_out(node: fx.Node) -> bool:
    """Whether all that reads a value is the network's output, past whatever only moves values."""
    return bool(node.users) and all(
        user.op == "output" or ((is_concat(user) or keeps_grid(user)) and handed_out(user)) for user in node.users
    )


def feeds_only(node: fx.Node, concat: fx.Node) -> bool:
    """Whether every sink of a value, past whatever only moves it, is this concat."""
    return all(user is concat or (keeps_grid(user) and feeds_only(user, concat)) for user in node.users)
