"""Blocks of a network: runs of layers between places where little is handed on, each as a graph of its own.

Between residual joins one tensor is handed on, inside them two, and after a convolution that narrows it is small. So
networks are cut where what is handed on has the fewest values, every few layers. Any run of nodes can be a block: what
it reads of earlier ones are its inputs, what later ones or the network's output read are its outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from utils.graph.nodes import is_tensor, module_of, shape, weighted_nodes
from utils.graph.ops import aten, is_size, operator_of
from utils.quantization.quantizer import Quantizer

LAYERS = 4  # of a block at most, as many as a bottleneck with its shortcut has


@dataclass(frozen=True)
class Part:
    """A run of a network's nodes as a network, which shares its modules.

    inputs, outputs: the names of the values that it takes and gives, as a tuple, in order. local: whether it gives maps
    alone and has no sizes written into it, so that it also runs on a window of its input.
    """

    graph: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    local: bool


def find_blocks(model: fx.GraphModule, most: int = LAYERS) -> list[list[str]]:
    """The names of the network's layers in blocks of at most so many, every layer once, in the order in which they run.

    A block ends where least is handed on, of equals at the last. It cannot end where a tensor is handed on that does
    not have images along its first axis; then it has more layers.
    """
    order = list(model.graph.nodes)
    place = {node: i for i, node in enumerate(order)}
    layers = weighted_nodes(model)
    handed = [_handed_on(model, order, place, place[node]) for node in layers[1:]] + [0]  # behind each layer
    blocks, first = [], 0
    while first < len(layers):
        ends = [i for i in range(first, min(first + most, len(layers))) if handed[i] is not None]
        if not ends:
            ends = [next(i for i in range(first, len(layers)) if handed[i] is not None)]
        last = min(ends, key=lambda i: (handed[i], -i))
        blocks.append([node.target for node in layers[first : last + 1]])
        first = last + 1
    return blocks


def most_handed_on(model: fx.GraphModule, blocks: Sequence[Sequence[str]]) -> int:
    """How many values an image hands on between two blocks at most, its own values among them."""
    order = list(model.graph.nodes)
    place = {node: i for i, node in enumerate(order)}
    layers = {node.target: node for node in weighted_nodes(model)}
    entry = next(node for node in order if node.op == "placeholder")
    ends = [_handed_on(model, order, place, place[layers[block[0]]]) for block in blocks[1:]]
    return max([shape(entry).numel(), *ends])


def _handed_on(model: fx.GraphModule, order: Sequence[fx.Node], place: dict[fx.Node, int], end: int) -> int | None:
    """How many values an image hands on from before a place in the order; None where a tensor mixes images."""
    images, total = model.meta["batch"] or 1, 0
    for node in order[:end]:
        if node.op == "get_attr" or not is_tensor(node) or all(place[user] < end for user in node.users):
            continue
        if len(shape(node)) < 2 or shape(node)[0] != images:
            return None
        total += shape(node).numel()
    return total


def parts_of(model: fx.GraphModule, blocks: Sequence[Sequence[str]], names: set[str] | None = None) -> list[Part]:
    """The network's nodes, in a part for each block.

    model: the network that the blocks were found in, or a copy of it with quantizers. names: of the nodes of the
    network that the blocks were found in, by which values are called; None: it is this one.
    """
    order = list(model.graph.nodes)
    place = {node.target: i for i, node in enumerate(order) if node.op == "call_module"}
    starts = [0, *(place[block[0]] for block in blocks[1:]), len(order)]
    return [_part(model, order[a:b], names or set()) for a, b in pairwise(starts)]


def value_name(model: fx.GraphModule, node: fx.Node, names: set[str]) -> str:
    """What a value is called with and without quantizers: by the node that made it. names: as parts_of takes them."""
    behind = isinstance(module_of(model, node), Quantizer) and node.name not in names
    return node.args[0].name if names and behind else node.name


def _part(model: fx.GraphModule, nodes: Sequence[fx.Node], names: set[str]) -> Part:
    inside, graph = {node for node in nodes if node.op not in ("output", "placeholder")}, fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    read = [source for node in nodes if node in inside for source in node.all_input_nodes if source not in inside]
    inputs = [node for node in dict.fromkeys(read) if node.op != "get_attr" and is_tensor(node)]
    for node in inputs:
        copied[node] = graph.placeholder(node.name)
    for node in dict.fromkeys(read):
        _copy_outside(graph, node, copied, inputs)
    for node in nodes:
        if node in inside:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    outputs = [
        node
        for node in nodes
        if node in inside
        and node.op != "get_attr"
        and is_tensor(node)
        and any(user not in inside for user in node.users)
    ]
    graph.output(tuple(copied[node] for node in outputs))
    local = all(len(shape(node)) == 4 and min(shape(node)[2:]) > 1 for node in outputs)
    local = local and all(module_of(model, n) is not None or _is_local(n) for n in nodes if n in inside)
    called = (tuple(value_name(model, node, names) for node in group) for group in (inputs, outputs))
    return Part(fx.GraphModule(model, graph).eval(), *called, local)


def _is_local(node: fx.Node) -> bool:
    row = operator_of(node)
    return row is not None and row.kind in ("sum", "product", "concat", "pad", "maximum")


def _copy_outside(graph: fx.Graph, node: fx.Node, copied: dict[fx.Node, fx.Node], inputs: Sequence[fx.Node]) -> fx.Node:
    """A constant, or a size, that a part reads of what stands before it. Sizes but the batch's are known."""
    if node in copied:
        return copied[node]
    if is_size(node) and node.target is aten.sym_size.int and node.args[0] not in copied:
        size = shape(node.args[0])[node.args[1]]
        if node.args[1] == 0 and inputs:
            made = graph.call_function(aten.sym_size.int, (copied[inputs[0]], 0))
        else:
            made = graph.call_function(max, (size, size))
    else:
        for source in node.all_input_nodes:
            _copy_outside(graph, source, copied, inputs)
        made = graph.node_copy(node, copied.__getitem__)
    copied[node] = made
    return made
