"""A simulated network on the integers that an engine computes with.

What an engine stores between its kernels are steps of a quantizer, counted from its zero point. Here they are carried
in float32, and every kernel rounds the number that ONNX Runtime's kernel of the same layer rounds: layers multiply
their accumulator by one float32, as global averages do, and sums add their operands in its order. A tie then goes the
same way in both, and a whole network of integer kernels gives the same integers in both.
"""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from utils.graph.in_place import run_in_place
from utils.graph.layers import (
    WEIGHTED,
    along_outputs,
    channels_in,
    channels_out,
    grouped_weight,
    scale_inputs,
    scale_outputs,
)
from utils.graph.nodes import module_of, shape, tidy
from utils.graph.ops import is_size, keeps_grid
from utils.quantization.placement import is_concat, quantizer_before, value_sources
from utils.quantization.quantizer import Quantizer

aten = torch.ops.aten
Multiplier = float | Tensor | tuple[Tensor, Tensor]  # what QuantizeToSteps takes


class IntegerSum(nn.Module):
    """The sum of two tensors of steps, in steps of a third grid, as ONNX Runtime's QLinearAdd rounds it.

    first, second, total: scale and zero point of each 8-bit grid; steps are counted from the zero point. That
    kernel multiplies and adds in float32, fused: fixed + ratio * stored second + ratio * stored first.
    """

    makes_new_tensor = True

    def __init__(self, first: tuple[float, int], second: tuple[float, int], total: tuple[float, int]):
        super().__init__()
        scales = torch.tensor([first[0], second[0], total[0]])
        self.ratios = (scales[:2] / scales[2]).tolist()
        self.zero_points = first[1], second[1], total[1]
        offset = torch.tensor(self.ratios[1]) * self.zero_points[1]
        offset = (self.ratios[0] * self.zero_points[0] + offset.double()).float()  # one rounding: fused
        self.register_buffer("fixed", self.zero_points[2] - offset, persistent=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        sum_ = torch.add(self.fixed, second + self.zero_points[1], alpha=self.ratios[1])
        sum_.add_(first + self.zero_points[0], alpha=self.ratios[0])
        return sum_.round_().sub_(self.zero_points[2])


class LayerSum(nn.Module):
    """A layer's accumulator and a tensor of steps, added in float for a quantizer, in OpenVINO's order of operations.

    scale: [C, 1, ...] of the accumulator; bias: [C, 1, ...]. other, total: scale and zero point of the two grids.
    """

    makes_new_tensor = True

    def __init__(self, scale: Tensor, bias: Tensor, other: tuple[float, int], total: tuple[float, int]):
        super().__init__()
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.zero_points = other[1], total[1]
        self.shift, self.inverse = other[0] * other[1], float(1 / torch.tensor(other[0]))
        self.ratio = float(torch.tensor(other[0]) / torch.tensor(total[0]))

    def forward(self, accumulator: Tensor, steps: Tensor) -> Tensor:
        sum_ = (accumulator * self.scale).add_(self.bias).sub_(self.shift).mul_(self.inverse)
        sum_.add_(steps + self.zero_points[0]).mul_(self.ratio).add_(self.zero_points[1])
        return sum_.round_().sub_(self.zero_points[1])


class PositionSum(nn.Module):
    """[N, C, ...] -> [N, C, 1, ...], the sum of each channel's values."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(list(range(2, x.dim())), keepdim=True)


class QuantizeToSteps(nn.Module):
    """A quantizer as an engine computes it, which hands its steps on, or values if what reads it needs them.

    quantizer: of the simulation. multiplier: what the input is multiplied by before rounding, [] or [C, 1, ...]; None
    to divide it by the scale, as an engine's QuantizeLinear does; 1.0 where it is in steps already.
    to_steps: hand out steps, counted from the zero point, instead of values. A tuple of a scale and a bias [C, 1, ...] for
    a multiplier: of an accumulator, which gets them in float before it is divided.
    """

    def __init__(self, quantizer: Quantizer, multiplier: float | Tensor | tuple[Tensor, Tensor] | None, to_steps: bool):
        super().__init__()
        scale, bias = multiplier if isinstance(multiplier, tuple) else (None, None)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        multiplier = float(1 / torch.tensor(quantizer.scale)) if isinstance(multiplier, tuple) else multiplier
        self.quantizer, self.to_steps, self.inplace = quantizer, to_steps, False
        is_tensor = isinstance(multiplier, Tensor)
        self.factor = None if is_tensor else multiplier
        self.register_buffer("channel_factors", multiplier if is_tensor else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor if self.channel_factors is None else self.channel_factors
        if self.scale is not None:
            x = (x.mul_(self.scale) if self.inplace else x * self.scale).add_(self.bias)
            steps = x.mul_(factor).add_(self.quantizer.zero_point).round_().sub_(self.quantizer.zero_point)
            steps = self.quantizer.round_(steps)
            return steps if self.to_steps else steps.mul_(self.quantizer.scale)
        if factor is None:
            steps = x.div_(self.quantizer.scale) if self.inplace else x / self.quantizer.scale
        elif self.factor == 1:
            steps = x if self.inplace else x.clone()
        else:
            steps = x.mul_(factor) if self.inplace else x * factor
        steps = self.quantizer.round_(steps)
        return steps if self.to_steps else steps.mul_(self.quantizer.scale)


def lower_to_integers(simulated: fx.GraphModule) -> fx.GraphModule:
    """A copy of a simulated network that computes what an engine does, in fewer passes over its activations.

    A quantizer divides by its scale, rounds, and multiplies. Where all that reads it computes on integers, it
    hands out its steps and no longer multiplies; a layer or a sum before it hands over steps, and
    it no longer divides. A layer between two such quantizers has integer weights and biases.
    """
    model = copy.deepcopy(simulated)
    steps = _in_steps(model)
    multipliers: dict[fx.Node, Multiplier] = {}  # by quantizer: what its input is multiplied by
    for node in list(model.graph.nodes):
        if isinstance(module_of(model, node), WEIGHTED):
            multipliers |= _lower_layer(model, node, steps)
        elif _is_layer_sum(model, node) and all(_reads_steps(model, part, steps) for part in _parts(model, node)):
            multipliers |= _lower_layer_sum(model, node)
        elif _is_sum(model, node) and all(_reads_steps(model, part, steps) for part in node.args):
            multipliers |= _lower_sum(model, node)
        elif _is_average(model, node) and _reads_steps(model, node.args[0], steps):
            multipliers |= _lower_average(model, node)
    for node in model.graph.nodes:
        quantizer = module_of(model, node)
        if isinstance(quantizer, Quantizer):
            model.set_submodule(node.target, QuantizeToSteps(quantizer, multipliers.get(node), node in steps))
    return run_in_place(tidy(model))


def _in_steps(model: fx.GraphModule) -> set[fx.Node]:
    """The quantizers whose readers all compute on steps."""
    chosen = {node for node in model.graph.nodes if isinstance(module_of(model, node), Quantizer)}
    while refused := {
        node for node in chosen if not all(_takes_steps(model, reader, chosen) for reader in _readers(model, node))
    }:
        chosen -= refused
    return chosen


def _reads_steps(model: fx.GraphModule, node: fx.Node, steps: set[fx.Node]) -> bool:
    """Whether a value is handed on in steps of one quantizer."""
    return quantizer_before(model, node) is not None and value_sources(node)[0] in steps


def _readers(model: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, past whatever only moves it."""
    for user in node.users:
        if keeps_grid(user) or is_concat(user):
            yield from _readers(model, user)
        elif not is_size(user):
            yield user


def _takes_steps(model: fx.GraphModule, reader: fx.Node, chosen: set[fx.Node]) -> bool:
    """Whether a reader can compute on the steps of quantizers, all its operands being of the chosen ones."""
    if _is_layer_sum(model, reader):
        return all(set(value_sources(part)) <= chosen for part in _parts(model, reader))
    if not (isinstance(module_of(model, reader), WEIGHTED) or _is_sum(model, reader) or _is_average(model, reader)):
        return False
    operands = [value_sources(operand) for operand in reader.all_input_nodes]
    return all(
        set(sources) <= chosen and len({module_of(model, source).scale for source in sources}) == 1
        for sources in operands
    )


def _is_sum(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node adds two quantized tensors of one shape for a quantizer."""
    return (
        node.target is aten.add.Tensor
        and all(isinstance(part, fx.Node) and shape(part) == shape(node) for part in node.args)
        and all(quantizer_before(model, part) is not None for part in node.args)
        and [type(module_of(model, user)) for user in node.users] == [Quantizer]
    )


def _is_layer_sum(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node adds a quantized tensor to a layer that feeds nothing else, for a quantizer."""
    if node.target is not aten.add.Tensor or any(not isinstance(part, fx.Node) for part in node.args):
        return False
    layers = [part for part in node.args if isinstance(module_of(model, part), WEIGHTED)]
    return (
        len(layers) == 1
        and list(layers[0].users) == [node]
        and module_of(model, layers[0]).weight_qparams is not None
        and all(shape(part) == shape(node) and len(value_sources(part)) == 1 for part in node.args)
        and all(quantizer_before(model, part) is not None for part in _parts(model, node))
        and [type(module_of(model, user)) for user in node.users] == [Quantizer]
    )


def _parts(model: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """What the layer of such a sum reads, and what is added to it."""
    layer, other = sorted(node.args, key=lambda part: not isinstance(module_of(model, part), WEIGHTED))
    return [layer.args[0], other]


def _is_average(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node averages all positions of a quantized tensor for a quantizer."""
    return (
        node.target is aten.mean.dim
        and list(node.args[1]) == list(range(2, len(shape(node))))
        and math.prod(shape(node.args[0])[2:]) > 1
        and quantizer_before(model, node.args[0]) is not None
        and [type(module_of(model, user)) for user in node.users] == [Quantizer]
    )


def _lower_layer(model: fx.GraphModule, node: fx.Node, steps: set[fx.Node]) -> dict[fx.Node, Multiplier]:
    """Move the scales of the quantizers around a layer into its weights, or make these integers.

    Returns what the quantizer behind it multiplies by, if there is one that alone reads the layer.
    """
    layer, before, user = module_of(model, node), quantizer_before(model, node.args[0]), next(iter(node.users))
    if _is_layer_sum(model, user) and all(_reads_steps(model, part, steps) for part in _parts(model, user)):
        return {}  # lowered with the sum
    reads_steps = _reads_steps(model, node.args[0], steps)
    after = module_of(model, user) if len(node.users) == 1 else None
    after = after if isinstance(after, Quantizer) else None
    if reads_steps and after and layer.weight_qparams is not None:
        if layer.bias_qparams is None:
            return {user: _to_accumulator(layer, before.scale, len(shape(node)))}
        multiplier = layer.weight_qparams.scale.float() * before.scale / after.scale
        _to_integers(layer, before.scale)
        if multiplier.dim() == 0:
            return {user: float(multiplier)}
        return {user: along_outputs(layer, multiplier, len(shape(node)))}
    if reads_steps:
        scale_inputs(layer, torch.full((channels_in(layer),), before.scale))
    if not after:
        return {}
    scale_outputs(layer, torch.full((channels_out(layer),), 1 / after.scale))
    return {user: 1.0}


def _to_integers(layer: nn.Module, input_scale: float) -> None:
    """Replace a layer's weights and biases by their integers."""
    scale = layer.weight_qparams.scale.double().expand(channels_out(layer))
    view = grouped_weight(layer)
    view.copy_((view.double() / scale.view(view.shape[0], -1, 1, 1)).round())
    layer.bias.data.copy_((layer.bias.double() / (scale * input_scale)).round())


def _to_accumulator(layer: nn.Module, input_scale: float, dims: int) -> tuple[Tensor, Tensor]:
    """Replace a layer's weights by their integers and its bias by zeros; returns the accumulator's scale, and the bias.

    Both as outputs of so many dimensions take them.
    """
    bias = layer.bias.detach().clone()
    _to_integers(layer, input_scale)
    layer.bias.data.zero_()
    scale = (layer.weight_qparams.scale.float() * input_scale).expand(channels_out(layer)).clone()
    return along_outputs(layer, scale, dims), along_outputs(layer, bias, dims)


def _lower_layer_sum(model: fx.GraphModule, node: fx.Node) -> dict[fx.Node, Multiplier]:
    """Put a sum of an accumulator and steps in the place of one of a layer's output and values."""
    layer = next(part for part in node.args if isinstance(module_of(model, part), WEIGHTED))
    other = next(part for part in node.args if part is not layer)
    total, before = next(iter(node.users)), quantizer_before(model, layer.args[0])
    grids = [(one.scale, one.zero_point) for one in (quantizer_before(model, other), module_of(model, total))]
    scale, bias = _to_accumulator(module_of(model, layer), before.scale, len(shape(node)))
    name = f"{node.name}_of_accumulator"
    model.add_submodule(name, LayerSum(scale, bias, *grids))
    node.op, node.target, node.args = "call_module", name, (layer, other)
    return {total: 1.0}


def _lower_sum(model: fx.GraphModule, node: fx.Node) -> dict[fx.Node, Multiplier]:
    """Put a sum of steps in the place of a sum of values."""
    total = next(iter(node.users))
    quantizers = [*(quantizer_before(model, part) for part in node.args), module_of(model, total)]
    name = f"{node.name}_of_steps"
    model.add_submodule(name, IntegerSum(*((quantizer.scale, quantizer.zero_point) for quantizer in quantizers)))
    node.op, node.target = "call_module", name
    return {total: 1.0}


def _lower_average(model: fx.GraphModule, node: fx.Node) -> dict[fx.Node, Multiplier]:
    """Add steps up over all positions, and let the quantizer behind divide by their number too."""
    user = next(iter(node.users))
    before, after = quantizer_before(model, node.args[0]), module_of(model, user)
    name = f"{node.name}_of_steps"
    model.add_submodule(name, PositionSum())
    node.op, node.target, node.args = "call_module", name, (node.args[0],)
    positions = math.prod(shape(node.args[0])[2:])
    return {user: float(torch.tensor(before.scale) / (torch.tensor(after.scale) * positions))}
