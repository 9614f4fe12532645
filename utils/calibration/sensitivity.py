"""Output sensitivity: how much power errors in weights and activations add to a network's outputs."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from utils.calibration.observers import Observer
from utils.graph.layers import grouped_weight
from utils.graph.nodes import module_of, weighted_nodes


@dataclass(frozen=True)
class Sensitivity:
    """Power added to the network's outputs by independent errors of unit power, averaged over images.

    weights: by layer, [groups, out, in], for all kernel positions together. A shift of the layer's mean is left
    out, as bias correction takes it back. activations: by node, [C], for all positions together that are not 0, which
    is never rounded.
    """

    weights: dict[str, Tensor]
    activations: dict[str, Tensor]


def output_sensitivity(model: fx.GraphModule, images: Tensor, means: dict[str, Tensor], seed: int = 0) -> Sensitivity:
    """By gradients of randomly weighted outputs, an image at a time (Hutchinson's estimate).

    images: [N, C, H, W]. means: [C_in] of what each layer reads, by layer.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    layers = {node.target: module_of(model, node) for node in weighted_nodes(model)}
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.zeros(grouped_weight(layer).shape[:3]) for name, layer in layers.items()}
    activations: dict[str, Tensor] = {}
    for image in images.split(1):
        model.zero_grad()
        values = _backpropagate(model, image, generator)
        for name, layer in layers.items():
            if layer.weight.grad is not None:
                weights[name] += _weight_power(layer, means[name]) / len(images)
        for name, value in values.items():
            if value.grad is not None:
                power = value.grad.square() * (value != 0)
                power = power.transpose(0, 1).flatten(1).sum(1) / len(images)
                activations[name] = activations.get(name, 0) + power
    return Sensitivity(weights, activations)


def _backpropagate(model: fx.GraphModule, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Gradients of a random sum of the outputs; returns the values [1, C, ...] that now have one, by node."""
    values: dict[str, Tensor] = {}

    def keep(node: fx.Node, value: Tensor) -> None:
        if value.requires_grad and value.dim() > 1:
            value.retain_grad()
            values[node.name] = value

    with torch.enable_grad():
        outputs = Observer(model, keep).run(image)
        outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
        sum((output * torch.randn(output.shape, generator=generator)).sum() for output in outputs).backward()
    return values


def _weight_power(layer: nn.Module, mean: Tensor) -> Tensor:
    """Squared gradients [groups, out, in] of a layer's weights, less what a shift of the mean does. mean: [C_in]."""
    gradient = grouped_weight(layer, layer.weight.grad)
    groups, out = gradient.shape[:2]
    of_mean = layer.bias.grad.view(groups, out, 1, 1) * mean.view(groups, 1, -1, 1)
    return (gradient - of_mean).square().sum(3)
