"""Cross-layer equalization: the output stays, ranges become equal."""

from functools import partial

import pytest
import torch
from networks import NETWORKS, SPEC, Head, chain, folded, made, randomise, relu_chain, settle, spread_gains
from torch import fx, nn

from dfq import Recipe, quantize_data_free
from utils.backends.onnxruntime.export import build, check_parity
from utils.calibration.moments import Statistics
from utils.calibration.ranges import batchnorm_ranges
from utils.graph.layers import grouped_weight
from utils.graph.regions import find_regions
from utils.passes.equalization import cle_scales, equalization_scale, equalize
from utils.passes.log import PassLog


def cle(model: fx.GraphModule, statistics: Statistics) -> Statistics:
    """As the paper has it."""
    scales_of = partial(cle_scales, ranges=batchnorm_ranges(statistics))
    return equalize(model, statistics, scales_of, PassLog())


def spread(model: fx.GraphModule) -> float:
    """The mean over regions of how far the channels' weight ranges are apart, as a ratio."""
    ratios = []
    for region in find_regions(model)[0]:
        widths = grouped_weight(model.get_submodule(region.source)).abs().amax((2, 3))
        ratios.append(float(widths.max() / widths.min()))
    return sum(ratios) / len(ratios)


@pytest.mark.parametrize("name", NETWORKS)
def test_equalization_keeps_the_output_and_evens_the_ranges(name):
    traced, statistics = folded(made(NETWORKS[name], randomise, spread_gains)[1])
    before, unequal = traced(SPEC.probe()), spread(traced)
    cle(traced, statistics)
    torch.testing.assert_close(traced(SPEC.probe()), before, rtol=1e-4, atol=1e-5)
    assert spread(traced) < 0.5 * unequal


def test_equalized_pairs_have_equal_ranges():
    traced, _ = folded(made(relu_chain, randomise)[1])
    cle(traced, {})  # without statistics nothing limits a factor
    for region in find_regions(traced)[0]:
        first, second = traced.get_submodule(region.source), traced.get_submodule(region.sinks[0].name)
        r1 = grouped_weight(first).abs().amax((2, 3)).reshape(-1)
        r2 = grouped_weight(second).abs().amax((1, 3)).reshape(-1)
        torch.testing.assert_close(r1, r2, rtol=5e-3, atol=0)


def test_equalization_scale_by_hand():
    scale = equalization_scale(torch.tensor([4.0, 1.0, 0.0, 2.0]), torch.tensor([1.0, 4.0, 5.0, 0.0]))
    torch.testing.assert_close(scale, torch.tensor([2.0, 0.5, 1.0, 1.0]))


def test_returned_statistics_are_those_of_the_scaled_layers():
    traced, statistics = folded(made(relu_chain, settle)[1])
    kept = statistics["1.0"].mean.clone()
    scaled = cle(traced, statistics)
    outputs = {}
    layer = traced.get_submodule("1.0")
    layer.register_forward_hook(lambda module, args, out: outputs.update(out=out))
    traced(SPEC.probe(256, seed=7))
    actual = outputs["out"].transpose(0, 1).flatten(1)
    torch.testing.assert_close(scaled["1.0"].mean, actual.mean(1), rtol=0.15, atol=0.05)
    torch.testing.assert_close(scaled["1.0"].variance, actual.var(1), rtol=0.3, atol=0.02)
    torch.testing.assert_close(statistics["1.0"].mean, kept, rtol=0, atol=0)


def test_equalization_never_stretches_an_activation():
    _, graph = made(relu_chain, randomise)
    graph.get_submodule("0.0").weight[0] = 1e-6  # a channel of tiny weights and a common bias
    traced, statistics = folded(graph)
    after = batchnorm_ranges(cle(traced, statistics))["0.0"][1]
    assert after.max() <= batchnorm_ranges(statistics)["0.0"][1].max() * 1.001


def test_a_layer_that_equalization_harms_can_be_left_out():
    model, statistics = folded(made(chain, randomise)[1])
    before = {name: model.get_submodule(name).weight.clone() for name in ("0.0", "1.0", "2.0")}
    scales_of = partial(cle_scales, ranges=batchnorm_ranges(statistics))
    equalize(model, statistics, scales_of, log := PassLog(), without=frozenset({"1.0"}))
    changed = [name for name, weight in before.items() if (model.get_submodule(name).weight != weight).any()]
    assert changed == ["1.0", "2.0"]  # "1.0" as a source alone
    assert log.counts()["equalized"]["skipped"] == 2  # "0.0", and the layer that the output reads


class Normalised(nn.Module):
    """A layer of unlike channels, and a normalisation that reads it; with a skip, a sum reads it too."""

    def __init__(self, norm: nn.Module, last: bool = False, skip: bool = False):
        super().__init__()
        self.layer, self.norm, self.head = nn.Conv2d(3, 8, 3), norm, Head(8, 4)
        self.last, self.skip = last, skip
        with torch.no_grad():
            self.layer.weight.mul_(torch.logspace(-1.5, 1.5, 8).view(8, 1, 1, 1))

    def forward(self, x):
        x = self.layer(x)
        y = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.last else self.norm(x)
        return self.head(torch.relu(y + x if self.skip else y))


@pytest.mark.parametrize(
    "norm, last", [(nn.GroupNorm(2, 8), False), (nn.InstanceNorm2d(8, affine=True), False), (nn.LayerNorm(8), True)]
)
def test_channels_that_a_normalisation_reads_share_their_steps_evenly(norm, last):
    torch.manual_seed(0)
    model, images = Normalised(norm, last).eval(), SPEC.probe(16)
    noise = {}
    for equalized in (False, True):
        recipe = Recipe(quantize=True, equalize=equalized, distill_range=True)
        result = quantize_data_free(model, SPEC, recipe, images=images)
        wanted = model(images)
        torch.testing.assert_close(result.float(images), wanted, rtol=1e-3, atol=1e-4)
        noise[equalized] = float((result.simulated(images) - wanted).square().mean())
        assert ("layer_gain" in dict(result.simulated.named_modules())) == equalized
    assert noise[True] < noise[False] / 2
    assert check_parity(build(result, SPEC, {}), result.simulated, images).agreement == 1


def test_where_integers_read_the_layer_too_no_gain_is_left():
    model = Normalised(nn.GroupNorm(2, 8), skip=True).eval()
    recipe = Recipe(quantize=True, equalize=True, distill_range=True)
    result = quantize_data_free(model, SPEC, recipe, images=SPEC.probe(8))
    assert not any(name.endswith("gain") for name, _ in result.simulated.named_modules())
