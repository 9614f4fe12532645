"""How wide ranges are: statistics and images together, measured at the network's output."""

import copy

import pytest
import torch
from networks import SPEC, Head, chain, conv_bn, folded, randomise, settle
from torch import nn

from dfq import Recipe, quantize_data_free
from utils.calibration import range_rules as rules
from utils.calibration.moments import Unknown
from utils.calibration.range_rules import FACTORS, MARGIN, candidates, choose_range, covering, fit_ranges, settled
from utils.graph.capture import capture
from utils.graph.nodes import module_of, weighted_nodes
from utils.passes import activation_ranges
from utils.quantization.quantizer import Quantizer


def quantizers(result):
    return {
        node.name.removesuffix("_quantizer"): module
        for node in result.simulated.graph.nodes
        if isinstance(module := module_of(result.simulated, node), Quantizer)
    }


# ---- arithmetic


def test_two_ranges_are_held_by_one_and_the_unknown_gives_way():
    assert rules.combine((-1.0, 2.0), (-0.5, 3.0)) == (-1.0, 3.0)
    assert rules.combine(Unknown("here"), (-0.5, 3.0)) == rules.combine((-0.5, 3.0), Unknown("here")) == (-0.5, 3.0)
    assert isinstance(rules.combine(Unknown("here"), Unknown("there")), Unknown)


def test_a_tensor_may_get_what_is_known_of_it_by_every_factor_and_what_batchnorm_tells():
    found = candidates(((-2.0, 4.0), (-1.0, 3.5)), None)
    assert found == sorted(found, key=lambda one: one[0] - one[1])  # the widest first
    assert (-1.0, 3.5) in found and all((-2.0 * factor, 4.0 * factor) in found for factor in FACTORS)
    assert len(found) == len(FACTORS) + 1
    # behind a clip the wider ones are one and the same
    assert candidates(((0.0, 6.0),), (0.0, 6.0))[:2] == [(0.0, 6.0), (0.0, 6.0 * FACTORS[2])]


def test_the_range_is_the_widest_that_adds_no_more_than_the_slack_over_the_least():
    widths = [(0.0, high) for high in (8.0, 6.0, 4.0, 3.0)]
    assert choose_range(dict(zip(widths, (9, 5, 2, 3), strict=True)), slack=0.5) == (0.0, 4.0)
    assert choose_range(dict(zip(widths, (9, 2.4, 2, 3), strict=True)), slack=0.5) == (0.0, 6.0)
    assert choose_range(dict(zip(widths, (2.6, 2.4, 2.1, 2.2), strict=True)), slack=0.5) == (0.0, 8.0)
    assert settled([0.4], slack=0.5) and not settled([0.6], slack=0.5)
    assert settled([9, 2, 3, 4], slack=0.5)
    assert not settled([9, 2, 3], slack=0.5) and not settled([9, 2, 3, 2.5], slack=0.5)


def test_the_images_that_reach_furthest_are_chosen():
    reach = torch.tensor([[1.0, 0, 0, 5], [0, 3, 0, 0], [2, 2, 2.1, 2]])  # [ends, images]
    assert sorted(covering(reach, 2)) == [1, 3]  # each holds an end that the other does not
    assert sorted(covering(reach, 9)) == [0, 1, 2, 3]


def test_ranges_start_from_whoever_tells():
    graph = torch.fx.Graph()
    first = graph.placeholder("x")
    nodes = [
        first,
        *(graph.call_function(torch.relu, (first,), name=name) for name in ("both", "guess", "strange", "new")),
    ]
    analytic = {"x": (0.0, 9.0), "both": (-1.0, 2.0), "guess": (0.0, 7.0), "new": (0.0, 1.0)}
    observed = {"x": (0.0, 9.0), "both": (-0.5, 3.0), "guess": (0.0, 5.0), "strange": (0.0, 4.0)}

    def of(ranges):
        return lambda node: ranges.get(node.name, Unknown("here"))

    found = rules.starting_ranges(nodes, of(analytic), of(observed), {"guess"}, False)
    assert found == {"both": ((-1.0, 3.0), (-1.0, 2.0)), "guess": ((0.0, 5.0),), "strange": ((0.0, 4.0),)}
    found = rules.starting_ranges(nodes, of(analytic), of(observed), {"guess"}, uncapped=True)
    assert found == {"both": ((-1.0, 2.0),), "guess": ((0.0, 5.0),), "strange": ((0.0, 4.0),)}


