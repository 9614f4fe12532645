"""On which quantizer's steps the values of a graph lie."""

from torch import fx

from utils.graph.nodes import module_of
from utils.graph.ops import keeps_grid, operator_of
from utils.quantization.quantizer import Quantizer


def is_concat(node: fx.Node) -> bool:
    row = operator_of(node)
    return row is not None and row.kind == "concat"


def value_sources(node: fx.Node) -> list[fx.Node]:
    """The nodes that computed a value, past whatever only moves values."""
    if is_concat(node):
        return [source for part in node.args[0] for source in value_sources(part)]
    if keeps_grid(node):
        return value_sources(node.args[0])
    return [node]


def quantizer_before(model: fx.GraphModule, node: fx.Node) -> Quantizer | None:
    """The quantizer that rounded the node's output."""
    sources = [module_of(model, source) for source in value_sources(node)]
    return sources[0] if sources and all(isinstance(source, Quantizer) for source in sources) else None
