"""What the output hears of errors, and the scales under which it hears least."""

from functools import partial

import pytest
import torch
from networks import SPEC, Branches, Head, Residual, chain, conv_bn, randomise, settle
from torch import fx, nn

import dfq
from dfq import Recipe, outputs_of
from utils.calibration.distillation import as_pixels, natural_noise
from utils.calibration.moments import SIGMAS, Gaussian
from utils.calibration.observers import Watched, channel_extremes, channel_mean, input_means
from utils.calibration.sensitivity import sensitivity
from utils.graph.capture import module_of, trace
from utils.graph.layers import taps
from utils.graph.regions import find_links, stored_nodes
from utils.passes.log import Journal

IMAGES = as_pixels(natural_noise(SPEC, 16, torch.Generator().manual_seed(0)), SPEC)
NETWORKS = [chain, Residual, Branches]


def folded(network, seed: int = 0) -> tuple[fx.GraphModule, dict]:
    """A network whose channels have unlike ranges, and its statistics."""
    torch.manual_seed(seed)
    model = settle(randomise(network(), seed))
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.weight.mul_(torch.logspace(-1, 1, len(norm.weight)))
    traced = trace(settle(model), SPEC)
    return traced, dfq.fold_batchnorm(traced, Journal())


def least_noise(model: fx.GraphModule, statistics: dict, recipe: Recipe) -> dfq.ScalesOf:
    """As quantize_data_free has it, with what the network does on the images."""
    heard = sensitivity(model, IMAGES, input_means(model, IMAGES))
    seen = channel_extremes(model, IMAGES)
    return partial(dfq.least_noise, statistics=statistics, heard=heard, seen=seen, recipe=recipe)


def changed_power(model: fx.GraphModule, change) -> float:
    """Power that a change of values, by node, adds to the output; per image."""
    with torch.no_grad():
        return float((Watched(model, change).run(IMAGES) - model(IMAGES)).square().sum()) / len(IMAGES)


@pytest.mark.parametrize("name", ["0.0", "1.0", "2.0", "3.linear"])
def test_errors_of_weights_reach_the_output_as_foretold(name):
    model, _ = folded(partial(chain, nn.ReLU))
    heard = sensitivity(model, IMAGES.repeat(8, 1, 1, 1), input_means(model, IMAGES)).weights[name]
    layer, generator = model.get_submodule(name), torch.Generator().manual_seed(1)
    size, measured, exact = 1e-4, [], layer.weight.clone()
    with torch.no_grad():
        plain = {node.target: value for node, value in seen(model)}[name]
        for _ in range(60):
            layer.weight.copy_(exact + size * torch.randn(exact.shape, generator=generator))
            shift = channel_mean(layer, {node.target: value for node, value in seen(model)}[name] - plain)
            layer.bias.sub_(shift)
            found = model(IMAGES)
            layer.weight.copy_(exact)
            layer.bias.add_(shift)
            measured.append(float((found - model(IMAGES)).square().sum()) / len(IMAGES))
    foretold = float(heard.sum()) * size**2
    # A depthwise convolution pads with zeros: its taps see a mean of their own, which a bias takes back in part alone.
    assert sum(measured) / 60 == pytest.approx(foretold, rel=0.35)


def seen(model: fx.GraphModule) -> list:
    values = []
    Watched(model, lambda node, value: values.append((node, value.clone())) and None).run(IMAGES)
    return values


def test_errors_of_activations_reach_the_output_as_foretold():
    model, _ = folded(Residual)
    heard = sensitivity(model, IMAGES.repeat(8, 1, 1, 1), input_means(model, IMAGES)).activations
    generator, size = torch.Generator().manual_seed(1), 1e-3
    for name in ("stem_2", "inner_2", "add"):

        def disturb(node, value, name=name):
            noise = size * torch.randn(value.shape, generator=generator)
            return value + noise * (value != 0) if node.name == name else None

        measured = sum(changed_power(model, disturb) for _ in range(60)) / 60
        assert measured == pytest.approx(float(heard[name].sum()) * size**2, rel=0.25)


