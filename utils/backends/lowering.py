"""A simulated network on the integers that an engine computes with.

What an engine stores between its kernels are steps of a quantizer's grid. Here they are carried in float32,
and every kernel rounds the number that ONNX Runtime's kernel of the same layer rounds: layers multiply
their accumulator by one float32, as global averages do, and sums add their operands in its order. A tie then goes the same way in
both, and a whole network of integer kernels gives the same integers in both.
"""

import copy
import math
import operator
from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn

from utils.graph.capture import ASKS_SHAPE, REARRANGING, module_of, run_in_place, shape, tidy
from utils.graph.layers import (
    WEIGHTED,
    IntegerSum,
    PositionSum,
    channels_in,
    channels_out,
    per_channel,
    scale_inputs,
    scale_outputs,
    taps,
)
from utils.quantization.quantizer import QParams, Quantizer

# Operations whose output lies on the grid of their input: an integer engine needs no quantizer behind them.
_KEEPS_GRID = (
    nn.MaxPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Flatten,
    nn.ZeroPad2d,
    nn.UpsamplingNearest2d,
    nn.PixelShuffle,
    nn.ChannelShuffle,
)


def keeps_grid(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node's output lies on the grid of its input."""
    return isinstance(module_of(model, node), _KEEPS_GRID) or node.target in REARRANGING


def grid_sources(model: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The nodes whose grid a value lies on, past whatever only moves values."""
    if node.target is torch.cat:
        return [source for part in node.args[0] for source in grid_sources(model, part)]
    if keeps_grid(model, node):
        return grid_sources(model, node.args[0])
    return [node]


def quantizer_before(model: fx.GraphModule, node: fx.Node) -> Quantizer | None:
    """The quantizer on whose grid the node's output lies."""
    sources = [module_of(model, source) for source in grid_sources(model, node)]
    return sources[0] if sources and all(isinstance(source, Quantizer) for source in sources) else None


def fold_scales(
    simulated: fx.GraphModule, weight_grids: Mapping[str, QParams], bias_grids: Mapping[str, QParams]
) -> fx.GraphModule:
    """A copy of a simulated network that computes what an engine does, in fewer passes over its activations.

    A quantizer divides by its scale, rounds, and multiplies. Where all that reads it computes on integers, it
    hands out its steps and no longer multiplies; a layer or a sum before it hands over steps of its grid, and
    it no longer divides. A layer between two such quantizers has integer weights and biases.
    """
    model = copy.deepcopy(simulated)
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.before, module.divisor = 1.0, module.scale
    for node in _integral(model):
        module_of(model, node).after = 1.0
    for node in list(model.graph.nodes):
        module = module_of(model, node)
        if isinstance(module, WEIGHTED):
            _fold_layer(model, node, module, weight_grids.get(node.target), node.target in bias_grids)
        elif _is_sum(model, node) and all(quantizer_before(model, part).after == 1 for part in node.args):
            _fold_sum(model, node)
        elif _is_average(model, node) and quantizer_before(model, node.args[0]).after == 1:
            _fold_average(model, node)
    return run_in_place(tidy(model))


def _integral(model: fx.GraphModule) -> set[fx.Node]:
    """The quantizers that all that reads them takes in whole steps."""
    chosen = {node for node in model.graph.nodes if isinstance(module_of(model, node), Quantizer)}
    while refused := {
        node for node in chosen if not all(_takes_steps(model, reader, chosen) for reader in _readers(model, node))
    }:
        chosen -= refused
    return chosen


def _readers(model: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, past whatever only moves it."""
    for user in node.users:
        if keeps_grid(model, user) or user.target is torch.cat:
            yield from _readers(model, user)
        elif user.target not in ASKS_SHAPE:
            yield user


def _takes_steps(model: fx.GraphModule, reader: fx.Node, chosen: set[fx.Node]) -> bool:
    """Whether a reader can compute on the steps of quantizers, all its operands being of the chosen ones."""
    if not (isinstance(module_of(model, reader), WEIGHTED) or _is_sum(model, reader) or _is_average(model, reader)):
        return False
    operands = [grid_sources(model, operand) for operand in reader.all_input_nodes]
    return all(
        set(sources) <= chosen and len({module_of(model, source).scale for source in sources}) == 1
        for sources in operands
    )


def _is_sum(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node adds two quantized tensors of one shape for a quantizer."""
    return (
        node.target is operator.add
        and all(isinstance(part, fx.Node) and shape(part) == shape(node) for part in node.args)
        and all(quantizer_before(model, part) is not None for part in node.args)
        and [type(module_of(model, user)) for user in node.users] == [Quantizer]
    )


def _is_average(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node averages all positions of a quantized tensor for a quantizer."""
    return (
        isinstance(module_of(model, node), nn.AdaptiveAvgPool2d)
        and math.prod(shape(node)[2:]) == 1 < math.prod(shape(node.args[0])[2:])
        and quantizer_before(model, node.args[0]) is not None
        and [type(module_of(model, user)) for user in node.users] == [Quantizer]
    )


def _fold_layer(
    model: fx.GraphModule, node: fx.Node, layer: nn.Module, grid: QParams | None, bias_on_grid: bool
) -> None:
    """Move the scales of the quantizers around a layer into its weights, or make these integers."""
    before = quantizer_before(model, node.args[0])
    reads_steps = before is not None and before.after == 1
    after = module_of(model, next(iter(node.users)))
    alone = isinstance(after, Quantizer) and len(node.users) == 1
    if reads_steps and alone and grid is not None and bias_on_grid:
        multiplier = grid.scale.float() * before.scale / after.scale
        after.before = float(multiplier) if multiplier.dim() == 0 else per_channel(multiplier, len(shape(node)))
        after.divisor = None
        steps = grid.scale.double().expand(channels_out(layer))
        view = taps(layer)
        view.copy_((view.double() / steps.view(view.shape[0], -1, 1, 1)).round())
        layer.bias.data.copy_((layer.bias.double() / (steps * before.scale)).round())
        return
    if reads_steps:
        scale_inputs(layer, torch.full((channels_in(layer),), before.scale))
    if alone:
        scale_outputs(layer, torch.full((channels_out(layer),), 1 / after.scale))
        after.divisor = None


def _fold_sum(model: fx.GraphModule, node: fx.Node) -> None:
    """Put a sum of steps in the place of a sum of values."""
    total = module_of(model, next(iter(node.users)))
    grids = [(part.scale, part.zero_point) for part in (*(quantizer_before(model, a) for a in node.args), total)]
    name = f"{node.name}_of_steps"
    model.add_submodule(name, IntegerSum(*grids))
    node.op, node.target = "call_module", name
    total.divisor = None


def _fold_average(model: fx.GraphModule, node: fx.Node) -> None:
    """Add steps up over all positions, and let the quantizer behind divide by their number too."""
    before, after = quantizer_before(model, node.args[0]), module_of(model, next(iter(node.users)))
    model.set_submodule(node.target, PositionSum())
    positions = math.prod(shape(node.args[0])[2:])
    after.before, after.divisor = float(torch.tensor(before.scale) / (torch.tensor(after.scale) * positions)), None
