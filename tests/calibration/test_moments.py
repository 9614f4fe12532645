"""Moments against large Gaussian samples, and the interpreter against the network on many images."""

import math

import pytest
import torch
import torch.nn.functional as F
from networks import SPEC, Branches, Residual, chain, made, randomise, settle
from torch import nn

from utils.calibration.moments import (
    Gaussian,
    Moments,
    Unknown,
    batchnorm_output,
    clipped_gaussian,
    larger_gaussian,
    mapped_gaussian,
    propagate,
)
from utils.graph.capture import capture
from utils.graph.layers import Clip
from utils.graph.nodes import module_of
from utils.passes.fold_batchnorm import fold_batchnorm
from utils.passes.log import PassLog

SAMPLES = 400_000
SUMS = torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor
CASES = [(mean, std) for mean in (-3.0, -0.5, 0.0, 0.7, 5.0, 9.0) for std in (0.01, 0.8, 4.0)]


@pytest.mark.parametrize(("mean", "std"), CASES)
@pytest.mark.parametrize(
    ("low", "high"), [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.5), (0.0, 0.05), (-math.inf, math.inf)]
)
def test_clipped_gaussian_agrees_with_a_sample(mean, std, low, high):
    sample = (torch.randn(SAMPLES, dtype=torch.float64) * std + mean).clamp(low, high)
    got_mean, got_variance = clipped_gaussian(*(torch.tensor([v]) for v in (mean, std**2, low, high)))
    assert got_mean.item() == pytest.approx(sample.mean().item(), abs=4 * std / SAMPLES**0.5)
    assert got_variance.item() == pytest.approx(sample.var().item(), rel=0.02, abs=1e-5 * std**2 + 1e-7)


def test_clipped_constant_is_the_clipped_constant():
    mean, variance = clipped_gaussian(
        torch.tensor([-1.0, 0.5, 9.0]), torch.zeros(3), torch.zeros(3), torch.full((3,), 6.0)
    )
    torch.testing.assert_close(mean, torch.tensor([0.0, 0.5, 6.0]))
    torch.testing.assert_close(variance, torch.zeros(3))


@pytest.mark.parametrize(
    "function", [F.hardswish, F.silu, torch.sigmoid, F.hardsigmoid, lambda x: F.leaky_relu(x, 0.1)]
)
@pytest.mark.parametrize(("mean", "std"), [(-2.0, 1.0), (0.3, 0.5), (1.0, 3.0)])
def test_mapped_gaussian_agrees_with_a_sample(function, mean, std):
    sample = function(torch.randn(SAMPLES) * std + mean)
    got_mean, got_variance = mapped_gaussian(torch.tensor([mean]), torch.tensor([std**2]), function)
    assert got_mean.item() == pytest.approx(sample.mean().item(), abs=0.02 * std)
    assert got_variance.item() == pytest.approx(sample.var().item(), rel=0.05, abs=1e-3)


@pytest.mark.parametrize("x", [(-1.0, 0.5), (0.0, 2.0)])
@pytest.mark.parametrize("y", [(0.3, 1.0), (-0.2, 0.0), (6.0, 0.5)])
def test_the_larger_of_two_gaussians_agrees_with_a_sample(x, y):
    sample = torch.maximum(*(torch.randn(SAMPLES) * std + mean for mean, std in (x, y)))
    got = larger_gaussian(*(Gaussian(torch.tensor(mean), torch.tensor(std**2)) for mean, std in (x, y)))
    assert got.mean.item() == pytest.approx(sample.mean().item(), abs=0.01)
    assert got.variance.item() == pytest.approx(sample.var().item(), rel=0.02, abs=1e-6)


