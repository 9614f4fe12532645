"""BatchNorm folding keeps the output and the statistics."""

import pytest
import torch
from networks import SPEC, Branches, Residual, chain, conv_bn, folded, randomise
from torch import nn

from utils.graph.capture import capture
from utils.passes.fold_batchnorm import fold_batchnorm
from utils.passes.log import PassLog


@pytest.mark.parametrize("network", [chain, Residual, Branches])
def test_folding_keeps_the_output_and_leaves_no_batchnorm(network):
    model = randomise(network())
    traced, statistics = folded(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in traced.modules())
    assert len(statistics) == len(norms)
    torch.testing.assert_close(traced(SPEC.probe()), model(SPEC.probe()), rtol=1e-4, atol=1e-5)


def test_statistics_are_the_bias_and_nearly_the_squared_weight():
    model = randomise(chain())
    _, statistics = folded(model)
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


def test_a_batchnorm_without_statistics_is_skipped_and_said():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    log = PassLog()
    assert not fold_batchnorm(capture(model, SPEC), log)
    assert [(entry.where, entry.detail) for entry in log.entries if entry.skipped] == [
        ("1", "it keeps no running statistics")
    ]
