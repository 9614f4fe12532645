"""Output sensitivity, against errors that are put in."""

from collections.abc import Callable

import pytest
import torch
from networks import SPEC, Residual, relu_chain, unlike
from torch import Tensor, fx

from utils.calibration.distillation import as_pixels
from utils.calibration.observers import channel_mean, input_means, observe
from utils.calibration.rendered import natural_noise
from utils.calibration.sensitivity import output_sensitivity

IMAGES = as_pixels(natural_noise(SPEC, 16, torch.Generator().manual_seed(0)), SPEC)


class Disturbed(fx.Interpreter):
    """Runs a network with the value of one node changed."""

    def __init__(self, model: fx.GraphModule, name: str, change: Callable[[Tensor], Tensor]):
        super().__init__(model)
        self.name, self.change = name, change

    def run_node(self, node: fx.Node) -> object:
        result = super().run_node(node)
        return self.change(result) if node.name == self.name else result


@pytest.mark.parametrize("name", ["0.0", "1.0", "2.0", "3.linear"])
def test_errors_of_weights_reach_the_output_as_predicted(name):
    model, _ = unlike(relu_chain)
    sensitivity = output_sensitivity(model, IMAGES.repeat(8, 1, 1, 1), input_means(model, IMAGES)).weights[name]
    layer, generator = model.get_submodule(name), torch.Generator().manual_seed(1)
    size, measured, exact = 1e-4, [], layer.weight.clone()
    with torch.no_grad():
        plain = {node.target: value for node, value in values_of(model)}[name]
        for _ in range(60):
            layer.weight.copy_(exact + size * torch.randn(exact.shape, generator=generator))
            shift = channel_mean(layer, {node.target: value for node, value in values_of(model)}[name] - plain)
            layer.bias.sub_(shift)
            found = model(IMAGES)
            layer.weight.copy_(exact)
            layer.bias.add_(shift)
            measured.append(float((found - model(IMAGES)).square().sum()) / len(IMAGES))
    predicted = float(sensitivity.sum()) * size**2
    # A depthwise convolution pads with zeros: its border sees a mean of its own, which a bias takes back in part alone.
    assert sum(measured) / 60 == pytest.approx(predicted, rel=0.35)


def values_of(model: fx.GraphModule) -> list:
    values = []
    observe(model, IMAGES, lambda node, value: values.append((node, value.clone())))
    return values


def test_errors_of_activations_reach_the_output_as_predicted():
    model, _ = unlike(Residual)
    sensitivity = output_sensitivity(model, IMAGES.repeat(8, 1, 1, 1), input_means(model, IMAGES)).activations
    generator, size = torch.Generator().manual_seed(1), 1e-3

    def disturb(value: Tensor) -> Tensor:
        return value + size * torch.randn(value.shape, generator=generator) * (value != 0)

    for name in ("stem_2", "inner_2", "add_tensor"):
        with torch.no_grad():
            changes = [Disturbed(model, name, disturb).run(IMAGES) - model(IMAGES) for _ in range(60)]
        measured = sum(float(change.square().sum()) for change in changes) / 60 / len(IMAGES)
        assert measured == pytest.approx(float(sensitivity[name].sum()) * size**2, rel=0.25)
