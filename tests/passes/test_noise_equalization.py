"""Noise-optimal equalization: less noise than CLE scales leave, and no channel stretched for nothing."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from networks import (
    SPEC,
    Branches,
    Head,
    Residual,
    chain,
    conv_bn,
    made,
    randomise,
    relu_chain,
    settle,
    spread_gains,
    unlike,
)
from torch import fx, nn

from dfq import Recipe, quantize, quantize_data_free
from utils.calibration.distillation import as_pixels
from utils.calibration.fidelity import Fidelity
from utils.calibration.images import Images
from utils.calibration.moments import Gaussian, Statistics
from utils.calibration.ranges import batchnorm_ranges
from utils.calibration.rendered import natural_noise
from utils.graph.capture import capture
from utils.graph.layers import grouped_weight
from utils.graph.nodes import module_of
from utils.graph.regions import find_regions, stored_nodes
from utils.passes import noise_equalization
from utils.passes.bit_widths import bits_of_activations, bits_of_weights
from utils.passes.equalization import ScalesOf, activation_reach, cle_scales, equalize
from utils.passes.exactness import probed_outputs
from utils.passes.log import PassLog
from utils.passes.noise_equalization import (
    QuantScheme,
    _activation_reaches,
    _minimise,
    _Noise,
    choose_nearest,
    noise_optimal_scales,
    observe_on_images,
)

IMAGES = as_pixels(natural_noise(SPEC, 16, torch.Generator().manual_seed(0)), SPEC)
NETWORKS = [chain, Residual, Branches]
INT8 = QuantScheme(8, 8)


def noise_optimal(model: fx.GraphModule, statistics: Statistics, scheme: QuantScheme = INT8) -> ScalesOf:
    """As quantize_data_free has it, with what the network does on the images."""
    observed = observe_on_images(model, IMAGES)
    return partial(noise_optimal_scales, statistics=statistics, observed=observed, scheme=scheme)


@pytest.mark.parametrize("through_sums", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_noise_optimal_scales_keep_the_output(network, through_sums):
    model, statistics = unlike(network)
    before, weights = probed_outputs(model, IMAGES)[0], [layer.weight.clone() for layer in layers_of(model)]
    equalize(model, statistics, noise_optimal(model, statistics), log := PassLog(), through_sums)
    torch.testing.assert_close(probed_outputs(model, IMAGES)[0], before, rtol=1e-4, atol=1e-5)
    assert any((a != b.weight).any() for a, b in zip(weights, layers_of(model), strict=True))
    assert "noise at the output -" in log.notes[-1]


def test_what_was_minimised_is_not_minimised_again(monkeypatch):
    """The same network, images and bits give the scales that were found; other bits are minimised anew."""
    minimised = []
    monkeypatch.setattr(noise_equalization, "_MINIMA", {})
    monkeypatch.setattr(noise_equalization, "_minimise", lambda noise: minimised.append(noise) or _minimise(noise))
    model, statistics = unlike(relu_chain)
    regions, _ = find_regions(model)
    logs = [PassLog() for _ in range(3)]
    schemes = (INT8, INT8, QuantScheme(8, 4))
    first, again, other = (
        noise_optimal(model, statistics, scheme)(model, regions, log) for scheme, log in zip(schemes, logs, strict=True)
    )
    assert len(minimised) == 2 and logs[0].notes == logs[1].notes != logs[2].notes
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert [len(scale) for scale in first] == [region.channels for region in regions]
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def layers_of(model: fx.GraphModule) -> list[nn.Module]:
    return [module for node in model.graph.nodes if hasattr(module := module_of(model, node), "weight")]


def wide() -> nn.Module:
    """So many channels that single roundings even out."""
    first, second = conv_bn(3, 48, padding=1), conv_bn(48, 48, padding=1, groups=48)
    return nn.Sequential(first, second, conv_bn(48, 64, 1), conv_bn(64, 64), Head(64))


def fidelity_after(model: fx.GraphModule, statistics: Statistics, scales_of: ScalesOf, recipe: Recipe) -> float:
    """In dB, of the network quantized after an equalization."""
    scaled = capture(model, SPEC)
    known = equalize(scaled, statistics, scales_of, PassLog())
    return quantize(scaled, SPEC, known, recipe, Images(IMAGES, IMAGES), PassLog()).fidelity.output


FLAGS = dict.fromkeys(("quantize", "equalize", "correction", "distill_correction", "distill_range"), True)


@pytest.mark.parametrize("per_channel", [False, True])
def test_they_leave_less_noise_than_cle_scales(per_channel):
    gains = []
    for seed in range(3):  # single roundings have luck
        model, statistics = unlike(wide, seed)
        recipe = Recipe(**FLAGS, per_channel=per_channel)
        ours = noise_optimal(model, statistics, QuantScheme(8, 8, per_channel))
        cle = partial(cle_scales, ranges=batchnorm_ranges(statistics))
        gains.append(fidelity_after(model, statistics, ours, recipe) - fidelity_after(model, statistics, cle, recipe))
    assert sum(gains) / 3 > 0.5


def test_they_leave_less_noise_where_they_know_which_layers_have_more_bits():
    """Of weights of 4 bits those of the first and the last layer have 8."""
    gains = []
    for seed in range(3):
        model, statistics = unlike(wide, seed)
        bits = {"bits_weight": 4, "bits_first_last": 8}
        recipe = Recipe(**FLAGS, per_channel=True, **bits)
        others = bits_of_weights(model, recipe), bits_of_activations(model, recipe)
        alike = noise_optimal(model, statistics, QuantScheme(4, 8, True))
        known = noise_optimal(model, statistics, QuantScheme(4, 8, True, weights=others[0], activations=others[1]))
        near = [fidelity_after(model, statistics, scales, recipe) for scales in (alike, known)]
        gains.append(near[1] - near[0])
    assert sum(gains) / 3 > 0.5


def one_sided() -> nn.Module:
    """Layers whose weights are far larger above 0 than below it, so that an asymmetric range is half a symmetric one."""
    torch.manual_seed(0)
    model = nn.Sequential(conv_bn(3, 24, 1), conv_bn(24, 24, 1), conv_bn(24, 24, 1), Head(24))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.abs() * torch.logspace(-1, 0, layer.weight.shape[1])[:, None, None]
            layer.weight.data[::3] *= -0.1
    return model


def test_the_step_of_asymmetric_weights_is_that_of_their_range():
    """Scales that are optimal for asymmetric steps leave less noise of these than those for symmetric ones."""
    model, statistics = unlike(one_sided)
    regions, _ = find_regions(model)
    scales = {
        symmetric: noise_optimal(model, statistics, QuantScheme(8, 16, symmetric=symmetric))(model, regions, PassLog())
        for symmetric in (True, False)
    }
    assert any(not torch.allclose(a, b, rtol=0.01) for a, b in zip(scales[True], scales[False], strict=True))
    recipe = Recipe(**FLAGS, asymmetric=True, bits_weight=8, bits_activation=16)
    symmetric, asymmetric = (
        fidelity_after(model, statistics, lambda *_, found=found: found, recipe) for found in scales.values()
    )
    assert asymmetric > symmetric


def test_they_know_which_layers_of_asymmetric_weights_have_no_zero_points():
    """A scheme whose layers all have 8 bits, with a scale for every channel, is a symmetric one."""
    model, statistics = unlike(one_sided)
    regions, _ = find_regions(model)
    plain, asked, few = (
        noise_optimal(model, statistics, scheme)(model, regions, PassLog())
        for scheme in (
            QuantScheme(8, 16, True),
            QuantScheme(8, 16, True, symmetric=False),
            QuantScheme(7, 16, True, symmetric=False),
        )
    )
    torch.testing.assert_close(asked, plain)
    assert any(not torch.allclose(a, b, rtol=0.01) for a, b in zip(few, plain, strict=True))


def test_a_channel_that_no_image_activates_is_not_stretched():
    model, statistics = unlike(relu_chain)
    (region, *others), _ = find_regions(model)
    reach = activation_reach(model, region, batchnorm_ranges(statistics))[0]
    asleep = int(reach.argsort()[-2])  # its range from BatchNorm is nearly as wide as any
    layer = model.get_submodule("0.0")
    grouped_weight(layer)[0, asleep] *= 1e-3
    layer.bias[asleep] = -10.0
    scales = noise_optimal(model, statistics)(model, [region, *others], PassLog())
    stretched = reach / scales[0]
    assert float(stretched[asleep]) <= 1.5 * float(stretched[torch.arange(len(reach)) != asleep].max())


def test_ranges_from_batchnorm_that_images_contradict_do_not_count():
    model, statistics = unlike(relu_chain)
    regions, _ = find_regions(model)
    known = statistics["0.0"]
    wrong = statistics | {"0.0": Gaussian(100 * known.mean.abs(), 1e4 * known.variance)}
    without = {name: each for name, each in statistics.items() if name != "0.0"}
    found, expected = (noise_optimal(model, each)(model, regions, PassLog()) for each in (wrong, without))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_without_a_region_there_is_no_scale():
    model, statistics = unlike(lambda: nn.Sequential(conv_bn(3, 4)))
    assert noise_optimal(model, statistics)(model, [], PassLog()) == []


def test_tensors_that_an_engine_stores():
    model, _ = unlike(Residual)
    stored = {region.source: stored_nodes(model, region) for region in find_regions(model, through_sums=True)[0]}
    assert stored["inner.0"] == {"inner_2": "inner.0"}
    assert stored["stem.0"] == {"stem_2": "stem.0", "outer_0": "outer.0", "relu_default_3": None}


def test_the_nearest_is_chosen_and_layers_that_it_harms_are_left_out():
    layers = {"none": {"a": 30.0, "b": 30.0}, "one": {"a": 20.0, "b": 40.0}, "two": {"a": 35.0, "b": 31.0}}
    outputs = {"none": 20.0, "one": 28.0, "two": 25.0}

    def way(name: str, without: frozenset[str] = frozenset()) -> tuple[str, Fidelity]:
        gain = {frozenset(): 0.0, frozenset({"a"}): 1.0}.get(without, -5.0)
        return f"{name}{sorted(without)}", Fidelity(outputs[name] + gain, layers[name])

    ways = {name: partial(way, name) for name in outputs}
    (chosen, _), why = choose_nearest(ways, lambda result: result[1], {"a", "b"})
    assert chosen == "one['a']"
    assert why.startswith("equalization: one, without a, the nearest on held-out images (none 20.00 dB, one 28.00 dB")
    assert "one, without a, b 23.00 dB" in why


@pytest.mark.parametrize("network", [chain, Branches])
def test_distilled_equalization_is_never_further_than_the_plain_one(network):
    (model, graph), images = made(network, randomise, spread_gains), SPEC.probe(8, seed=5)
    plain = quantize_data_free(model, SPEC, Recipe(quantize=True, equalize=True), images, graph)
    chosen = quantize_data_free(model, SPEC, Recipe(quantize=True, equalize=True, distill_equalize=True), images, graph)
    assert chosen.fidelity.output >= plain.fidelity.output
    assert any("the nearest" in note for note in chosen.log.notes)


def test_on_signed_grids_what_is_never_negative_has_twice_the_step():
    """With weights all but exact, the noise is that of the activations: (255 / 127)^2 times, if all are rectified."""
    model, statistics = unlike(relu_chain)
    regions, observed = find_regions(model)[0], observe_on_images(model, IMAGES)
    rectified = [region for region in regions if region.rectified]
    reaches = _activation_reaches(model, rectified, statistics, observed)
    schemes = (QuantScheme(16, 8, signed=signed) for signed in (True, False))
    zeros = torch.zeros(sum(region.channels for region in rectified))
    signed, unsigned = (float(_Noise(model, rectified, reaches, observed, scheme)(zeros)) for scheme in schemes)
    assert signed / unsigned == pytest.approx((255 / 127) ** 2, rel=0.01)


def test_for_tensorrt_scales_are_chosen_by_its_grids():
    model, _ = made(chain, randomise, settle)
    recipe = Recipe(quantize=True, equalize=True, distill_equalize=True, target="tensorrt")
    result = quantize_data_free(model, SPEC, recipe, IMAGES)
    plain = quantize_data_free(model, SPEC, replace(recipe, equalize=False, distill_equalize=False), IMAGES)
    assert result.fidelity.output >= plain.fidelity.output - 0.01
