"""Noise-optimal equalization: scales under which rounding adds least noise to the output.

Scales between channels move precision: dividing a channel by s and multiplying its sinks' weights by s leaves the
network as it is, and changes what share of each tensor's 2^bits steps the channel gets. To first order, rounding adds
to the output the sum over all tensors of step^2 / 12 times the output's sensitivity to it. Over the logarithms of
the scales that sum is convex (maxima and sums of exponentials), so gradient descent minimises it. Not in the paper.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from utils.calibration.fidelity import Fidelity
from utils.calibration.moments import Statistics
from utils.calibration.observers import channel_extremes, input_means
from utils.calibration.ranges import CONTRADICTED, ChannelRanges, batchnorm_ranges
from utils.calibration.sensitivity import Sensitivity, output_sensitivity
from utils.core.hashing import content_hash, measured_once
from utils.graph.layers import grouped_weight
from utils.graph.nodes import module_of, weighted_nodes
from utils.graph.regions import Region, stored_nodes
from utils.passes.equalization import activation_reach
from utils.passes.log import PassLog
from utils.quantization.qparams import may_have_zero_points

IMAGES = 16  # on which the output's sensitivity is measured
ITERATIONS, LEARNING_RATE = 300, 0.03  # of Adam over the logarithms of the scales


@dataclass(frozen=True)
class QuantScheme:
    """How weights and activations are to be quantized, as far as their noise depends on it.

    per_channel, symmetric: of weights; is_symmetric says it of one layer. signed: activations are symmetric around 0.
    weights, activations: by layer and by node, where the bits are others.
    """

    bits_weight: int
    bits_activation: int
    per_channel: bool = False
    symmetric: bool = True
    signed: bool = False
    weights: Mapping[str, int] = field(default_factory=dict)
    activations: Mapping[str, int] = field(default_factory=dict)

    def is_symmetric(self, layer: str) -> bool:
        """Whether a layer's weights have a symmetric range."""
        bits = self.weights.get(layer, self.bits_weight)
        return self.symmetric or not may_have_zero_points(bits, self.per_channel)

    def weight_steps(self, layer: str) -> int:
        """Steps from the smallest to the largest weight of a layer; of a symmetric range, from 0 to the largest."""
        return 2 ** (self.weights.get(layer, self.bits_weight) - self.is_symmetric(layer)) - 1

    def activation_steps(self, node: str) -> int:
        """Steps from the lowest to the highest value of a node; of a signed range, from 0 to the furthest end."""
        return 2 ** (self.activations.get(node, self.bits_activation) - self.signed) - 1


@dataclass(frozen=True)
class Observed:
    """What the network does on images: the output's sensitivity, and the range of every node's channels."""

    sensitivity: Sensitivity
    ranges: ChannelRanges


@measured_once
def observe_on_images(model: fx.GraphModule, images: Tensor) -> Observed:
    """images: [N, C, H, W]; the first few of them for the sensitivity."""
    sensitivity = output_sensitivity(model, images[:IMAGES], input_means(model, images))
    return Observed(sensitivity, channel_extremes(model, images))


def noise_optimal_scales(
    model: fx.GraphModule,
    regions: list[Region],
    log: PassLog,
    statistics: Statistics,
    observed: Observed,
    scheme: QuantScheme,
) -> list[Tensor]:
    """For every region the scales [C] under which rounding weights and activations adds least to the output.

    Channels reach as far as on images, or as their range from BatchNorm, if that is wider: one that no image activates
    must not be stretched. A range from BatchNorm that is far from that on images is wrong and does not count.
    """
    if not regions:
        return []
    noise = _Noise(model, regions, _activation_reaches(model, regions, statistics, observed), observed, scheme)
    if (key := content_hash(vars(noise))) not in _MINIMA:
        _MINIMA[key] = _minimise(noise)
    scales, (before, after) = _MINIMA[key]
    log.note(f"noise-optimal equalization: predicted quantization noise at the output {after - before:+.1f} dB")
    return list(scales.split(noise.sizes))


def _activation_reaches(
    model: fx.GraphModule, regions: Sequence[Region], statistics: Statistics, observed: Observed
) -> dict[str, tuple[Tensor, Tensor]]:
    """How far the channels [C] of every stored tensor reach below and above 0, by node."""
    from_batchnorm = batchnorm_ranges(statistics)
    reaches = {}
    for region in regions:
        known = activation_reach(model, region, from_batchnorm)
        for name, producer in stored_nodes(model, region).items():
            smallest, largest = observed.ranges[name]
            low, high = (side.clamp_min(0) for side in (-smallest, largest))
            reach = None if known is None or not producer else known[region.sources.index(producer)]
            if reach is not None and reach.max() < CONTRADICTED * torch.maximum(low, high).max():
                low, high = low if region.rectified else torch.maximum(low, reach), torch.maximum(high, reach)
            reaches[name] = low, high
    return reaches


