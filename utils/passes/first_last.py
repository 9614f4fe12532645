"""The first and the last layers, which many keep at more bits than the rest: what they read, and what they weigh."""

from torch import fx

from utils.graph.layers import WEIGHTED
from utils.graph.nodes import module_of, weighted_nodes
from utils.graph.ops import keeps_grid
from utils.quantization.placement import is_concat


def bits_of_first_and_last(model: fx.GraphModule, bits: int | None) -> tuple[dict[str, int], dict[str, int]]:
    """The bits of these layers' weights, by layer, and of what they read, by node; empty if bits is None.

    model: before quantizers are inserted.
    """
    layers = first_and_last_layers(model) if bits else []
    return {node.target: bits for node in layers}, dict.fromkeys(tensors_read(model, layers), bits)


def first_and_last_layers(model: fx.GraphModule) -> list[fx.Node]:
    """The layers that no other layer stands before, and those that none stands behind; one at least of either.

    A network with several inputs of layers, or several outputs, has as many. Published tables of 4 bits keep these
    layers' weights and inputs at 8.
    """
    behind = _layers_reached(model, [node for node in model.graph.nodes if node.op == "placeholder"], "users")
    before = _layers_reached(model, [model.graph.output_node()], "all_input_nodes")
    return [node for node in weighted_nodes(model) if node in behind or node in before]


def _layers_reached(model: fx.GraphModule, starts: list[fx.Node], along: str) -> set[fx.Node]:
    """The layers that are met first on every way from the starts. along: "users" or "all_input_nodes"."""
    found, met, waiting = set(), set(starts), list(starts)
    while waiting:
        for node in getattr(waiting.pop(), along):
            if node in met:
                continue
            met.add(node)
            if isinstance(module_of(model, node), WEIGHTED):
                found.add(node)
            else:
                waiting.append(node)
    return found


def tensors_read(model: fx.GraphModule, layers: list[fx.Node]) -> set[str]:
    """The names of the nodes whose quantizers these layers read, before quantizers are inserted."""
    names: set[str] = set()
    for layer in layers:
        _note_sources(layer.args[0], layer, names)
    return names


def _note_sources(node: fx.Node, reader: fx.Node, names: set[str]) -> None:
    """Past whatever only moves values; of a concat also its parts, where nothing else reads them."""
    if keeps_grid(node):
        _note_sources(node.args[0], node, names)
        return
    if is_concat(node):
        for part in node.args[0]:
            if set(part.users) == {node}:
                _note_sources(part, node, names)
    names.add(node.name)
