"""Caps per channel, which equalization leaves of ReLU6: those that no value can reach need not be in a file."""

import torch
from torch import Tensor, fx

from utils.graph.layers import WEIGHTED, channels_in, grouped_weight
from utils.graph.nodes import module_of
from utils.quantization.placement import quantizer_before, value_sources
from utils.quantization.quantizer import Quantizer

TIE = 0.01  # steps from halfway within which an engine may round either way


def reached_caps(model: fx.GraphModule, node: fx.Node, quantizer: Quantizer) -> Tensor | None:
    """The caps [C] of the quantizer at the node, in steps, where a value can reach them, and step_max elsewhere; None without.

    What a layer gives is at most the sum of its weights times the ends of what it reads: all values are of a known
    grid, whose channels may have caps themselves. Leaving out a cap above that changes no output.
    """
    if quantizer.cap is None:
        return None
    caps = quantizer.cap
    reach = _largest_output(model, node.args[0])
    if reach is not None:
        caps = torch.where(reach / quantizer.scale < caps + 0.5 - TIE, float(quantizer.step_max), caps)
    return caps if bool((caps < quantizer.step_max).any()) else None


def _largest_output(model: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The largest value [C] that a layer can give, if it is one that reads a single quantizer's values."""
    layer = module_of(model, node)
    if not isinstance(layer, WEIGHTED):
        return None
    before = quantizer_before(model, node.args[0])
    if before is None or len(value_sources(node.args[0])) != 1:
        return None
    view = grouped_weight(layer).double()
    tops = before.cap if before.cap is not None and len(before.cap) == channels_in(layer) else None
    tops = torch.full((channels_in(layer),), float(before.step_max)) if tops is None else tops
    high = (tops.double() * before.scale).clamp_min(0).view(view.shape[0], 1, -1, 1)  # padding adds zeros
    low = min(before.step_min * before.scale, 0.0)
    return torch.maximum(view * high, view * low).sum((2, 3)).flatten() + layer.bias.double()
