"""High-bias absorption: biases move on where nothing pads."""

import pytest
import torch
from networks import SPEC, conv_bn, folded, made, randomise, relu_chain, settle
from torch import nn

from utils.passes.bias_absorption import absorb_high_biases
from utils.passes.log import PassLog


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_absorption_moves_high_biases_and_keeps_the_output(activation):
    model = nn.Sequential(conv_bn(3, 6, activation=activation), conv_bn(6, 6, 1), nn.Flatten(), nn.Linear(6 * 22**2, 3))
    settle(model)
    model[0][1].weight.fill_(0.2)
    model[0][1].bias.fill_(1.5)
    traced, statistics = folded(model)
    before, bias = traced(SPEC.probe()), traced.get_submodule("0.0").bias.clone()
    moved = absorb_high_biases(traced, statistics, PassLog())
    assert (traced.get_submodule("0.0").bias < bias - 0.5).all()
    assert moved["0.0"].mean.max() < 0.7 < statistics["0.0"].mean.max()
    torch.testing.assert_close(traced(SPEC.probe()), before, rtol=0.02, atol=0.02)


def test_absorption_leaves_what_zero_padding_would_spoil():
    _, graph = made(relu_chain, randomise)
    graph.get_submodule("0.1").bias.fill_(9.0)
    traced, statistics = folded(graph)
    kept = traced.get_submodule("0.0").bias.clone()
    absorb_high_biases(traced, statistics, log := PassLog())
    torch.testing.assert_close(traced.get_submodule("0.0").bias, kept, rtol=0, atol=0)
    assert "0.0" in [entry.where for entry in log.entries if entry.detail == "a sink sees zero padding"]
