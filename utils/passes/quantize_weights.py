"""Weight quantization: every layer's parameters, with room for its bias in int32; weights rounded to the nearest steps."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches

import torch
from torch import Tensor, fx

from utils.calibration.moments import Unknown
from utils.calibration.ranges import RangeOf
from utils.core.errors import UserError
from utils.graph.layers import grouped_weight, on_integers
from utils.graph.nodes import module_of, weighted_nodes
from utils.passes.log import PassLog
from utils.quantization.placement import quantizer_before, value_sources
from utils.quantization.qparams import (
    choose_weight_qparams,
    fit_bias_to_int32,
    has_one_scale,
    may_have_zero_points,
    round_weight,
)

ACTION = "quantized weights"


def quantizable_layers(model: fx.GraphModule, range_of: RangeOf, log: PassLog) -> set[str]:
    """The layers that an integer engine could run: those whose input can be given a range."""
    chosen = set()
    for node in weighted_nodes(model):
        known = range_of(node.args[0])
        if not on_integers(module_of(model, node)):
            log.skipped(ACTION, node.target, "kept in float, as asked for")
        elif isinstance(known, Unknown):
            log.skipped(ACTION, node.target, f"nothing is known of its input {known.reason}")
        else:
            chosen.add(node.target)
    if not chosen:
        reasons = "; ".join(log.reasons(ACTION)) or "it has no convolution or linear layer"
        raise UserError(f"no layer of the network can be quantized: {reasons}")
    return chosen


def keep_in_float(model: fx.GraphModule, names: Collection[str]) -> None:
    """Mark the layers of these names, which then get no quantizer; a name of no layer is a UserError."""
    layers = [node.target for node in weighted_nodes(model)]
    for name in names:
        if name not in layers:
            near = get_close_matches(name, layers, 3, 0.4) or layers[:3]
            raise UserError(
                f"--float_layers: the network has no layer {name!r}; nearest are {', '.join(near)} (--doctor --verbose lists all)"
            )
        model.get_submodule(name).in_float = True


def quantize_weights(
    model: fx.GraphModule,
    layers: set[str],
    bits: int,
    per_channel: bool,
    symmetric: bool,
    bits_bias: int | None,
    log: PassLog,
    bits_first: int = 16,
    other_bits: Mapping[str, int] | None = None,
) -> None:
    """Choose the weight parameters of the layers of these names, and round their weights.

    At 32 bits a bias counts in the steps of the accumulator, weight scale times the scale of the layer's input, which
    is quantized already. Where it would overflow, the weights get larger steps before they are rounded. bits_first: that
    layers which read the network's input may have at most. other_bits: by a layer's name, where it has other bits.
    """
    for node in weighted_nodes(model):
        if node.target not in layers:
            continue
        layer, source = module_of(model, node), quantizer_before(model, node.args[0])
        own = (other_bits or {}).get(node.target, bits)
        own = min(own, bits_first) if _reads_input(node) else own
        plain = symmetric or not may_have_zero_points(own, per_channel)
        qparams = choose_weight_qparams(layer, own, per_channel, plain)
        if source is not None and bits_bias == 32:
            roomy = fit_bias_to_int32(qparams, layer.bias, source.scale)
            if not torch.equal(roomy.scale, qparams.scale):
                qparams = roomy
                log.applied("fitted biases to int32", node.target, "its weights have larger steps")
        if per_channel and has_one_scale(layer):
            log.note(
                f"{node.target} has one scale: a grouped transposed convolution's weights have no axis of output channels"
            )
        layer.weight_qparams = qparams
        round_weight(layer, qparams)
        log.applied(ACTION, node.target, f"largest step {float(qparams.scale.max()):.3g}")


def _reads_input(node: fx.Node) -> bool:
    """Whether a layer reads the network's input, past its quantizer and whatever only moves values."""
    quantizers = [source for source in value_sources(node.args[0]) if source.op == "call_module"]
    return any(source.op == "placeholder" for one in quantizers for source in value_sources(one.args[0]))


def weight_ranges(model: fx.GraphModule) -> dict[str, Tensor]:
    """The smallest and largest weight [C_out, 2] of every channel, by layer."""
    views = {node.target: grouped_weight(module_of(model, node)) for node in weighted_nodes(model)}
    return {name: torch.stack([view.amin((2, 3)), view.amax((2, 3))], -1).flatten(0, 1) for name, view in views.items()}
