"""How the terms of a sum go together, measured on noise, and what moments make of it."""

import pytest
import torch
from networks import SPEC, Residual, chain, made, randomise, settle
from torch import nn

from utils.calibration.moments import TOGETHER, Together, propagate
from utils.calibration.observers import observe
from utils.calibration.sums import measure_sums
from utils.graph.capture import capture
from utils.passes.fold_batchnorm import fold_batchnorm
from utils.passes.log import PassLog


class Sum(nn.Module):
    """One layer's output and three times the same: their sum or difference."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.layer = nn.Conv2d(3, 8, 1)

    def forward(self, x):
        y = 3 * self.layer(x)
        return y + self.layer(x) if self.kind == "plus" else y - self.layer(x)


def noted(model):
    graph = capture(model.eval(), SPEC)
    measure_sums(graph, SPEC)
    return graph, [node.meta[TOGETHER] for node in graph.graph.nodes if TOGETHER in node.meta]


def test_terms_of_one_sign_reach_further_than_independent_ones_and_a_difference_does_not():
    plus, minus = noted(Sum("plus"))[1][-1], noted(Sum("minus"))[1][-1]
    assert plus.above == pytest.approx(4 / 10**0.5, rel=1e-3) and plus.below == pytest.approx(plus.above, rel=1e-3)
    assert plus.variance == pytest.approx(1.6, rel=1e-3)
    assert minus == Together(minus.variance, 1.0, 1.0) and minus.variance == pytest.approx(0.4, rel=1e-3)


def test_moments_take_what_was_noted():
    graph = capture(settle(randomise(Residual())), SPEC)
    statistics = fold_batchnorm(graph, PassLog())
    node = next(node for node in graph.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    before = propagate(graph, SPEC, statistics)[node.name]
    node.meta[TOGETHER] = Together(1.5, 1.2, 1.3)
    after = propagate(graph, SPEC, statistics)[node.name]
    torch.testing.assert_close(after.variance, 1.5 * before.variance)
    torch.testing.assert_close(after.high - after.mean, 1.3 * (before.high - before.mean))
    torch.testing.assert_close(after.mean - after.low, 1.2 * (before.mean - before.low))


class Chain(nn.Module):
    """Residual blocks whose branches see the same, so that their sums grow together."""

    def __init__(self, blocks: int = 8, channels: int = 16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)) for _ in range(blocks)
        )
        for block in self.blocks:
            nn.init.dirac_(block[0].weight)
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.amax((2, 3)))


def test_the_sums_of_a_chain_grow_together():
    torch.manual_seed(0)
    model = settle(Chain())
    graph = capture(model, SPEC)
    statistics, sums = fold_batchnorm(graph, PassLog()), []
    observe(
        graph,
        SPEC.probe(64, seed=3),
        lambda node, value: sums.append(float(value.max())) if "add" in node.name else None,
    )
    last = [node.name for node in graph.graph.nodes if node.target is torch.ops.aten.add.Tensor][-1]
    apart = propagate(graph, SPEC, statistics)[last].range()[1]
    measure_sums(graph, SPEC)
    assert propagate(graph, SPEC, statistics)[last].range()[1] > 0.7 * sums[-1] > 1.5 * apart


class OfOne(Residual):
    """Fixes its batch at one image."""

    def forward(self, x):
        return super().forward(x.reshape(1, *x.shape[1:]))


def test_a_network_that_fixes_its_batch_is_run_so():
    graph = capture(settle(randomise(OfOne()), images=1), SPEC)
    assert graph.meta["batch"] == 1
    measure_sums(graph, SPEC)
    assert any(TOGETHER in node.meta for node in graph.graph.nodes)


def test_a_network_without_sums_is_not_run():
    assert noted(made(chain, settle)[0])[1] == []