@pytest.mark.parametrize("through_sums", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_scales_of_least_noise_keep_the_output(network, through_sums):
    model, statistics = folded(network)
    before, weights = outputs_of(model, IMAGES)[0], [layer.weight.clone() for layer in layers_of(model)]
    scales = least_noise(model, statistics, Recipe(quantize=True))
    dfq.equalize(model, statistics, scales, journal := Journal(), through_sums)
    torch.testing.assert_close(outputs_of(model, IMAGES)[0], before, rtol=1e-4, atol=1e-5)
    assert any((a != b.weight).any() for a, b in zip(weights, layers_of(model), strict=True))
    assert "foretold at the output -" in journal.notes[-1]


def layers_of(model: fx.GraphModule) -> list[nn.Module]:
    return [module for node in model.graph.nodes if hasattr(module := module_of(model, node), "weight")]


def wide() -> nn.Module:
    """So many channels that single roundings even out."""
    first, second = conv_bn(3, 48, padding=1), conv_bn(48, 48, padding=1, groups=48)
    return nn.Sequential(first, second, conv_bn(48, 64, 1), conv_bn(64, 64), Head(64))


@pytest.mark.parametrize("per_channel", [False, True])
def test_they_leave_less_noise_than_even_ranges(per_channel):
    flags = dict.fromkeys(("quantize", "equalize", "correction", "distill_correction", "distill_range"), True)
    noise = {}
    for seed in range(3):  # single roundings have luck
        model, statistics = folded(wide, seed)
        recipe = Recipe(**flags, per_channel=per_channel)
        for name, scales in {
            "even": partial(dfq.even_ranges, extremes=dfq.promised_extremes(statistics, SIGMAS)),
            "least": least_noise(model, statistics, recipe),
        }.items():
            scaled, known = trace(model, SPEC), dict(statistics)
            dfq.equalize(scaled, known, scales, Journal())
            made = dfq.quantize(scaled, SPEC, known, recipe, IMAGES, Journal())
            noise.setdefault(name, []).append(made.fidelity.output)
    assert sum(noise["least"]) / 3 > sum(noise["even"]) / 3 + 0.5


def test_a_channel_that_no_image_wakes_is_not_stretched():
    model, statistics = folded(partial(chain, nn.ReLU))
    (link, *others), _ = find_links(model)
    reach = dfq.activation_reaches(model, link, dfq.promised_extremes(statistics, SIGMAS))[0]
    asleep = int(reach.argsort()[-2])  # statistics say that it wakes, to nearly as much as any
    layer = model.get_submodule("0.0")
    taps(layer)[0, asleep] *= 1e-3
    layer.bias[asleep] = -10.0
    scales = least_noise(model, statistics, Recipe(quantize=True))(model, [link, *others], Journal())
    stretched = reach / scales[0]
    assert float(stretched[asleep]) <= 1.5 * float(stretched[torch.arange(len(reach)) != asleep].max())


def test_promises_that_images_contradict_do_not_count():
    model, statistics = folded(partial(chain, nn.ReLU))
    links, _ = find_links(model)
    known = statistics["0.0"]
    wrong = statistics | {"0.0": Gaussian(100 * known.mean.abs(), 1e4 * known.variance)}
    without = {name: each for name, each in statistics.items() if name != "0.0"}
    found, expected = (
        least_noise(model, each, Recipe(quantize=True))(model, links, Journal()) for each in (wrong, without)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_layer_that_equalization_harms_can_be_left_out():
    model, statistics = folded(chain)
    before = {name: model.get_submodule(name).weight.clone() for name in ("0.0", "1.0", "2.0")}
    even = partial(dfq.even_ranges, extremes=dfq.promised_extremes(statistics, SIGMAS))
    dfq.equalize(model, statistics, even, journal := Journal(), without=frozenset({"1.0"}))
    changed = [name for name, weight in before.items() if (model.get_submodule(name).weight != weight).any()]
    assert changed == ["1.0", "2.0"]  # "1.0" as a producer alone
    assert journal.counts()["equalized"]["left_out"] == 2  # "0.0", and the layer that the output reads


def test_tensors_that_an_engine_stores():
    model, _ = folded(Residual)
    stored = {link.producer: stored_nodes(model, link) for link in find_links(model, through_sums=True)[0]}
    assert stored["inner.0"] == {"inner_2": "inner.0"}
    assert stored["stem.0"] == {"stem_2": "stem.0", "outer_0": "outer.0", "relu_1": None}
