"""A lowered network computes on integers what the simulation does."""

import pytest
import torch
from networks import NETWORKS, SPEC, chain, made, settle
from torch import nn

from dfq import Recipe, quantize_data_free
from utils.backends.lowering import QuantizeToSteps, lower_to_integers
from utils.graph.layers import WEIGHTED
from utils.quantization.qparams import affine_qparams
from utils.quantization.quantizer import Quantizer


def quantized(network, recipe):
    model, graph = made(network, settle)
    return quantize_data_free(model, SPEC, recipe, captured=graph)


@pytest.mark.parametrize("name", NETWORKS)
def test_lowering_changes_no_layer_by_more_than_a_rounding_tie(name):
    """Fed the same input, every layer and its quantizer give the same steps but for ties."""
    result = quantized(NETWORKS[name], Recipe(equalize=True, quantize=True, correction=True))
    lowered, images = lower_to_integers(result.simulated), SPEC.probe(32, seed=5)
    simulated_out, lowered_out = result.simulated(images), lowered(images)
    step = max(module.scale for module in result.simulated.modules() if isinstance(module, Quantizer))
    assert ((simulated_out - lowered_out).abs() > 1e-5).float().mean() < 0.05
    assert (simulated_out - lowered_out).abs().max() <= 2 * step
    assert sum(module.to_steps for module in lowered.modules() if isinstance(module, QuantizeToSteps)) >= 2


class ChannelsLast(nn.Module):
    """Linear layers over the channels of a map, in a row, as in ConvNeXt."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
        self.first, self.second, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, images):
        x = self.stem(images).permute(0, 2, 3, 1)
        return self.head(self.second(self.first(x)).mean((1, 2)))


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_linear_layers_over_maps_have_their_channels_last(target):
    result = quantized(ChannelsLast, Recipe(quantize=True, per_channel=True, target=target))
    lowered, images = lower_to_integers(result.simulated), SPEC.probe(8, seed=5)
    steps = [module for module in lowered.modules() if isinstance(module, QuantizeToSteps) and module.to_steps]
    assert len(steps) >= 3  # the linear layers read steps
    expected = result.simulated(images)
    torch.testing.assert_close(lowered(images), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_layers_between_steps_hold_integers_and_the_simulation_stays():
    simulated = quantized(chain, Recipe(quantize=True)).simulated
    kept = {name: tensor.clone() for name, tensor in simulated.state_dict().items()}
    lowered = lower_to_integers(simulated)
    layers = {name: module for name, module in lowered.named_modules() if isinstance(module, WEIGHTED)}
    for name in ("0.0", "1.0", "2.0"):
        assert (layers[name].weight == layers[name].weight.round()).all() and layers[name].weight.abs().max() == 127
        assert (layers[name].bias == layers[name].bias.round()).all()
    for name, tensor in simulated.state_dict().items():
        torch.testing.assert_close(tensor, kept[name], rtol=0, atol=0)


@pytest.mark.parametrize("multiplier", [None, 1.0, 0.3, torch.rand(3, 1, 1)])
@pytest.mark.parametrize("to_steps", [False, True])
def test_quantizing_to_steps_leaves_its_input_unless_told_to_overwrite_it(multiplier, to_steps):
    quantizer = Quantizer(affine_qparams(torch.tensor(-1.0), torch.tensor(1.0), 8))
    module, x = QuantizeToSteps(quantizer, multiplier, to_steps), torch.randn(2, 3, 4, 4)
    kept, y = x.clone(), module(x)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)
    factor = 1 / quantizer.scale if multiplier is None else multiplier
    expected = (kept * factor).round().clamp(quantizer.step_min, quantizer.step_max)
    torch.testing.assert_close(y, expected if to_steps else expected * quantizer.scale)
    module.inplace = True
    torch.testing.assert_close(module(x), y, rtol=0, atol=0)