def _weight_reaches(name: str, layer: nn.Module, scheme: QuantScheme) -> list[Tensor]:
    """Logarithms [groups, out, in] of how far a layer's weights reach from 0, over kernel positions.

    One tensor where all ranges are symmetric; else two, below 0 and above it, whose sum is the range.
    """
    view = grouped_weight(layer)
    furthest = view.abs().amax(3)
    if scheme.symmetric:
        sides = [furthest]
    elif scheme.is_symmetric(name):
        sides = [torch.zeros_like(furthest), furthest]
    else:
        sides = [-view.amin(3), view.amax(3)]
    return [side.clamp_min(1e-30).log() for side in sides]


class _Noise:
    """The quantization noise at the output, times 12, as a function of the logarithms of the regions' scales.

    The logarithms are one vector [X], the regions' channels one after the other. What the layers read and make are
    vectors too, layer by layer: for each channel the place of its logarithm behind a leading 0, which stands for all
    channels of no region. So all layers take few operations together.
    """

    def __init__(
        self,
        model: fx.GraphModule,
        regions: Sequence[Region],
        reaches: dict[str, tuple[Tensor, Tensor]],
        observed: Observed,
        scheme: QuantScheme,
    ):
        self.scheme, self.sizes = scheme, [region.channels for region in regions]
        layers = {node.target: module_of(model, node) for node in weighted_nodes(model)}
        names = [n for region in regions for n in (*region.sources, *(s.name for s in region.sinks)) if n in layers]
        names = list(dict.fromkeys(names))
        self.power = [observed.sensitivity.weights[name] for name in names]  # [groups, out, in] of each layer
        reach = [_weight_reaches(name, layers[name], scheme) for name in names]
        self.reach = list(zip(*reach, strict=True))  # by side, of each layer
        places = torch.arange(1, sum(self.sizes) + 1).split(self.sizes)
        read, made = _places(regions, places, dict(zip(names, self.power, strict=True)))
        self.reads, self.makes = [len(place) for place in read], [len(place) for place in made]
        self.read, self.made = torch.cat(read), torch.cat(made)
        self.layer_of = torch.arange(len(names)).repeat_interleave(torch.tensor(self.makes))
        self.weight_steps = torch.tensor([math.log(scheme.weight_steps(name)) for name in names])[self.layer_of]
        stored = [
            (name, place)
            for region, place in zip(regions, places, strict=True)
            for name in stored_nodes(model, region)
            if name in observed.sensitivity.activations
        ]
        self.steps = torch.tensor([float(scheme.activation_steps(name)) for name, _ in stored])
        stored = [(place, observed.sensitivity.activations[name], *reaches[name]) for name, place in stored]
        empty = (torch.zeros(0, dtype=torch.long), *[torch.zeros(0)] * 3)
        self.stored, *self.activations = (torch.cat(parts) for parts in zip(empty, *stored, strict=True))
        self.tensor_of = torch.arange(len(stored)).repeat_interleave(
            torch.tensor([len(one[0]) for one in stored], dtype=torch.long)
        )

    def __call__(self, logs: Tensor) -> Tensor:
        """logs: [X]."""
        padded = torch.cat([logs.new_zeros(1), logs])
        return self._of_weights(padded[self.read], padded[self.made]) + self._of_activations(padded[self.stored])

    def _of_weights(self, read: Tensor, made: Tensor) -> Tensor:
        """read, made: the logarithms of what all layers read, and of what they make."""
        step = torch.stack([self._largest(side, read, made) for side in self.reach]).logsumexp(0)
        step = step if self.scheme.per_channel else step[self.layer_of]
        inputs = [
            one.view(len(power), -1, 1)
            for one, power in zip((-2 * read).exp().split(self.reads), self.power, strict=True)
        ]
        heard = torch.cat([(power @ one).flatten() for power, one in zip(self.power, inputs, strict=True)])
        return ((2 * (step - self.weight_steps + made)).exp() * heard).sum()

    def _largest(self, reach: Sequence[Tensor], read: Tensor, made: Tensor) -> Tensor:
        """Logarithm of the largest scaled weight of every layer, or of every channel that is made.

        reach: logarithms [groups, out, in] of each layer's weights.
        """
        values, columns, rows = [], [], []
        first_read = first_made = 0
        with torch.no_grad():  # the place alone: the maximum's gradient is that of what stands there
            for side, inputs, outputs in zip(reach, read.split(self.reads), made.split(self.makes), strict=True):
                groups, out, into = side.shape
                largest, column = (part.flatten() for part in (side + inputs.view(groups, 1, into)).max(2))
                row = torch.arange(groups * out)
                row = row if self.scheme.per_channel else (largest - outputs).argmax().view(1)
                column = column[row]
                values.append(side.flatten(0, 1)[row, column])
                columns.append(first_read + row // out * into + column)
                rows.append(first_made + row)
                first_read, first_made = first_read + groups * into, first_made + groups * out
        return torch.cat(values) + read[torch.cat(columns)] - made[torch.cat(rows)]

    def _of_activations(self, log: Tensor) -> Tensor:
        """log: the logarithms of the channels of all stored tensors."""
        heard, *reaches = self.activations
        tensors = log.new_zeros(int(self.tensor_of[-1]) + 1 if len(log) else 0)
        ends = [tensors.scatter_reduce(0, self.tensor_of, reach * (-log).exp(), "amax") for reach in reaches]
        reach = torch.maximum(*ends) if self.scheme.signed else sum(ends)
        step = reach / self.steps
        return (step.square() * tensors.index_add(0, self.tensor_of, heard * (2 * log).exp())).sum()


def _places(
    regions: Sequence[Region], places: Sequence[Tensor], power: dict[str, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each layer, the places of the channels that it reads and of those that it makes; 0 for channels of no region.

    places: [C] of each region. power: [groups, out, in] of each layer, by name.
    """
    read = {name: torch.zeros(one.shape[0] * one.shape[2], dtype=torch.long) for name, one in power.items()}
    made = {name: torch.zeros(one.shape[0] * one.shape[1], dtype=torch.long) for name, one in power.items()}
    for region, place in zip(regions, places, strict=True):
        for name in region.sources:
            if name in made:  # a layer
                made[name] = made[name] + place
        for sink in region.sinks:
            read[sink.name] = read[sink.name] + sink.gather(place, elsewhere=0).flatten()
    return list(read.values()), list(made.values())


# What _minimise found, by the hash of all that a _Noise holds: the rows of a table and the candidates of a search ask
# for the same scales again and again.
_MINIMA: dict[str, tuple[Tensor, tuple[float, float]]] = {}


def _minimise(noise: _Noise) -> tuple[Tensor, tuple[float, float]]:
    """The scales [X] of least noise by gradient descent, and the noise without scales and with them in dB."""
    logs = torch.zeros(sum(noise.sizes), requires_grad=True)
    optimizer = torch.optim.Adam([logs], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ITERATIONS)
    before = float(noise(logs).detach())
    for _ in range(ITERATIONS):
        with torch.enable_grad():
            loss = noise(logs).log()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    after = float(noise(logs).detach())
    decibels = tuple(10 * math.log10(max(power / 12, 1e-30)) for power in (before, after))
    return logs.detach().exp(), decibels


# ------------------------------------------------------------------------------------------- choice

Result = TypeVar("Result")


def choose_nearest(
    ways: dict[str, Callable[..., Result]],
    fidelity_of: Callable[[Result], Fidelity],
    sinks: set[str],
    rounds: int = 6,
) -> tuple[Result, str]:
    """Of several equalizations the one whose quantized output on images is nearest to the float one's; and why.

    ways: by description, what quantizes after one, given the layers to leave out as `without`; the first is without any
    equalization. The best of them is tried again without the layer that it harms most, as long as that helps: one
    reader of unlike branches can lose what all other layers win. sinks: the layers that can be skipped.
    """
    tried = {name: way() for name, way in ways.items()}
    none, *others = ways
    best = max(others, key=lambda name: fidelity_of(tried[name]).output)
    before, current = fidelity_of(tried[none]).layers, fidelity_of(tried[best])
    without: frozenset[str] = frozenset()
    for _ in range(min(rounds, len(sinks))):
        harmed = min(sinks - without, key=lambda name: current.layers[name] - before[name])
        without |= {harmed}
        name = f"{best}, without {', '.join(sorted(without))}"
        tried[name] = ways[best](without=without)
        if fidelity_of(tried[name]).output <= current.output:
            break
        current = fidelity_of(tried[name])
    chosen = max(tried, key=lambda name: fidelity_of(tried[name]).output)
    shown = ", ".join(f"{name} {fidelity_of(result).output:.2f} dB" for name, result in tried.items())
    return tried[chosen], f"equalization: {chosen}, the nearest on held-out images ({shown})"
