"""BatchNorm folding keeps the output and the statistics."""

import math

import pytest
import torch
from networks import SPEC, Branches, Residual, chain, conv_bn, folded, made, modules_in, randomise
from torch import nn

from utils.core.errors import UserError
from utils.graph.layers import ChannelAffine, Clip


@pytest.mark.parametrize("network", [chain, Residual, Branches])
def test_folding_keeps_the_output_and_leaves_no_batchnorm(network):
    model, graph = made(network, randomise)
    traced, statistics = folded(graph)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in traced.modules())
    assert len(statistics) == len(norms)
    torch.testing.assert_close(traced(SPEC.probe()), model(SPEC.probe()), rtol=1e-4, atol=1e-5)


def test_statistics_are_the_bias_and_nearly_the_squared_weight():
    model, graph = made(chain, randomise)
    _, statistics = folded(graph)
    torch.testing.assert_close(statistics["0.0"].mean, model[0][1].bias)
    torch.testing.assert_close(statistics["0.0"].variance, model[0][1].weight ** 2, rtol=1e-3, atol=0)


def test_a_batchnorm_alone_becomes_a_depthwise_layer():
    model = randomise(nn.Sequential(nn.AvgPool2d(2), nn.BatchNorm2d(3), conv_bn(3, 4)))
    traced, statistics = folded(model)
    layer = traced.get_submodule("1")
    assert (layer.kernel_size, layer.groups) == ((1, 1), 3)
    assert layer.weight_qparams is None and layer.bias_qparams is None
    assert set(statistics) == {"1", "2.0"}
    torch.testing.assert_close(traced(SPEC.probe()), model(SPEC.probe()), rtol=1e-4, atol=1e-5)


def test_a_batchnorm_without_statistics_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    graph, statistics = folded(model)
    assert statistics == {} and [node.op for node in graph.graph.nodes][-2] == "call_function"
    torch.testing.assert_close(graph(SPEC.probe()), model(SPEC.probe()), rtol=1e-4, atol=1e-5)


def test_a_batchnorm_with_a_negative_variance_is_refused():
    _, graph = made(chain, randomise)
    for wrong in (-1.0, math.nan):
        graph.get_submodule("1.1").running_var[3] = wrong
        with pytest.raises(UserError, match=r"BatchNorm '1\.1' has a running variance that is negative or no number"):
            folded(graph)


class Written(nn.Module):
    """A layer, a BatchNorm, and straight lines of its channels behind it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.gain = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) * self.gain - 0.25)


def test_straight_lines_of_channels_are_folded_with_their_statistics():
    model = randomise(Written())
    graph, statistics = folded(model)
    assert [type(module) for module in modules_in(graph, nn.Module)] == [nn.Conv2d, Clip]
    torch.testing.assert_close(graph(SPEC.probe()), model(SPEC.probe()), rtol=1e-4, atol=1e-5)
    gain = model.gain.flatten()
    torch.testing.assert_close(statistics["conv"].mean, model.norm.bias * gain - 0.25)
    torch.testing.assert_close(statistics["conv"].variance, (model.norm.weight * gain) ** 2, rtol=1e-3, atol=0)


def test_a_line_behind_what_others_read_is_not_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            x = self.conv(x)
            return torch.cat([x, 2 * x], 1)

    model = Shared().eval()
    graph, _ = folded(model)
    assert [type(module) for module in modules_in(graph, nn.Module)] == [nn.Conv2d, ChannelAffine]
    torch.testing.assert_close(graph(SPEC.probe()), model(SPEC.probe()))
