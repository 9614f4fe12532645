"""On which quantizer's steps the values of a graph lie."""

import torch
from torch import fx, nn

from utils.graph.capture import REARRANGING, module_of
from utils.quantization.quantizer import Quantizer

# Operations that only move values of their input: an integer engine needs no quantizer behind them.
_KEEPS_QPARAMS = (
    nn.MaxPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Flatten,
    nn.ZeroPad2d,
    nn.UpsamplingNearest2d,
    nn.PixelShuffle,
    nn.ChannelShuffle,
)


def keeps_qparams(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node's output has the quantization parameters of its input."""
    return isinstance(module_of(model, node), _KEEPS_QPARAMS) or node.target in REARRANGING


def value_sources(model: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The nodes that computed a value, past whatever only moves values."""
    if node.target is torch.cat:
        return [source for part in node.args[0] for source in value_sources(model, part)]
    if keeps_qparams(model, node):
        return value_sources(model, node.args[0])
    return [node]


def quantizer_before(model: fx.GraphModule, node: fx.Node) -> Quantizer | None:
    """The quantizer that rounded the node's output."""
    sources = [module_of(model, source) for source in value_sources(model, node)]
    return sources[0] if sources and all(isinstance(source, Quantizer) for source in sources) else None