# ---- networks


class Tower(nn.Module):
    """Two layers with BatchNorm, three without, and an average of maps of logits."""

    def __init__(self):
        super().__init__()
        self.known = nn.Sequential(conv_bn(3, 8), conv_bn(8, 8))
        self.lateral, self.smooth, self.out = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return self.out(torch.relu(self.smooth(self.lateral(self.known(x))))).mean((2, 3))


def test_layers_in_a_row_without_batchnorm_are_counted():
    network, statistics = folded(settle(Tower()))
    depth = rules.guessed_tensors(network, statistics)
    layers = {node.target: depth.get(node.name, 0) for node in weighted_nodes(network)}
    assert layers == {"known.0.0": 0, "known.1.0": 0, "lateral": 1, "smooth": 2, "out": 3}
    assert "5 tensors" not in rules.describe_guesses({"a": 1, "b": 3})
    assert "(a, b, up to 3 such layers in a row)" in rules.describe_guesses({"a": 1, "b": 3})


def test_guesses_come_from_images_without_being_asked_and_are_named():
    model = settle(Tower())
    for layer in (model.lateral, model.smooth, model.out):  # channels that agree reach further than independent ones
        layer.weight.copy_(layer.weight.abs() * 3)
    result = quantize_data_free(model, SPEC, Recipe(quantize=True))
    assert any("no range from BatchNorm" in note for note in result.log.warnings)
    images = SPEC.probe(16, seed=4)
    extremes = rules.image_extremes(result.float, images)
    found = quantizers(result)
    guessed = [name for name in rules.guessed_tensors(result.float, {"known.0.0", "known.1.0"}) if name in found]
    assert len(guessed) >= 3
    for name in guessed:
        high = found[name].scale * found[name].step_max
        assert high > 0.7 * float(extremes[name][1].max())


def test_images_that_no_pass_asks_for_judge_a_network_and_change_nothing_of_it():
    """--fidelity beside a row without images, and --auto's candidates: the ranges of guesses are from the same few images."""
    model, images = settle(Tower()), SPEC.probe(16, seed=4)
    for flags, same in (({}, True), ({"distill_range": True}, False)):
        recipe = Recipe(quantize=True, equalize=True, correction=True, **flags)
        judged = quantize_data_free(model, SPEC, recipe, images)
        alone = quantize_data_free(model, SPEC, Recipe(quantize=True, equalize=True, correction=True))
        scales = [{name: one.scale for name, one in quantizers(result).items()} for result in (alone, judged)]
        assert (scales[0] == scales[1]) == same
        assert judged.fidelity is not None and alone.fidelity is None
        weights = [torch.cat([one.flatten() for one in result.simulated.parameters()]) for result in (alone, judged)]
        assert torch.equal(*weights) == same
    yours = quantize_data_free(model, SPEC, Recipe(quantize=True, equalize=True, correction=True), images, real=True)
    assert {name: one.scale for name, one in quantizers(yours).items()} != scales[0]  # a user's own are for ranges


def test_replacing_a_value_by_itself_is_silent_and_noise_adds_up():
    network, _ = folded(settle(randomise(chain())))
    rerun = rules.Rerun(network, SPEC.probe(4))
    name = weighted_nodes(network)[1].name
    value = rerun.values[name]
    assert rerun.noise(name, value.clone()) == 0
    noisy = value + 0.01 * torch.randn(value.shape)
    expected = copy.deepcopy(network)
    layer = expected.get_submodule(weighted_nodes(network)[1].target)
    with torch.no_grad():
        handle = layer.register_forward_hook(lambda *_: noisy)
        after = expected(SPEC.probe(4))
        handle.remove()
    assert rerun.noise(name, noisy) == pytest.approx(
        float((after - rerun.outputs[0]).square().sum() / rerun.outputs[0].square().sum()), rel=1e-4
    )


def test_a_layer_named_output_is_not_taken_for_the_networks():
    network = nn.Sequential()
    network.add_module("output", nn.Conv2d(3, 4, 1))
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    rerun = rules.Rerun(capture(network.eval(), SPEC), SPEC.probe(4))
    value = rerun.values["output"] * 2
    assert rerun.noise("output", value) == pytest.approx(1.0)