def test_the_smaller_of_two_tensors_has_the_moments_of_many_images():
    class Smaller(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))

        def forward(self, x):
            return torch.min(self.one(x), self.two(x)).flatten(2)

    torch.manual_seed(0)
    model = Smaller().eval()
    model.one[1].bias.copy_(torch.tensor([0.0, 1.0, -1.0, 3.0]))
    known = list(propagate(graph := capture(model, SPEC), SPEC, fold_batchnorm(graph, PassLog())).values())[-1]
    wide, narrow = torch.randn(2, SAMPLES, 1)
    sample = torch.minimum(wide + model.one[1].bias, narrow)
    torch.testing.assert_close(known.mean[0, :, 0], sample.mean(0), rtol=0, atol=0.01)
    torch.testing.assert_close(known.variance[0, :, 0], sample.var(0), rtol=0.02, atol=0)


def test_batchnorm_of_a_constant_channel_has_no_variance():
    norm = nn.BatchNorm2d(2).eval()
    norm.running_var.copy_(torch.tensor([0.0, 1.0]))
    assert batchnorm_output(norm).variance[0] == 0
    assert batchnorm_output(norm).variance[1] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("build", [chain, Residual, Branches])
def test_moments_are_those_of_many_images(build):
    """Means and ranges from statistics alone against what the network does on images like those it was settled on."""
    _, traced = made(build, settle)
    moments = propagate(traced, SPEC, fold_batchnorm(traced, PassLog()))
    values = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            values[node.name] = result = super().run_node(node)
            return result

    Recorder(traced).run(SPEC.probe(256, seed=3))
    for name, known in moments.items():
        actual = values[name].transpose(0, 1).flatten(1)
        expected = known.mean.transpose(0, 1).flatten(1).mean(1)
        spread = actual.std(1) + 0.15
        assert ((actual.mean(1) - expected).abs() / spread).max() < 0.35, name
        low, high = known.range()
        inside = ((values[name] >= low - 1e-5) & (values[name] <= high + 1e-5)).float().mean()
        assert inside > 0.999, name


def test_padding_lowers_the_mean_at_the_border():
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)
    )
    model[3].weight.fill_(1.0)
    model[1].bias.fill_(2.0)
    traced = capture(model.eval(), SPEC)
    moments = propagate(traced, SPEC, fold_batchnorm(traced, PassLog()))
    mean = list(moments.values())[-1].mean[0, 0]
    torch.testing.assert_close(mean[0, 0] - model[3].bias[0], (mean[5, 5] - model[3].bias[0]) * 4 / 9)


def test_what_is_not_known_says_where_that_began():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.last(torch.cumsum(self.conv(x), 2))

    traced = capture(Odd(), SPEC)
    moments = propagate(traced, SPEC, {})
    assert isinstance(moments["conv"], Moments)
    assert isinstance(moments["last"], Unknown)
    assert "cumsum" in moments["last"].reason


def test_moments_of_a_clip_with_bounds_for_every_channel():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), Clip(0.0, torch.tensor([0.1, math.inf]))).eval()
    model[1].bias.fill_(1.0)
    traced = capture(model, SPEC)
    last = list(propagate(traced, SPEC, fold_batchnorm(traced, PassLog())).values())[-1]
    assert last.high[0, 0].max() == pytest.approx(0.1)
    assert last.high[0, 1].max() == pytest.approx(7.0, rel=1e-3)
    assert last.low.min() == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_of_rectified_values_reaches_as_far_as_they_do_together(sign):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU()) for _ in "ab")

        def forward(self, x):
            x, y = self.first(x), self.second(x)
            return (x + y if sign > 0 else x - y) * 2.0

    traced = capture(settle(randomise(Sum())), SPEC)
    moments = propagate(traced, SPEC, fold_batchnorm(traced, PassLog()))
    total = next(node.name for node in traced.graph.nodes if node.target in SUMS)
    first, second = (moments[node.name] for node in traced.graph.nodes if isinstance(module_of(traced, node), Clip))
    low, high = moments[total].range()
    if sign > 0:
        assert high > float(first.high.max()) and low >= 0
    else:
        assert high > 0 > low
    assert high <= float((first.high + (second.high if sign > 0 else -second.low)).max()) + 1e-5
    assert low >= float((first.low + (second.low if sign > 0 else -second.high)).min()) - 1e-5
