"""The search: which candidates it tries, and which it takes."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from networks import SPEC, chain, made, randomise, relu_chain, settle, spread_gains

from dfq import quantize_auto
from utils.calibration.images import halves
from utils.core.errors import UserError
from utils.passes.log import PassLog
from utils.passes.result import Quantized
from utils.quantization.recipe import Recipe
from utils.search.candidates import AGAIN, IMAGES_GAIN, SAME, Stage, outer_bits, stages, start
from utils.search.float_layers import layer_noise
from utils.search.judge import Judgement
from utils.search.search import search

EVEN = {"bits_first_last": None}  # no other bits for the first and the last layer


class Rule:
    """Judges recipes by a rule, without running them."""

    def __init__(self, noise):
        self.noise, self.seen = noise, []

    def quantize(self, recipe: Recipe) -> Quantized:
        self.seen.append(recipe)
        result = Quantized(None, None, PassLog())
        result.log.notes.append(recipe)
        return result

    def judge(self, quantized: Quantized) -> Judgement:
        return Judgement(self.noise(quantized.log.notes[0]), 100.0, 0.0)


def found(noise, graph=None, real=False):
    rule = Rule(noise)
    graph = made(chain, settle)[1] if graph is None else graph
    return search(start({}), stages(graph, start({}), real), rule.quantize, rule.judge), rule


def test_among_equals_it_takes_the_simplest():
    result, rule = found(lambda recipe: 20.0 + SAME / 2 * recipe.per_channel)
    assert result.chosen.recipe == start({"relu": True})  # as good, and faster
    assert "simpler" in result.why
    assert len(set(rule.seen)) == len(rule.seen), "a candidate was tried twice"


def test_relu_in_the_place_of_relu6_must_cost_nothing():
    result, _ = found(lambda recipe: 20.0 - 2 * recipe.relu)
    assert result.chosen.recipe == start({})
    assert not any(one.recipe.relu for one in found(lambda recipe: 20.0, made(relu_chain, settle)[1])[0].candidates)


def test_stages_add_up():
    result, _ = found(
        lambda r: 20.0 + 3 * r.per_channel + 4 * r.distill_range + 5 * bool(r.distill_rounding) - 9 * r.relu
    )
    chosen = result.chosen.recipe
    assert chosen.per_channel and chosen.distill_range and chosen.distill_rounding and chosen.correction
    assert result.candidates[0] is result.chosen
    assert [one.noise for one in result.candidates] == sorted((one.noise for one in result.candidates), reverse=True)


def test_what_was_fitted_to_distilled_images_must_win_by_more():
    gain = (SAME + IMAGES_GAIN) / 2

    def noise(recipe):
        return 20.0 + gain * recipe.distill_range - 9 * recipe.relu

    assert not found(noise)[0].chosen.recipe.distill_range
    assert found(noise, real=True)[0].chosen.recipe.distill_range


def test_few_bits_are_compensated_first_and_learned_once_and_last():
    def noise(r):
        return 8.0 + 3 * bool(r.distill_rounding) + 0.7 * r.distill_range - 9 * r.relu

    rule = Rule(lambda r: noise(r) + 0.1 * (r.distill_rounding == "adaround"))
    graph = made(chain, settle)[1]
    first = start({"bits_weight": 4})
    result = search(first, stages(graph, first, False), rule.quantize, rule.judge)
    learned = [recipe for recipe in rule.seen if recipe.distill_rounding == "adaround"]
    assert learned == rule.seen[-1:] == [result.chosen.recipe]  # as near will do: its time is spent already
    assert not any(recipe.distill_correction for recipe in rule.seen)  # no photographs: see stages()
    ranges = next(i for i, recipe in enumerate(rule.seen) if recipe.distill_range)
    assert all(recipe.distill_rounding == "gptq" for recipe in rule.seen[ranges:-1])


def searched_by_agreement(noise, agreement, stages, predictions=math.inf):
    """A search by rules for both."""
    rule = Rule(noise)

    def judge(quantized):
        share = agreement(quantized.log.notes[0])
        return replace(rule.judge(quantized), agreement=share, predictions=predictions)

    return search(start({}), stages, rule.quantize, judge)


@pytest.mark.parametrize(
    ("lead", "agreement", "gain", "taken"),
    [
        (-0.4, 95.0, 0.1, True),  # as near, and surer by far
        (-0.4, 85.0, 0.1, False),  # 5 points decide nothing
        (-0.6, 95.0, 0.1, False),  # further from float
        (0.4, 60.0, 0.1, False),  # as near, and its predictions are others
        (0.4, 80.0, 0.1, True),  # nearer by the gain
        (0.6, 60.0, 0.1, True),  # so much nearer that predictions do not count
        (0.6, 95.0, 1.0, True),  # nearer as well as surer, if not by the gain
        (0.6, 85.0, 1.0, False),  # nearer, but neither by the gain nor surer
        (0.6, 60.0, 1.0, False),
        (1.1, 60.0, 1.0, True),
    ],
)
def test_agreement_decides_where_noise_does_not(lead, agreement, gain, taken):
    stage = Stage({"per_channel": True}, gain)
    result = searched_by_agreement(
        lambda r: 20.0 + lead * r.per_channel, lambda r: agreement if r.per_channel else 80.0, [stage]
    )
    assert result.chosen.recipe.per_channel == taken
    assert ("float's more often: 95 % for 80 %" in result.why) == (lead < 0 and taken)


@pytest.mark.parametrize(("predictions", "taken"), [(2, False), (16, False), (50, True), (1000, True)])
def test_of_few_predictions_more_must_agree(predictions, taken):
    """One in seven of two pictures is a tie that went the other way."""
    stage = Stage({"per_channel": True}, 0.1)
    result = searched_by_agreement(lambda r: 20.0, lambda r: 80.0 + 15 * r.per_channel, [stage], predictions)
    assert result.chosen.recipe.per_channel == taken


def test_what_is_nearer_by_the_gain_is_not_refused_for_being_surer():
    """Agreement, then ReLU, led away from the nearest; what comes after needs no more than to be nearer than these."""
    changes = [Stage({"per_channel": True}, 0.1), Stage({"relu": True}, -0.3), Stage({"distill_range": True}, 0.05)]

    def noise(r):
        return 20.0 - 0.4 * r.per_channel - 0.25 * r.relu + 0.1 * r.distill_range

    for more in (0, 12):
        share = partial(lambda r, more: 60.0 + 20 * r.per_channel + more * r.distill_range, more=more)
        assert searched_by_agreement(noise, share, changes).chosen.recipe.distill_range


def test_agreement_leads_no_further_from_float_than_decides_nothing():
    changes = ({"per_channel": True}, {"equalize": False}, {"distill_range": True}, {"distill_correction": True})

    def steps(r):
        return r.per_channel + (not r.equalize) + r.distill_range + r.distill_correction

    result = searched_by_agreement(
        lambda r: 20.0 - 0.4 * steps(r), lambda r: 40.0 + 12 * steps(r), [Stage(change, 1.0) for change in changes]
    )
    assert result.chosen.noise == pytest.approx(19.6), "0.4 dB four times"
    assert "0.4 dB behind" in result.why and "52 % for 40 %" in result.why


def test_what_far_more_noise_hid_is_tried_again():
    """Ranges that saturate hide what scales per channel do: without them it is seen."""

    def noise(r):
        return (20.0 + 6 * r.per_channel if r.distill_range else 4.0 + 0.1 * r.per_channel) - 9 * r.relu

    result, rule = found(noise)
    assert result.chosen.recipe == start({"per_channel": True, "distill_range": True})
    assert len(set(rule.seen)) == len(rule.seen)
    result, rule = found(lambda r: 20.0 + 2 * r.distill_range + 6 * r.per_channel * r.distill_range)
    assert not result.chosen.recipe.per_channel, "2 dB hide nothing"


def test_what_cannot_be_run_is_not_asked_for_its_predictions():
    def quantize(recipe):
        if recipe.per_channel:
            raise UserError("no")
        return Rule(None).quantize(recipe)

    judge = Rule(lambda recipe: float("-inf")).judge  # noise of any kind
    assert not search(start({}), [Stage({"per_channel": True}, 0.5)], quantize, judge).chosen.recipe.per_channel


@pytest.mark.parametrize(
    ("bits", "target", "asked"), [(8, "onnxruntime", False), (6, "onnxruntime", True), (7, "openvino", False)]
)
def test_weights_of_few_bits_are_tried_with_zero_points_where_the_engine_takes_them(bits, target, asked):
    rule, first = Rule(lambda r: 20.0 + r.asymmetric), start({"bits_weight": bits, "target": target})
    result = search(first, stages(made(chain, settle)[1], first, False), rule.quantize, rule.judge)
    assert any(recipe.asymmetric for recipe in rule.seen) == result.chosen.recipe.asymmetric == asked


def test_learned_rounding_that_was_not_kept_is_not_what_was_taken():
    rule = Rule(lambda r: 8.0 + 3 * bool(r.distill_rounding) * r.distill_correction + r.distill_correction)
    graph = made(relu_chain, settle)[1]
    first = start({"bits_weight": 4})
    result = search(first, stages(graph, first, True), rule.quantize, rule.judge)
    assert rule.seen[-1].distill_rounding == "adaround"  # as near as what it started from
    chosen = result.chosen.recipe
    assert chosen.distill_rounding == "gptq" and chosen.distill_correction  # tried again beside the other correction


@pytest.mark.parametrize(
    ("lead", "real", "taken"), [(-0.3, False, True), (0.0, False, False), (-0.7, False, False), (0.01, True, False)]
)
def test_learned_rounding_that_was_kept_need_only_be_as_near_where_leaves_judged_it_too(lead, real, taken):
    rule = Rule(lambda r: 8.0 + 3 * bool(r.distill_rounding) + lead * (r.distill_rounding == "adaround"))
    first = start({"bits_weight": 4})
    result = search(first, stages(made(relu_chain, settle)[1], first, real), rule.quantize, rule.judge)
    assert rule.seen[-1].distill_rounding == "adaround"
    assert (result.chosen.recipe.distill_rounding == "adaround") == taken


def test_what_was_not_learned_from_a_compensation_that_was_refused_is_refused_too():
    rule = Rule(lambda r: 8.0 - 0.2 * bool(r.distill_rounding))
    first = start({"bits_weight": 4})
    result = search(first, stages(made(relu_chain, settle)[1], first, False), rule.quantize, rule.judge)
    assert rule.seen[-1].distill_rounding == "adaround" and result.chosen.recipe.distill_rounding is None


def test_a_candidate_that_cannot_run_is_no_end():
    rule = Rule(lambda recipe: 20.0)

    def quantize(recipe):
        if recipe.per_channel:
            raise UserError("no scales per channel here")
        return rule.quantize(recipe)

    rule.noise = lambda recipe: 20.0 + 9 * recipe.distill_range
    told = []
    changes = [Stage({"per_channel": True}, 0.5), Stage({"distill_range": True}, 0.5), AGAIN]
    result = search(start({}), changes, quantize, rule.judge, told.append)
    assert result.candidates[-1].reason == "no scales per channel here" and not result.chosen.recipe.per_channel
    assert sum("not run" in line for line in told) == 1, "less noise does not make it run"

    def refuse(recipe):
        raise UserError("the network cannot be run")

    with pytest.raises(UserError, match="cannot be run"):
        search(start({}), [], refuse, rule.judge)


@pytest.fixture(scope="module")
def uneven():
    """A network whose channels have unlike ranges, that equalization helps."""
    return made(chain, randomise, settle, spread_gains, settle)


@pytest.fixture(scope="module")
def searched(uneven):
    """What a search finds on it, by these images."""
    images = SPEC.probe(16, seed=4)
    torch.manual_seed(0)
    return quantize_auto(uneven[0], SPEC, images, bits_weight=6, **EVEN), images


def test_on_a_network_it_takes_what_is_nearest(uneven, searched):
    model, result = uneven[0], searched[0]
    assert result.chosen.recipe.bits_weight == 6 and result.chosen.recipe.quantize
    assert result.chosen.noise >= max(one.noise for one in result.candidates) - IMAGES_GAIN
    images = SPEC.probe(32, seed=9)
    with torch.no_grad():
        expected, ours = model(images), result.quantized.simulated(images)
    plain = {one.recipe: one.noise for one in result.candidates}[start({"bits_weight": 6, **EVEN})]
    measured = 10 * float((expected.square().sum() / (expected - ours).square().sum()).log10())
    assert measured > plain - 3, "it is not as near on other images as it was judged"


def test_layers_stay_in_float_until_the_noise_is_low_enough(uneven, searched):
    model, (plain, images) = uneven[0], searched
    wanted = plain.chosen.noise + 3
    result = quantize_auto(model, SPEC, images, max_noise=wanted, bits_weight=6, **EVEN)
    assert result.chosen.noise >= wanted
    shares = layer_noise(plain.quantized, halves(images)[0])
    assert result.chosen.recipe.float_layers == tuple(shares)[: len(result.chosen.recipe.float_layers)]
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_a_network_far_from_float_is_refused(uneven):
    model, _ = uneven
    with pytest.raises(UserError, match=r"no candidate comes near to float: .* --max_noise"):
        quantize_auto(model, SPEC, SPEC.probe(8, seed=4), bits_weight=2, bits_activation=2)
    forced = quantize_auto(model, SPEC, SPEC.probe(8, seed=4), force=True, bits_weight=2, bits_activation=2)
    assert forced.chosen.noise < 4 and forced.quantized.simulated is not None


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("equalize", False, "a search chooses the passes itself; leave out equalize"),
        ("float_layers", ("a",), "leave out float_layers"),
        ("bits", 4, "no setting 'bits'; choose from bits_weight"),
        ("bits_weight", "4", "--bits_weight: '4' is not a number of bits"),
        ("bits_weight", 1, "--bits_weight: '1' is not a number of bits"),
        ("bits_bias", 7, "--bits_bias: invalid choice: 7"),
        ("target", "x", "--target: invalid choice: 'x'"),
    ],
)
def test_what_a_search_chooses_itself_or_does_not_know_is_refused(name, value, says):
    with pytest.raises(UserError, match=says):
        quantize_auto(None, SPEC, SPEC.probe(8), **{name: value})  # before the network is looked at


@pytest.mark.parametrize(
    ("bits", "target", "outer"),
    [(8, "onnxruntime", None), (4, "onnxruntime", 8), (7, "onnxruntime", 8), (7, "openvino", None), (4, "tensorrt", 8)],
)
def test_outer_layers_get_8_bits_unless_these_saturate_on_the_target(bits, target, outer):
    assert outer_bits(bits, target) == outer


def test_auto_leaves_no_layer_8_bits_where_7_were_asked_for_since_8_saturate():
    model, _ = made(chain, settle)
    images = SPEC.probe(16, seed=2)
    found = quantize_auto(model, SPEC, images, bits_weight=7, target="openvino")
    layers = [layer for layer in found.quantized.simulated.modules() if getattr(layer, "weight_qparams", None)]
    assert len(layers) > 1 and {layer.weight_qparams.bits for layer in layers} == {7}