class Outlier(nn.Module):
    """A channel reaches 50 times further than the others, and what reads it stops at 6."""

    def __init__(self):
        super().__init__()
        self.stem, self.reader, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=8), Head(8)
        self.stem.weight[0] *= 50
        nn.init.ones_(self.reader.weight)
        nn.init.zeros_(self.reader.bias)

    def forward(self, x):
        return self.head(nn.functional.relu6(self.reader(self.stem(x))))


def test_a_range_is_narrowed_where_the_output_does_not_depend_on_how_far_it_goes():
    network = capture(Outlier().eval(), SPEC)
    images, name = SPEC.probe(4), weighted_nodes(network)[0].name
    low, high = (float(end) for end in rules.Rerun(network, images).values[name].aminmax())
    loud = fit_ranges(network, {name: ((low, high),)}, images, 8, allowed=1e-9)[name]
    assert loud.factor < 1 and (loud.low, loud.high) == pytest.approx((low * loud.factor, high * loud.factor))
    assert fit_ranges(network, {name: ((low, high),)}, images, 8, allowed=10.0)[name].factor == pytest.approx(MARGIN)
    assert fit_ranges(network, {name: ((low, high),)}, images, 8, 10.0, {name})[name].factor == rules.OPEN
    line = rules.describe_fitted({name: loud})
    assert (
        "0 of 1 wider" in line and f"1 narrowed, since rounding at full width costs more than clipping ({name}" in line
    )


def test_a_clip_is_never_given_more_room_than_it_uses():
    result = quantize_data_free(
        settle(randomise(chain())), SPEC, Recipe(quantize=True, distill_range=True), SPEC.probe(8, seed=1)
    )
    tops = [module.scale * module.step_max for name, module in quantizers(result).items() if name != "x"]
    assert len(tops) >= 4 and sum(top < 6.01 for top in tops) >= 3


def test_rounded_weights_cost_more_with_fewer_bits():
    network, _ = folded(settle(randomise(chain())))
    images = SPEC.probe(4)
    before = network(images)
    costs = [rules.weight_noise(network, images, bits, False, True) for bits in (8, 4, 2)]
    assert 0 < costs[0] < costs[1] / 20 < costs[2]
    torch.testing.assert_close(network(images), before, rtol=0, atol=0)  # rounded in a copy


def test_ranges_are_measured_once_for_recipes_that_differ_in_their_corrections(monkeypatch):
    measured = []
    monkeypatch.setattr(activation_ranges, "_FITTED", {})
    monkeypatch.setattr(activation_ranges, "fit_ranges", lambda *args: measured.append(args) or fit_ranges(*args))
    model, images = settle(randomise(chain())), SPEC.probe(8, seed=1)

    def tops(**flags) -> list[float]:
        result = quantize_data_free(model, SPEC, Recipe(quantize=True, distill_range=True, **flags), images)
        return [float(module.scale * module.step_max) for module in quantizers(result).values()]

    plain = tops()
    assert tops(correction=True) == plain and len(measured) == 1
    assert tops(equalize=True) != plain and len(measured) == 2
    tops(bits_activation=6)
    tops(relu=True)
    assert len(measured) == 4


class Tail(nn.Module):
    """Logits that something else follows before they are handed out."""

    def __init__(self, tail):
        super().__init__()
        self.body, self.head, self.tail = conv_bn(3, 8), Head(8), tail

    def forward(self, x):
        return self.tail(self, x)


TAILS = {
    "softmax": lambda net, x: net.head(net.body(x)).softmax(1),
    "scaled": lambda net, x: torch.log_softmax(net.head(net.body(x)) / 0.5, 1),
    "flipped": lambda net, x: (net.head(net.body(x)) + net.head(net.body(x.flip(3)))) / 2,
    "stacked": lambda net, x: torch.stack([net.head(net.body(x)), net.head(net.body(x.flip(3)))]).softmax(-1).mean(0),
}


@pytest.mark.parametrize("tail", TAILS)
def test_logits_are_not_cut_on_their_way_out(tail):
    model = settle(Tail(TAILS[tail]))
    model.head.linear.weight *= 30  # far beyond what a few images show
    result = quantize_data_free(model, SPEC, Recipe(quantize=True, correction=True))
    layers = {node.name for node in weighted_nodes(result.float) if node.target == "head.linear"}
    assert layers and not layers & set(quantizers(result))
    images = SPEC.probe(32, seed=6)
    expected, ours = model(images), result.simulated(images)
    assert float((expected.argmax(1) == ours.argmax(1)).float().mean()) > 0.9
