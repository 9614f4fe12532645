"""The pipeline: whole recipes on small networks."""

import copy

import pytest
import torch
from networks import NETWORKS, SPEC, chain, made, modules_in, randomise, settle, sqnr
from torch import nn

from dfq import Recipe, quantize_data_free
from utils.core.errors import UserError
from utils.graph.layers import Clip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_whole_recipe_comes_close_to_float(name, per_channel):
    (model, graph), images = made(NETWORKS[name], settle), SPEC.probe(64, seed=7)
    recipe = Recipe(equalize=True, absorption=True, quantize=True, correction=True, per_channel=per_channel)
    result = quantize_data_free(model, SPEC, recipe, captured=graph)
    assert sqnr(model(images), result.simulated(images)) > 25


def test_more_bits_come_closer():
    (model, graph), images = made(chain, settle), SPEC.probe(64, seed=7)
    noise = [
        sqnr(
            model(images),
            quantize_data_free(
                model,
                SPEC,
                Recipe(equalize=True, quantize=True, correction=True, bits_weight=b, bits_activation=b),
                captured=graph,
            ).simulated(images),
        )
        for b in (4, 6, 8, 10, 12)
    ]
    assert noise == sorted(noise) and noise[-1] > 45


def test_a_recipe_with_relu_leaves_no_relu6():
    model, graph = made(chain, randomise)
    result = quantize_data_free(model, SPEC, Recipe(relu=True, equalize=True), captured=graph)
    clips = modules_in(result.float, Clip)
    assert len(clips) == 3 and not any(clip.capped for clip in clips)
    assert result.simulated is None


def test_the_loaded_network_is_never_touched():
    model = settle(chain())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantize_data_free(
        model, SPEC, Recipe(relu=True, equalize=True, absorption=True, clip_weight=0.1, quantize=True, correction=True)
    )
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


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


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.double, nn.Module.train])
def test_a_network_of_another_type_or_in_training_mode_is_quantized_as_its_own_copy(change):
    torch.manual_seed(0)
    model = change(settle(chain()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = quantize_data_free(copy.deepcopy(model).float().eval(), SPEC, Recipe(quantize=True))
    found = quantize_data_free(model, SPEC, Recipe(quantize=True))
    torch.testing.assert_close(found.simulated(SPEC.probe(2)), expected.simulated(SPEC.probe(2)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
