"""Noise-optimal equalization: scales under which rounding adds least noise to the output.

Scales between channels move precision: dividing a channel by s and multiplying its sinks' weights by s leaves the
network as it is, and changes what share of each tensor's 2^bits steps the channel gets. To first order, rounding adds
to the output the sum over all tensors of step^2 / 12 times the output's sensitivity to it. Over the logarithms of
the scales that sum is convex (maxima and sums of exponentials), so gradient descent minimises it. Not in the paper.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from utils.calibration.fidelity import Fidelity
from utils.calibration.moments import Statistics
from utils.calibration.observers import channel_extremes, input_means
from utils.calibration.ranges import CONTRADICTED, ChannelRanges, batchnorm_ranges
from utils.calibration.sensitivity import Sensitivity, output_sensitivity
from utils.graph.layers import grouped_weight
from utils.graph.nodes import module_of, weighted_nodes
from utils.graph.regions import Region, stored_nodes
from utils.passes.equalization import activation_reach
from utils.passes.log import PassLog

IMAGES = 16  # on which the output's sensitivity is measured
ITERATIONS, LEARNING_RATE = 300, 0.03  # of Adam over the logarithms of the scales


@dataclass(frozen=True)
class QuantScheme:
    """How weights and activations are to be quantized, as far as their noise depends on it."""

    bits_weight: int
    bits_activation: int
    per_channel: bool = False
    symmetric: bool = True

    @property
    def weight_steps(self) -> int:
        """Steps from the smallest to the largest weight; of a symmetric range, from 0 to the largest."""
        return 2 ** (self.bits_weight - 1) - 1 if self.symmetric else 2**self.bits_weight - 1


@dataclass(frozen=True)
class Observed:
    """What the network does on images: the output's sensitivity, and the range of every node's channels."""

    sensitivity: Sensitivity
    ranges: ChannelRanges


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
    model_of_noise = _Noise(model, regions, _activation_reaches(model, regions, statistics, observed), observed, scheme)
    scales, (before, after) = _minimise(model_of_noise)
    log.note(f"noise-optimal equalization: predicted quantization noise at the output {after - before:+.1f} dB")
    return scales


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


def _weight_reaches(layer: nn.Module, symmetric: bool) -> list[Tensor]:
    """Logarithms [groups, out, in] of how far a layer's weights reach from 0, over kernel positions.

    One tensor where the range is symmetric; else two, below 0 and above it, whose sum is the range.
    """
    view = grouped_weight(layer)
    sides = [view.abs().amax(3)] if symmetric else [-view.amin(3), view.amax(3)]
    return [side.clamp_min(1e-30).log() for side in sides]


class _Noise:
    """The quantization noise at the output, times 12, as a function of the logarithms of the regions' scales."""

    def __init__(
        self,
        model: fx.GraphModule,
        regions: Sequence[Region],
        reaches: dict[str, tuple[Tensor, Tensor]],
        observed: Observed,
        scheme: QuantScheme,
    ):
        layers = {node.target: module_of(model, node) for node in weighted_nodes(model)}
        names = (n for region in regions for n in (*region.sources, *(s.name for s in region.sinks)) if n in layers)
        self.weights = {name: _weight_reaches(layers[name], scheme.symmetric) for name in dict.fromkeys(names)}
        self.activations = [  # by the region's number, its sensitivity and how far it reaches below and above 0
            (k, observed.sensitivity.activations[name], reaches[name])
            for k, region in enumerate(regions)
            for name in stored_nodes(model, region)
            if name in observed.sensitivity.activations
        ]
        self.regions, self.sensitivity, self.scheme = regions, observed.sensitivity.weights, scheme

    def __call__(self, logs: Sequence[Tensor]) -> Tensor:
        """logs: [C] for every region."""
        read = {name: torch.zeros(self.sensitivity[name].shape[::2]) for name in self.weights}  # [groups, in]
        made = {name: torch.zeros(self.sensitivity[name].shape[:2]) for name in self.weights}  # [groups, out]
        for region, log in zip(self.regions, logs, strict=True):
            for name in region.sources:
                if name in made:  # a layer
                    made[name] = made[name] + log.view(made[name].shape)
            for sink in region.sinks:
                inputs = read[sink.name]
                read[sink.name] = inputs + sink.gather(log, elsewhere=0).view_as(inputs)
        terms = [self._of_weights(name, read[name], made[name]) for name in self.weights]
        terms += [self._of_activation(logs[k], *tensor) for k, *tensor in self.activations]
        return torch.stack(terms).sum()

    def _of_weights(self, name: str, read: Tensor, made: Tensor) -> Tensor:
        sides = [_largest(side, read, made, self.scheme.per_channel) for side in self.weights[name]]
        step = torch.stack(sides).logsumexp(0) - math.log(self.scheme.weight_steps)
        power = self.sensitivity[name] @ (-2 * read).exp()[:, :, None]
        return ((2 * (step + made)).exp() * power[:, :, 0]).sum()

    def _of_activation(self, log: Tensor, sensitivity: Tensor, reaches: tuple[Tensor, Tensor]) -> Tensor:
        low, high = (reach * (-log).exp() for reach in reaches)
        step = (low.amax() + high.amax()) / (2**self.scheme.bits_activation - 1)
        return step.square() * (sensitivity * (2 * log).exp()).sum()


def _largest(weights: Tensor, read: Tensor, made: Tensor, per_channel: bool) -> Tensor:
    """Logarithm of the largest scaled weight: [] of all, or [groups, out]. weights: logarithms [groups, out, in]."""
    with torch.no_grad():  # the place alone: the maximum's gradient is that of what stands there
        place = (weights + read[:, None] - made[:, :, None]).flatten(0 if not per_channel else 2).argmax(-1)
    if per_channel:
        return weights.gather(2, place[:, :, None])[:, :, 0] + read.gather(1, place) - made
    group, out, column = torch.unravel_index(place, weights.shape)
    return weights[group, out, column] + read[group, column] - made[group, out]


def _minimise(noise: _Noise) -> tuple[list[Tensor], tuple[float, float]]:
    """The scales of least noise by gradient descent, and the noise without scales and with them in dB."""
    logs = [torch.zeros(region.channels, requires_grad=True) for region in noise.regions]
    optimizer = torch.optim.Adam(logs, lr=LEARNING_RATE)
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
    return [log.detach().exp() for log in logs], decibels


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
    return tried[chosen], f"equalization: {chosen}, the nearest on distilled images ({shown})"
