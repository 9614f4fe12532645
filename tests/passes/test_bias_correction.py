"""Bias correction: the mean shift of quantized weights is taken out."""

import pytest
import torch
from networks import NETWORKS, SPEC, Branches, Residual, chain, conv_bn, folded, made, randomise, settle
from torch import nn

from dfq import Recipe, quantize_data_free
from utils.calibration.moments import propagate
from utils.calibration.observers import layer_means
from utils.graph.capture import capture
from utils.graph.nodes import weighted_nodes
from utils.passes.bias_correction import analytical_bias_correction, empirical_bias_correction, round_and_correct
from utils.passes.log import PassLog
from utils.passes.quantize_weights import quantize_weights


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_correction_takes_the_mean_shift_out(name, clip):
    """Over many images, each output's mean is nearer to the float network's with corrected biases."""
    (model, graph), images = made(NETWORKS[name], settle), SPEC.probe(256, seed=7)
    expected = model(images).mean(0)
    errors = []
    for correction in (False, True):
        flags = {"quantize": True, "bits_weight": 4, "bits_activation": 16, "per_channel": True}
        recipe = Recipe(**flags, correction=correction, clip_weight=clip)
        errors.append(
            (quantize_data_free(model, SPEC, recipe, captured=graph).simulated(images).mean(0) - expected).abs().mean()
        )
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


def rounded(exact, bits: int = 3):
    """A copy with rounded weights."""
    model = capture(exact, SPEC)
    names = {node.target for node in weighted_nodes(model)}
    quantize_weights(model, names, bits, False, True, 32, PassLog())
    return model


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("network", [chain, Residual, Branches])
def test_correction_on_images_centres_every_layer(network, together):
    exact, _ = folded(made(network, randomise, settle)[1])
    images, model = SPEC.probe(32, seed=3), rounded(exact)
    expected, before = (layer_means(net, images) for net in (exact, model))
    if together:
        round_and_correct(model, exact, expected, {}, images, PassLog())
    else:
        empirical_bias_correction(model, expected, images, PassLog())
    after = layer_means(model, images)
    for name, mean in expected.items():
        assert (before[name] - mean).abs().max() > 1e-3
        torch.testing.assert_close(after[name], mean, atol=1e-5, rtol=1e-5)


def test_every_layer_is_rounded_before_it_is_corrected():
    exact, _ = folded(made(chain, randomise, settle)[1])
    images, model, log = SPEC.probe(8, seed=3), rounded(exact), PassLog()
    round_and_correct(model, exact, layer_means(exact, images), {}, images, log)
    done = [(entry.action, entry.where) for entry in log.entries]
    names = [node.target for node in weighted_nodes(model)]
    assert done == [(action, name) for name in names for action in ("rounded with GPTQ", "corrected biases")]


@pytest.mark.parametrize("network", [chain, Residual, Branches])
def test_behind_gptq_layers_are_corrected_by_what_batchnorm_tells(network):
    exact, statistics = folded(made(network, randomise, settle)[1])
    images, moments, model = SPEC.probe(8, seed=3), propagate(exact, SPEC, statistics), rounded(exact)
    round_and_correct(model, exact, {}, moments, images, PassLog())
    alone, nearest = capture(model, SPEC), rounded(exact)
    pairs = [[net.get_submodule(node.target).weight for net in (alone, nearest)] for node in weighted_nodes(exact)]
    assert any((own != other).any() for own, other in pairs), "GPTQ rounds as nearest steps do"
    for node in weighted_nodes(exact):
        layer = alone.get_submodule(node.target)
        layer.bias.data.copy_(exact.get_submodule(node.target).bias)
        layer.weight_qparams = model.get_submodule(node.target).weight_qparams
    analytical_bias_correction(alone, exact, moments, PassLog())
    for node in weighted_nodes(exact):
        expected = alone.get_submodule(node.target).bias
        torch.testing.assert_close(model.get_submodule(node.target).bias, expected, atol=1e-6, rtol=1e-5)


class Product(nn.Module):
    """Of whose product of matrices no BatchNorm tells."""

    def __init__(self):
        super().__init__()
        self.first, self.last = conv_bn(3, 8), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x @ x.transpose(2, 3))


def test_gptq_corrects_on_images_what_batchnorm_does_not_tell_of():
    model, images = settle(randomise(Product())), SPEC.probe(16, seed=3)
    recipe = Recipe(quantize=True, correction=True, bits_weight=3, bits_activation=16, distill_rounding="gptq")
    result = quantize_data_free(model, SPEC, recipe, images)
    means, known = (layer_means(network, images)["last"] for network in (result.simulated, result.float))
    torch.testing.assert_close(means, known, atol=1e-3, rtol=1e-3)
