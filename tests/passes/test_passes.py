"""The passes: exact ones leave the output alone and change the weights; the others do what they say."""

import math
from functools import partial

import pytest
import torch
from networks import SPEC, Branches, Residual, chain, conv_bn, randomise, settle
from torch import nn

import dfq
from dfq import Recipe, quantize_data_free
from utils.calibration.moments import SIGMAS
from utils.core.errors import UserError
from utils.graph.capture import trace
from utils.graph.layers import CappedReLU, taps
from utils.graph.regions import find_links
from utils.passes.log import Journal
from utils.quantization.quantizer import Quantizer
from utils.tasks.metrics import sqnr

NETWORKS = {"chain": chain, "relu chain": lambda: chain(nn.ReLU), "residual": Residual, "branches": Branches}


def folded(model):
    traced = trace(model, SPEC)
    return traced, dfq.fold_batchnorm(traced, Journal())


def equalize(model, statistics, journal):
    """As the paper has it."""
    dfq.equalize(
        model, statistics, partial(dfq.even_ranges, extremes=dfq.promised_extremes(statistics, SIGMAS)), journal
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_equalization_keeps_the_output_and_evens_the_ranges(name):
    model = randomise(NETWORKS[name]())
    for layer in model.modules():  # ranges that differ over channels, as trained ones do
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.mul_(torch.logspace(-1, 1, len(layer.weight)))
    traced, statistics = folded(model)
    before = traced(SPEC.probe())
    weights = {key: value.clone() for key, value in traced.state_dict().items()}
    equalize(traced, statistics, Journal())
    torch.testing.assert_close(traced(SPEC.probe()), before, rtol=1e-4, atol=1e-5)
    assert any(
        (traced.state_dict()[key] != value).any() for key, value in weights.items() if key in traced.state_dict()
    )


def test_equalized_pairs_have_equal_ranges():
    traced, statistics = folded(randomise(chain(nn.ReLU)))
    statistics.clear()  # nothing then limits a factor
    equalize(traced, statistics, Journal())
    for link in find_links(traced)[0]:
        first, second = traced.get_submodule(link.producer), traced.get_submodule(link.readers[0].name)
        r1 = taps(first).abs().amax((2, 3)).reshape(-1)
        r2 = taps(second).abs().amax((1, 3)).reshape(-1)
        torch.testing.assert_close(r1, r2, rtol=5e-3, atol=0)


def test_equalization_scale_by_hand():
    scale = dfq.equalization_scale(torch.tensor([4.0, 1.0, 0.0, 2.0]), torch.tensor([1.0, 4.0, 5.0, 0.0]))
    torch.testing.assert_close(scale, torch.tensor([2.0, 0.5, 1.0, 1.0]))


def test_relu6_gets_a_cap_per_channel():
    traced, statistics = folded(randomise(chain()))
    equalize(traced, statistics, Journal())
    caps = [module.cap for module in traced.modules() if isinstance(module, CappedReLU)]
    assert len(caps) == 3
    assert all(cap.unique().numel() > 1 for cap in caps)


def test_statistics_scale_with_the_weights():
    model = settle(chain(nn.ReLU))
    traced, statistics = folded(model)
    equalize(traced, statistics, Journal())
    outputs = {}
    layer = traced.get_submodule("1.0")
    layer.register_forward_hook(lambda module, args, out: outputs.update(out=out))
    traced(SPEC.probe(256, seed=7))
    actual = outputs["out"].transpose(0, 1).flatten(1)
    torch.testing.assert_close(statistics["1.0"].mean, actual.mean(1), rtol=0.15, atol=0.05)
    torch.testing.assert_close(statistics["1.0"].variance, actual.var(1), rtol=0.3, atol=0.02)


def test_equalization_never_stretches_an_activation():
    model = randomise(chain(nn.ReLU))
    model[0][0].weight[0] = 1e-6  # a channel of tiny weights and a common bias
    traced, statistics = folded(model)
    reach = statistics["0.0"].mean + 6 * statistics["0.0"].variance.sqrt()
    equalize(traced, statistics, Journal())
    after = statistics["0.0"].mean + 6 * statistics["0.0"].variance.sqrt()
    assert after.max() <= reach.max() * 1.001


def dead_chain(bias: float, padding: int) -> nn.Module:
    """The first channel's weights have decayed to nothing, and its reader's BatchNorm saw no variance."""
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
    dfq.clear_dead_channels(traced, SPEC, statistics, Journal())
    layer = traced.get_submodule("1.0")
    assert (layer.weight[0] == 0).all()
    assert layer.weight.abs().max() < largest / 20
    torch.testing.assert_close(traced(SPEC.probe()), before, rtol=1e-4, atol=1e-4)


def test_a_dead_constant_moves_to_the_readers_bias_where_nothing_pads():
    model = dead_chain(0.5, padding=0)
    traced, statistics = folded(model)
    before, bias = traced(SPEC.probe()), traced.get_submodule("1.0").bias.clone()
    dfq.clear_dead_channels(traced, SPEC, statistics, Journal())
    layer = traced.get_submodule("1.0")
    assert (layer.weight[0] == 0).all() and layer.bias[0] != bias[0]
    assert (layer.bias[1:] == bias[1:]).all()
    torch.testing.assert_close(traced(SPEC.probe()), before, rtol=1e-4, atol=1e-4)


def test_a_dead_constant_before_padding_is_left_and_said():
    traced, statistics = folded(dead_chain(0.5, padding=1))
    kept = traced.get_submodule("1.0").weight.clone()
    journal = Journal()
    dfq.clear_dead_channels(traced, SPEC, statistics, journal)
    torch.testing.assert_close(traced.get_submodule("1.0").weight, kept, rtol=0, atol=0)
    assert [entry.where for entry in journal.entries if entry.left_out] == ["0.0[0] in 1.0"]


def test_live_channels_are_not_cleared():
    traced, statistics = folded(settle(chain()))
    weights = {key: value.clone() for key, value in traced.state_dict().items()}
    dfq.clear_dead_channels(traced, SPEC, statistics, Journal())
    for key, value in traced.state_dict().items():
        torch.testing.assert_close(value, weights[key], rtol=0, atol=0)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_absorption_moves_high_biases_and_keeps_the_output(activation):
    model = nn.Sequential(conv_bn(3, 6, activation=activation), conv_bn(6, 6, 1), nn.Flatten(), nn.Linear(6 * 22**2, 3))
    settle(model)
    model[0][1].weight.fill_(0.2)
    model[0][1].bias.fill_(1.5)
    traced, statistics = folded(model)
    before, bias = traced(SPEC.probe()), traced.get_submodule("0.0").bias.clone()
    dfq.absorb_high_biases(traced, statistics, Journal())
    assert (traced.get_submodule("0.0").bias < bias - 0.5).all()
    assert statistics["0.0"].mean.max() < 0.7
    torch.testing.assert_close(traced(SPEC.probe()), before, rtol=0.02, atol=0.02)


def test_absorption_leaves_what_zero_padding_would_spoil():
    model = randomise(chain(nn.ReLU))
    model[0][1].bias.fill_(9.0)
    traced, statistics = folded(model)
    kept = traced.get_submodule("0.0").bias.clone()
    dfq.absorb_high_biases(traced, statistics, Journal())
    torch.testing.assert_close(traced.get_submodule("0.0").bias, kept, rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_correction_takes_the_mean_shift_out(name, clip):
    """Over many images, each output's mean is nearer to the float network's with corrected biases."""
    model, images = settle(NETWORKS[name]()), SPEC.probe(256, seed=7)
    expected = model(images).mean(0)
    errors = []
    for correction in (False, True):
        recipe = Recipe(quantize=True, bits_weight=4, bits_activation=16, correction=correction, clip_weight=clip)
        errors.append((quantize_data_free(model, SPEC, recipe).simulated(images).mean(0) - expected).abs().mean())
    assert errors[1] < 0.4 * errors[0]


def test_correction_counts_padding_as_zeros():
    """A depthwise layer over a constant: its exact mean shift is known by hand."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1, groups=2)).eval()
    model[1].weight.zero_()
    model[1].bias.fill_(1.0)
    model[1].running_var.fill_(1.0)
    result = quantize_data_free(model, SPEC, Recipe(quantize=True, bits_weight=3, bits_activation=16, correction=True))
    expected = model(SPEC.probe()).mean((0, 2, 3))
    torch.testing.assert_close(result.simulated(SPEC.probe()).mean((0, 2, 3)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_whole_recipe_comes_close_to_float(name, per_channel):
    model, images = settle(NETWORKS[name]()), SPEC.probe(64, seed=7)
    recipe = Recipe(equalize=True, absorption=True, quantize=True, correction=True, per_channel=per_channel)
    result = quantize_data_free(model, SPEC, recipe)
    assert sqnr(model(images), result.simulated(images)) > 25


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 12, 16])
def test_every_tensor_of_the_simulation_has_at_most_two_to_the_bits_values(bits):
    result = quantize_data_free(settle(Branches()), SPEC, Recipe(quantize=True, bits_weight=bits, bits_activation=bits))
    for name in result.weight_grids:
        assert len(result.simulated.get_submodule(name).weight.unique()) <= 2**bits
    seen = {}
    for name, module in result.simulated.named_modules():
        if isinstance(module, Quantizer):
            module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: len(out.unique())}))
    result.simulated(SPEC.probe(16))
    assert len(seen) == 5 and all(count <= 2**bits for count in seen.values())


def test_more_bits_come_closer():
    model, images = settle(chain()), SPEC.probe(64, seed=7)
    noise = [
        sqnr(
            model(images),
            quantize_data_free(
                model, SPEC, Recipe(equalize=True, quantize=True, correction=True, bits_weight=b, bits_activation=b)
            ).simulated(images),
        )
        for b in (4, 6, 8, 10, 12)
    ]
    assert noise == sorted(noise) and noise[-1] > 45


def quantizers(result):
    return {name: module for name, module in result.simulated.named_modules() if isinstance(module, Quantizer)}


def test_quantizers_stand_where_an_integer_engine_writes():
    result = quantize_data_free(settle(Residual()), SPEC, Recipe(quantize=True))
    # input; stem; inner; outer, before the add; the sum behind its ReLU; pooling; not the last linear layer
    assert len(quantizers(result)) == 6
    assert not any(isinstance(module, nn.ReLU) for module in result.simulated.modules())


def test_inputs_of_a_concat_share_one_grid():
    result = quantize_data_free(settle(Branches()), SPEC, Recipe(quantize=True))
    modules = quantizers(result)
    left, right = (module for name, module in modules.items() if name.startswith(("left", "right")))
    assert left.scale == right.scale
    assert not any("cat" in name for name in modules)


def test_biases_lie_on_the_grid_of_the_accumulator():
    result = quantize_data_free(settle(chain()), SPEC, Recipe(quantize=True))
    assert set(result.bias_grids) == set(result.weight_grids) == {"0.0", "1.0", "2.0", "3.linear"}
    for name, grid in result.bias_grids.items():
        steps = result.simulated.get_submodule(name).bias.double() / grid.scale.double()
        torch.testing.assert_close(steps, steps.round(), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_scales_changes_no_layer_by_more_than_a_rounding_tie(name):
    """Fed the same input, every layer and its quantizer give the same steps but for ties."""
    result = quantize_data_free(settle(NETWORKS[name]()), SPEC, Recipe(equalize=True, quantize=True, correction=True))
    fast, images = dfq.fold_scales(result.simulated, result.weight_grids, result.bias_grids), SPEC.probe(32, seed=5)
    plain_out, fast_out = result.simulated(images), fast(images)
    step = max(module.scale for module in quantizers(result).values())
    assert ((plain_out - fast_out).abs() > 1e-5).float().mean() < 0.05
    assert (plain_out - fast_out).abs().max() <= 2 * step
    carried = [module for module in fast.modules() if isinstance(module, Quantizer) and module.after == 1]
    assert len(carried) >= 2


def test_clipping_bounds_the_weights():
    result = quantize_data_free(settle(chain()), SPEC, Recipe(quantize=True, clip_weight=0.1, bits_weight=16))
    for name in result.weight_grids:
        assert result.simulated.get_submodule(name).weight.abs().max() <= 0.1 * 1.0001


def test_relu_pass_leaves_no_relu6():
    result = quantize_data_free(randomise(chain()), SPEC, Recipe(relu=True, equalize=True))
    assert not any(isinstance(module, nn.ReLU6 | CappedReLU) for module in result.float.modules())
    assert result.simulated is None


def test_the_loaded_network_is_never_touched():
    model = settle(chain())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantize_data_free(
        model, SPEC, Recipe(relu=True, equalize=True, absorption=True, clip_weight=0.1, quantize=True, correction=True)
    )
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_a_pass_that_breaks_the_network_is_named():
    model = randomise(chain())
    expected = dfq.outputs_of(model, SPEC.probe())
    model[2][0].weight *= 1.01
    loaded, journal = randomise(chain()), Journal()
    with pytest.raises(UserError, match="equalization should leave the network's output as it is"):
        dfq.check_unchanged("equalization", expected, model, SPEC.probe(), loaded, journal)
    model[2][0].weight.fill_(math.nan)
    with pytest.raises(UserError, match="equalization"):
        dfq.check_unchanged("equalization", expected, model, SPEC.probe(), loaded, journal)


def test_a_network_that_amplifies_rounding_is_checked_against_that():
    class Cancelling(nn.Module):
        """A large number added and taken away again: what is left is rounding."""

        def forward(self, x):
            return (x + 3e4) - 3e4

    model, journal = Cancelling(), Journal()
    expected = [SPEC.probe()]
    assert dfq.rounding_noise(model, SPEC.probe()) > 1e-4
    dfq.check_unchanged("folding", [1.003 * expected[0]], model, SPEC.probe(), model, journal)
    assert journal.notes[0].startswith("folding moved the output")
    with pytest.raises(UserError, match="folding"):
        dfq.check_unchanged("folding", [1.5 * expected[0]], model, SPEC.probe(), model, journal)


def test_a_network_without_batchnorm_is_refused_where_statistics_are_needed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    assert quantize_data_free(model, SPEC, Recipe(equalize=True)).float is not None
    with pytest.raises(UserError, match="no BatchNorm, whose statistics --quantize and --correction would need"):
        quantize_data_free(model, SPEC, Recipe(quantize=True, correction=True))


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (Recipe(quantize=True), "Original"),
        (Recipe(quantize=True, relu=True), "+ReLU"),
        (Recipe(quantize=True, relu=True, equalize=True, correction=True), "+ReLU+LE+BC"),
        (Recipe(quantize=True, correction=True, clip_weight=15.0), "+BC +clip_15"),
        (Recipe(quantize=True, clear_dead=True), "+DC"),
        (Recipe(quantize=True, equalize=True, absorption=True, correction=True), "+LE+HBA+BC"),
    ],
)
def test_rows_have_the_published_names(recipe, name):
    assert str(recipe) == name
