"""What the output hears of errors in weights and activations, and the channel scales under which it hears least.

Scales between channels move precision: dividing a channel by s and multiplying its readers' weights by s leaves the
network as it is, and changes what share of each tensor's 2^bits steps the channel gets. To first order,
rounding adds to the output the sum over all tensors of step^2 / 12 times how sensitive the output is to it. Over the
logarithms of the scales that sum is convex (maxima and sums of exponentials), so descent finds its least.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from utils.calibration.observers import Watched
from utils.graph.capture import module_of, weighted_nodes
from utils.graph.layers import taps
from utils.graph.regions import Link, stored_nodes

STEPS, RATE = 300, 0.03  # of Adam over the logarithms


@dataclass(frozen=True)
class Sensitivity:
    """Power added to the network's outputs by independent errors of unit power, averaged over images.

    weights: by layer, [groups, out, in], for all kernel positions together. A shift of the layer's mean is left
    out, as bias correction takes it back. activations: by node, [C], for all positions together that are not 0: that is on every grid.
    """

    weights: dict[str, Tensor]
    activations: dict[str, Tensor]


@dataclass(frozen=True)
class Tensors:
    """What quantizers see of a network before any scale.

    weights: by layer, the largest absolute weight [groups, out, in] over kernel positions. activations: by node, how
    far its channels [C] reach below and above 0.
    """

    weights: dict[str, Tensor]
    activations: dict[str, tuple[Tensor, Tensor]]


def sensitivity(model: fx.GraphModule, images: Tensor, means: dict[str, Tensor], seed: int = 0) -> Sensitivity:
    """By gradients of randomly weighted outputs, an image at a time (Hutchinson's estimate).

    images: [N, C, H, W]. means: [C_in] of what each layer reads, by layer.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    layers = {node.target: module_of(model, node) for node in weighted_nodes(model)}
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.zeros(taps(layer).shape[:3]) for name, layer in layers.items()}
    activations: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}

    def keep(node: fx.Node, value: Tensor) -> None:
        if value.requires_grad and value.dim() > 1:
            value.retain_grad()
            values[node.name] = value

    interpreter = Watched(model, keep)
    for image in images.split(1):
        values.clear()
        model.zero_grad()
        with torch.enable_grad():
            outputs = interpreter.run(image)
            outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
            sum((output * torch.randn(output.shape, generator=generator)).sum() for output in outputs).backward()
        for name, layer in layers.items():
            if layer.weight.grad is None:
                continue
            gradient = taps(layer, layer.weight.grad)
            groups, out = gradient.shape[:2]
            of_mean = layer.bias.grad.view(groups, out, 1, 1) * means[name].view(groups, 1, -1, 1)
            weights[name] += (gradient - of_mean).square().sum(3) / len(images)
        for name, value in values.items():
            if value.grad is not None:
                heard = value.grad.square() * (value != 0)
                power = heard.transpose(0, 1).flatten(1).sum(1) / len(images)
                activations[name] = activations.get(name, 0) + power
    return Sensitivity(weights, activations)


def quietest_scales(
    model: fx.GraphModule,
    links: Sequence[Link],
    tensors: Tensors,
    heard: Sensitivity,
    bits: tuple[int, int],
    per_channel: bool,
) -> tuple[list[Tensor], tuple[float, float]]:
    """For every link the scales [C] under which rounding adds least to the output; what it adds before and after, in dB.

    bits: of weights and activations. per_channel: a weight grid for each output channel.
    """
    stored = [
        (k, name) for k, link in enumerate(links) for name in stored_nodes(model, link) if name in heard.activations
    ]
    names = dict.fromkeys(name for link in links for name in (*link.producers, *(port.name for port in link.readers)))
    largest = {name: tensors.weights[name].clamp_min(1e-30).log() for name in names}
    logs = [torch.zeros(link.channels, requires_grad=True) for link in links]

    def noise() -> Tensor:
        """Of all tensors, times 12."""
        read = {name: torch.zeros(heard.weights[name].shape[::2]) for name in names}  # [groups, in]
        made = {name: torch.zeros(heard.weights[name].shape[:2]) for name in names}  # [groups, out]
        for link, log in zip(links, logs, strict=True):
            for name in link.producers:
                made[name] = made[name] + log.view(made[name].shape)
            for port in link.readers:
                read[port.name] = read[port.name] + port.across(read[port.name].numel(), log, 0).view_as(
                    read[port.name]
                )
        terms = []
        for name in names:
            step = _largest(largest[name], read[name], made[name], per_channel) - math.log(2 ** (bits[0] - 1) - 1)
            power = heard.weights[name] @ (-2 * read[name]).exp()[:, :, None]
            terms.append(((2 * (step + made[name])).exp() * power[:, :, 0]).sum())
        for k, name in stored:
            low, high = (reach * (-logs[k]).exp() for reach in tensors.activations[name])
            step = (low.amax() + high.amax()) / (2 ** bits[1] - 1)
            terms.append(step.square() * (heard.activations[name] * (2 * logs[k]).exp()).sum())
        return torch.stack(terms).sum()

    optimizer = torch.optim.Adam(logs, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    before = float(noise().detach())
    for _ in range(STEPS if logs else 0):
        with torch.enable_grad():
            loss = noise().log()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    after = float(noise().detach())
    decibels = tuple(10 * math.log10(max(power / 12, 1e-30)) for power in (before, after))
    return [log.detach().exp() for log in logs], decibels


def _largest(weights: Tensor, read: Tensor, made: Tensor, per_channel: bool) -> Tensor:
    """Logarithm of the largest scaled weight: [] of all, or [groups, out]. weights: logarithms [groups, out, in]."""
    with torch.no_grad():  # the place alone: the maximum's gradient is that of what stands there
        place = (weights + read[:, None] - made[:, :, None]).flatten(0 if not per_channel else 2).argmax(-1)
    if per_channel:
        return weights.gather(2, place[:, :, None])[:, :, 0] + read.gather(1, place) - made
    group, out, column = torch.unravel_index(place, weights.shape)
    return weights[group, out, column] + read[group, column] - made[group, out]
