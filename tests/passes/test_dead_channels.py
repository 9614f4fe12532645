"""Dead channels: cleared where that is exact, left and said elsewhere."""

import pytest
import torch
from networks import SPEC, chain, conv_bn, folded, made, randomise, settle
from torch import nn

from dfq import Recipe, quantize_data_free
from utils.passes.dead_channels import clear_dead_channels
from utils.passes.log import PassLog


def dead_chain(bias: float, padding: int) -> nn.Module:
    """The first channel's weights have decayed to nothing, and its sink's BatchNorm saw no variance."""
    model = nn.Sequential(
        conv_bn(3, 4, 1, activation=nn.ReLU6),
        conv_bn(4, 4, 3, groups=4, padding=padding),
        conv_bn(4, 4, 1),
        nn.Flatten(),
        nn.Linear(4 * (22 + padding * 2) ** 2, 3),
    )
    randomise(model)
    model[0][0].weight[0] = 1e-20
    model[0][1].running_mean[0] = 0
    model[0][1].bias[0] = bias
    model[1][1].running_mean[0] = 0
    model[1][1].running_var[0] = 0
    return model


@pytest.mark.parametrize("padding", [0, 1])
def test_dead_channels_that_are_zero_are_cleared(padding):
    model = dead_chain(-1.0, padding)
    traced, statistics = folded(model)
    before, largest = traced(SPEC.probe()), traced.get_submodule("1.0").weight.abs().max()
    clear_dead_channels(traced, SPEC, statistics, PassLog())
    layer = traced.get_submodule("1.0")
    assert (layer.weight[0] == 0).all()
    assert layer.weight.abs().max() < largest / 20
    torch.testing.assert_close(traced(SPEC.probe()), before, rtol=1e-4, atol=1e-4)


def test_a_dead_constant_moves_to_the_sinks_bias_where_nothing_pads():
    model = dead_chain(0.5, padding=0)
    traced, statistics = folded(model)
    before, bias = traced(SPEC.probe()), traced.get_submodule("1.0").bias.clone()
    clear_dead_channels(traced, SPEC, statistics, PassLog())
    layer = traced.get_submodule("1.0")
    assert (layer.weight[0] == 0).all() and layer.bias[0] != bias[0]
    assert (layer.bias[1:] == bias[1:]).all()
    torch.testing.assert_close(traced(SPEC.probe()), before, rtol=1e-4, atol=1e-4)


def test_a_dead_constant_before_padding_is_left_and_said():
    traced, statistics = folded(dead_chain(0.5, padding=1))
    kept = traced.get_submodule("1.0").weight.clone()
    log = PassLog()
    clear_dead_channels(traced, SPEC, statistics, log)
    torch.testing.assert_close(traced.get_submodule("1.0").weight, kept, rtol=0, atol=0)
    assert [entry.where for entry in log.entries if entry.skipped] == ["0.0[0] in 1.0"]


def test_live_channels_are_not_cleared():
    traced, statistics = folded(made(chain, settle)[1])
    weights = {key: value.clone() for key, value in traced.state_dict().items()}
    clear_dead_channels(traced, SPEC, statistics, PassLog())
    for key, value in traced.state_dict().items():
        torch.testing.assert_close(value, weights[key], rtol=0, atol=0)


def test_statistics_of_dead_channels_are_returned_and_the_old_ones_kept():
    traced, statistics = folded(dead_chain(0.5, padding=0))
    kept = statistics["0.0"].variance.clone()
    corrected = clear_dead_channels(traced, SPEC, statistics, PassLog())["0.0"]
    assert corrected.variance[0] == 0 and corrected.mean[0] == 0.5
    assert (corrected.variance[1:] == kept[1:]).all()
    torch.testing.assert_close(statistics["0.0"].variance, kept, rtol=0, atol=0)


class Gated(nn.Module):
    """A layer whose first channel is constantly -1, times a gate of the whole map, in front of a ReLU."""

    def __init__(self, gate):
        super().__init__()
        self.values, self.factor = conv_bn(3, 4, 1, activation=nn.Identity), conv_bn(3, 4, 1, activation=nn.Identity)
        self.gate, self.head = gate, nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(torch.relu(self.values(x) * self.gate(self.factor(x))))


@pytest.mark.parametrize("gate", [torch.sigmoid, torch.tanh])
def test_a_product_in_front_of_a_relu_keeps_what_it_may_turn_positive(gate):
    torch.manual_seed(0)
    model = randomise(Gated(gate))
    model.values[0].weight[0] = 1e-20
    model.values[1].running_mean[0], model.values[1].bias[0] = 0, -1.0
    traced, statistics = folded(model)
    before = traced(SPEC.probe())
    clear_dead_channels(traced, SPEC, statistics, PassLog())
    torch.testing.assert_close(traced(SPEC.probe()), before, rtol=1e-4, atol=1e-4)


def test_channels_that_are_alive_beyond_the_statistics_are_left_and_said():
    stem, reader = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()), nn.Conv2d(8, 8, 1)
    with torch.no_grad():
        stem[1].running_var.fill_(1e-4)  # of outputs near 1: they reach a hundred times further than it says
        reader.weight.fill_(0.1)
        reader.bias.fill_(-10.0)
    model = nn.Sequential(stem, reader, nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    assert float(model[:3](SPEC.probe()).max()) > 0  # dead within BatchNorm's range, alive on the probe
    result = quantize_data_free(model, SPEC, Recipe(equalize=True))
    assert any("no dead channels are cleared" in warning for warning in result.log.warnings)
    torch.testing.assert_close(result.float(SPEC.probe()), model(SPEC.probe()), rtol=1e-3, atol=1e-3)
