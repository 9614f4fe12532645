"""Judgements: noise of known size, and agreement that ties hardly count in."""

import pytest
import torch
from networks import SPEC, chain, made, settle

from dfq import Recipe, quantize_data_free
from utils.core.predictions import channel_predictions, margins
from utils.search.judge import Judge, decibels, noise_share, weighted_agreement


def test_noise_of_a_hundredth_of_the_power_is_20_db():
    expected = torch.randn(100, 10, generator=torch.Generator().manual_seed(0))
    assert decibels(noise_share(expected, expected * 1.1)) == pytest.approx(20, abs=1e-3)
    assert noise_share(expected, expected * float("nan")) == 1.0


def test_a_prediction_counts_by_its_margin():
    logits = torch.tensor([[3.0, 0.0, 1.0], [1.0, 1.1, 0.0]])
    assert margins(logits).tolist() == pytest.approx([2.0, 0.1])
    same = torch.tensor([True, False])
    assert weighted_agreement(same, margins(logits)) == pytest.approx(2 / 2.1)
    assert weighted_agreement(same, torch.ones(5)) == 0.5  # of another shape: each counts the same


def test_priors_have_their_classes_last():
    assert margins(torch.tensor([[[5.0, 1.0], [0.0, 4.0]]])).tolist() == [[4.0, 4.0]]
    assert margins(torch.ones(2, 1, 3, 3)).isinf().all()


def test_more_bits_come_nearer():
    model, graph = made(chain, settle)
    judge = Judge(graph, SPEC.probe(8, seed=3), channel_predictions)
    found = [judge(quantize_data_free(model, SPEC, Recipe(quantize=True, bits_weight=b))) for b in (3, 5, 8)]
    assert found[0].noise < found[1].noise < found[2].noise
    assert found[2].agreement == 100.0


def test_a_judge_holds_candidates_to_the_network_as_it_came():
    """A row whose own float network is another one is not near because it is near to that."""
    model, graph = made(chain, settle)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.bias.data += 5  # most values beyond ReLU6's cap
    from utils.graph.capture import capture

    judge = Judge(capture(model, SPEC), SPEC.probe(8, seed=3))
    recipes = Recipe(quantize=True, equalize=True), Recipe(quantize=True, equalize=True, relu=True)
    kept, replaced = (judge(quantize_data_free(model, SPEC, recipe)).noise for recipe in recipes)
    assert replaced < 5 < 20 < kept
