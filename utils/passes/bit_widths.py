"""Where a network has other bits than most of its weights and activations have."""

from torch import fx

from utils.graph.layers import WEIGHTED, on_integers
from utils.graph.nodes import module_of, weighted_nodes
from utils.graph.ops import keeps_grid
from utils.passes.insert_quantizers import feeds_only
from utils.quantization.placement import is_concat, value_sources
from utils.quantization.recipe import Recipe

FULL = 8  # bits of activations that no layer reads, where layers read fewer


def bits_of_weights(model: fx.GraphModule, recipe: Recipe) -> dict[str, int]:
    """By layer the bits of its weights, where they are not those of all; model: before quantizers are inserted."""
    return {node.target: recipe.bits_first_last for node in _apart(model, recipe)}


def bits_of_activations(model: fx.GraphModule, recipe: Recipe) -> dict[str, int]:
    """By node the bits of what it writes, where they are not those of all activations; model: before quantizers.

    Few bits are for the products of layers, and for what these read. A sum, an average or a resize computes with more in
    any engine; published tables of 4 bits do not round what they read at all.
    """
    full = dict.fromkeys(_read_by_no_layer(model), FULL) if recipe.bits_activation < FULL else {}
    return full | dict.fromkeys(tensors_read(model, _apart(model, recipe)), recipe.bits_first_last)


def _apart(model: fx.GraphModule, recipe: Recipe) -> list[fx.Node]:
    """The layers that have bits of their own."""
    return first_and_last_layers(model) if recipe.bits_first_last else []


def _read_by_no_layer(model: fx.GraphModule) -> set[str]:
    """The nodes that no layer on integers reads, past whatever only moves values."""
    read = tensors_read(model, [node for node in weighted_nodes(model) if on_integers(module_of(model, node))])
    return {node.name for node in model.graph.nodes if node.op != "output"} - read


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
        _note_sources(layer.args[0], names)
    return names


def _note_sources(node: fx.Node, names: set[str]) -> None:
    """Past whatever only moves values; of a concat also what it joins, where that shares its quantizer's parameters."""
    if keeps_grid(node):
        _note_sources(node.args[0], names)
        return
    if is_concat(node):
        sources = value_sources(node)
        if all(feeds_only(source, node) for source in sources):
            names.update(source.name for source in sources)
    names.add(node.name)
