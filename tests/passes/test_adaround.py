"""Learned rounding: what is learned ends on steps, nearer to float on images that were not learned from."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from networks import SPEC, Branches, chain, made, randomise, settle
from test_bit_widths import Heads
from test_blocks import Batchwise, Unet
from torch import nn

import dfq
from dfq import Recipe, quantize_data_free
from utils.calibration.distillation import as_pixels, leaves_to_judge
from utils.calibration.fidelity import fidelity
from utils.calibration.images import Images
from utils.calibration.rendered import natural_noise
from utils.graph.layers import grouped_weight, make_layer
from utils.graph.nodes import module_of, weighted_nodes
from utils.passes import adaround
from utils.passes.adaround import affordable, free_quantizers, is_nearer, learn_rounding, reconstruct
from utils.passes.block_learning import BlockLearner, Handed, Reconstruction, images_in_step
from utils.passes.blocks import Part
from utils.passes.log import PassLog
from utils.passes.soft_rounding import (
    SoftLayer,
    SoftQuantizer,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    rounding_penalty,
    scaled_quantizer,
)
from utils.quantization.qparams import affine_qparams, choose_weight_qparams, round_weight
from utils.quantization.quantizer import Quantizer

IMAGES = Images(*(as_pixels(natural_noise(SPEC, n, torch.Generator().manual_seed(n)), SPEC) for n in (64, 32)))
FLAGS = {"quantize": True, "equalize": True, "correction": True, "distill_correction": True, "distill_rounding": "gptq"}
QUICK = Reconstruction(iterations=60)


def start(network, **settings):
    """A network that GPTQ rounded, and its float one."""
    return copy.deepcopy(_start(network, tuple(settings.items())))


@cache
def _start(network, settings):
    model, graph = made(network, randomise, settle)
    recipe = Recipe(**FLAGS | {"bits_weight": 4, "per_channel": True} | dict(settings))
    result = quantize_data_free(model, SPEC, recipe, IMAGES.calibration, graph, judging=IMAGES.judging)
    for module in (*result.float.modules(), *result.simulated.modules()):
        if hasattr(module, "inplace"):
            module.inplace = False
    return result


def learned(network, settings=QUICK, folder=None, **flags):
    result = start(network, **flags)
    simulated, log = copy.deepcopy(result.simulated), PassLog()
    reconstruct(copy.deepcopy(result.float), simulated, IMAGES, {}, settings, log, folder=folder)
    return result, simulated, log


def weights_of(model):
    return {node.target: module_of(model, node).weight.clone() for node in weighted_nodes(model)}


# ---- the variables


def test_the_rectified_sigmoid_reaches_its_ends_and_is_inverted():
    assert rectified_sigmoid(torch.tensor([-5.0, 0.0, 5.0])).tolist() == [0, 0.5, 1]
    h = torch.linspace(0.02, 0.98, 9)
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(h)), h)
    assert rounding_penalty(torch.tensor([0.0, 1.0]), 2) == 0 and rounding_penalty(torch.tensor([0.5]), 20) == 1


CONV = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
LAYERS = {
    "dense": lambda w: make_layer(nn.Conv2d, w(6, 4, 3, 3), None, groups=1, **CONV),
    "grouped": lambda w: make_layer(nn.Conv2d, w(6, 2, 3, 3), None, groups=3, **CONV),
    "transposed": lambda w: make_layer(
        nn.ConvTranspose2d, w(6, 2, 3, 3), None, groups=2, output_padding=[0, 0], **CONV
    ),
    "linear": lambda w: make_layer(nn.Linear, w(5, 6), None),
}


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_soft_layer_starts_where_it_was_and_ends_on_steps(name, per_channel, asymmetric):
    layer = LAYERS[name](torch.randn)
    exact = layer.weight.data.clone()
    layer.weight_qparams = qparams = choose_weight_qparams(layer, 4, per_channel, not asymmetric)
    round_weight(layer, qparams)
    unit = torch.ones_like(layer.bias)
    hard, bias, grid = SoftLayer(layer, exact, 1.0, unit).hard()
    torch.testing.assert_close(hard, layer.weight.data)
    torch.testing.assert_close(bias, layer.bias.data)
    assert torch.equal(grid.scale, qparams.scale)
    soft = SoftLayer(layer, exact, 0.0, unit)
    view = grouped_weight(layer, soft.weight(soft.h).detach())
    step = (qparams.scale.view(soft.along)).expand_as(view)
    wanted = grouped_weight(layer, exact) / step + soft.zero
    inside = (view - grouped_weight(layer)).abs() < 0.48 * step  # those that do not start beside a step
    inside &= (wanted >= qparams.quant_min) & (wanted <= qparams.quant_max)
    torch.testing.assert_close(
        view[inside], grouped_weight(layer, exact)[inside], rtol=0, atol=0.03 * float(step.max())
    )
    with torch.no_grad():
        soft.v.normal_(0, 3)
        soft.log_scale.fill_(0.1)
    weight, _, grid = soft.hard()
    torch.testing.assert_close(grid.scale, qparams.scale * torch.tensor(0.1).exp())
    steps = grouped_weight(layer, weight) / grid.scale.view(soft.along) + soft.zero
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert steps.min() > qparams.quant_min - 0.5 and steps.max() < qparams.quant_max + 0.5
    moved = (grouped_weight(layer, weight) / grid.scale.view(soft.along) - grouped_weight(layer, exact) / step).abs()
    assert moved[inside].max() <= 1.01  # to one of the two neighbours


def test_a_soft_quantizer_rounds_as_the_quantizer_does_and_its_scale_has_lsqs_gradient():
    qparams = affine_qparams(torch.tensor(-1.0), torch.tensor(2.0), 3)
    cap = torch.tensor([0.9, 5.0])
    x = torch.randn(4, 2, 5, 5) * 2
    for hard in (Quantizer(qparams), Quantizer(qparams, cap)):
        soft = SoftQuantizer(hard, 0.0, True, torch.Generator())
        torch.testing.assert_close(soft(x), hard(x))
    soft = SoftQuantizer(Quantizer(qparams), 0.0, True, torch.Generator())
    with torch.enable_grad():
        x.requires_grad_()
        soft(x).sum().backward()
    steps = x.detach() / soft.quantizer.scale
    low, high = soft.quantizer.step_min, soft.quantizer.step_max
    inside = (steps >= low) & (steps <= high)
    torch.testing.assert_close(x.grad, inside.float())
    slope = torch.where(inside, steps.round() - steps, steps.clamp(low, high)).sum() * soft.quantizer.scale
    torch.testing.assert_close(soft.log_scale.grad, slope)


def test_a_share_of_the_channels_stays_unrounded_but_cut():
    qparams = affine_qparams(torch.tensor(0.0), torch.tensor(1.0), 2)
    x = torch.rand(64, 32, 3, 3) * 1.5
    found = SoftQuantizer(Quantizer(qparams), 0.25, False, torch.Generator().manual_seed(0))(x)
    unrounded = torch.isclose(found, x.clamp(max=1.0)).flatten(2).all(2)
    assert 0.2 < unrounded.float().mean() < 0.3 and found.max() <= 1.0


def test_a_scaled_quantizer_keeps_its_zero_point_and_the_value_of_its_caps():
    quantizer = Quantizer(affine_qparams(torch.tensor(0.0), torch.tensor(3.0), 4), torch.tensor([1.0, 3.0]))
    scaled = scaled_quantizer(quantizer, 1.25)
    assert scaled.scale == pytest.approx(1.25 * quantizer.scale) and scaled.zero_point == quantizer.zero_point
    assert scaled.cap.tolist() == [4, 12]  # 1 and 3 in steps of 0.25


# ---- blocks of networks


@pytest.mark.parametrize("network", [Heads, Unet, Batchwise])
def test_every_layer_ends_on_its_steps_in_any_graph(network):
    _, simulated, _ = learned(network, replace(QUICK, iterations=3), bits_weight=3, bits_activation=4)
    for node in weighted_nodes(simulated):
        layer = module_of(simulated, node)
        steps = (
            grouped_weight(layer)
            / layer.weight_qparams.scale.view(1, -1, 1, 1).expand(grouped_weight(layer).shape[0], -1, 1, 1)
            if layer.weight_qparams.per_channel
            else grouped_weight(layer) / layer.weight_qparams.scale
        )
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
        assert steps.min() > -4.5 and steps.max() < 3.5


def test_every_variable_is_decided_at_the_end(monkeypatch):
    undecided = []
    hard = SoftLayer.hard

    def watched(layer):
        undecided.append(float(((layer.h > 0.05) & (layer.h < 0.95)).float().mean()))
        return hard(layer)

    monkeypatch.setattr(SoftLayer, "hard", watched)
    learned(chain)
    assert len(undecided) == 4 and max(undecided) < 0.05


def test_steps_of_activations_are_learned_below_8_bits_where_no_concat_shares_them():
    result, simulated, _ = learned(Branches, replace(QUICK, iterations=20), bits_activation=4)
    free = free_quantizers(simulated)
    moved = {
        name
        for name, module in simulated.named_modules()
        if isinstance(module, Quantizer) and module.scale != result.simulated.get_submodule(name).scale
    }
    kinds = {name for name, module in simulated.named_modules() if isinstance(module, Quantizer)}
    assert moved and moved <= free < kinds
    scales = [simulated.get_submodule(name).scale for name in kinds - free]
    assert len(scales) == 2 and scales[0] == scales[1]
    result, simulated, _ = learned(chain, replace(QUICK, iterations=3))
    assert all(
        module.scale == result.simulated.get_submodule(name).scale
        for name, module in simulated.named_modules()
        if isinstance(module, Quantizer)
    )


def test_what_is_no_nearer_on_held_out_images_is_not_kept():
    wild = replace(QUICK, iterations=4, reach=100.0, warm=0.9, scale_reach=10.0)
    result, simulated, log = learned(chain, wild)
    assert log.counts()[adaround.ACTION] == {"applied": 0, "skipped": 1}
    for name, weight in weights_of(result.simulated).items():
        assert torch.equal(weights_of(simulated)[name], weight)
    again = learn_rounding(result, IMAGES, 32, wild)
    assert again is result and "which is kept" in again.log.notes[-1]


def test_learning_comes_nearer_on_images_that_it_never_saw_which_is_kept_and_said():
    result = start(Branches, bits_weight=3, distill_rounding=None)
    again = learn_rounding(result, IMAGES, 32, QUICK)
    assert again.fidelity.output > result.fidelity.output + 1
    assert again.log.counts()[adaround.ACTION]["applied"] == 1
    assert again.fidelity.output == pytest.approx(fidelity(result.float, again.simulated, IMAGES.judging).output)
    assert again.log.notes[-1].startswith("learned rounding: ") and "which is kept" not in again.log.notes[-1]
    assert all(module_of(again.simulated, node).bias_qparams for node in weighted_nodes(again.simulated))


def test_what_holds_for_its_own_images_only_is_not_kept():
    result = start(Branches, bits_weight=3, distill_rounding=None)
    alike = Images(*(0.1 * some + 1 for some in (IMAGES.calibration, IMAGES.judging)))  # of little contrast
    known = replace(result, fidelity=fidelity(result.float, result.simulated, alike.judging))
    others = IMAGES.judging
    freely = learn_rounding(copy.deepcopy(known), alike, 32, QUICK)
    assert freely.fidelity.output > known.fidelity.output + 1
    before, after = (fidelity(one.float, one.simulated, others).output for one in (known, freely))
    assert after < before - 1
    judged = learn_rounding(known, alike, 32, QUICK, others=others)
    assert judged is known
    assert f"on dead leaves {after:.2f} dB, {before:.2f} dB with GPTQ alone, which is kept" in known.log.notes[-1]


def test_images_that_decide_nothing_leave_it_to_others():
    result = start(Branches, bits_weight=3, distill_rounding=None)
    after = learn_rounding(copy.deepcopy(result), IMAGES, 32, QUICK).fidelity.output
    for lead, taken in ((0.3, True), (0.7, False)):  # dB that the network was nearer before, on the held-out images
        before = replace(result, fidelity=replace(result.fidelity, output=after + lead))
        leaves = leaves_to_judge(SPEC, 32)
        assert (
            learn_rounding(copy.deepcopy(before), IMAGES, 32, QUICK, others=leaves).fidelity.output == after
        ) == taken
        assert learn_rounding(before, IMAGES, 32, QUICK) is before


@pytest.mark.parametrize(
    ("gains", "taken"),
    [([0.1], True), ([0.0], False), ([-0.1], False), ([-0.01, 6.9], True), ([3.2, -3.1], False), ([0.2, -0.3], False)],
)
def test_learning_is_kept_where_it_gains_on_all_kinds_of_images_together_and_loses_on_none(gains, taken):
    assert is_nearer(gains) == taken == is_nearer(gains[::-1])


def test_what_also_holds_for_others_is_kept_and_both_figures_are_said():
    result = start(Branches, bits_weight=3, distill_rounding=None)
    again = learn_rounding(result, IMAGES, 32, QUICK, others=leaves_to_judge(SPEC, 32))
    assert again.fidelity.output > result.fidelity.output
    assert "; on dead leaves " in again.log.notes[-1] and "which is kept" not in again.log.notes[-1]


@pytest.mark.parametrize(
    ("shape", "images"),
    [((512,), 16), ((32, 32), 16), ((64, 64), 16), ((90, 120), 6), ((300, 300), 1)],
)
def test_few_images_are_enough_where_maps_are_large_and_cannot_be_cropped(shape, images):
    values = {"x": torch.zeros(2, 3, *shape) if len(shape) > 1 else torch.zeros(2, *shape)}
    whole = Part(None, ("x",), ("y",), False)
    assert images_in_step(Handed(values, values), whole, 32, 16) == images
    assert images_in_step(Handed(values, values), replace(whole, local=True), 32, 16) == 16


# ---- going on


def test_a_run_that_was_stopped_goes_on_and_comes_to_the_same(tmp_path, monkeypatch):
    small = replace(QUICK, iterations=6)
    monkeypatch.setattr(adaround, "find_blocks", lambda model: [["0.0"], ["1.0", "2.0"], ["3.linear"]])
    _, whole, _ = learned(chain, small)
    learn, done = BlockLearner.learn, []

    def stopped(learner, progress):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(learner)
        return learn(learner, progress)

    monkeypatch.setattr(BlockLearner, "learn", stopped)
    with pytest.raises(KeyboardInterrupt):
        learned(chain, small, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["block0.pt", "block1.pt"]
    (folder / "block1.pt").write_bytes(b"damaged")
    done[1:] = []
    monkeypatch.setattr(BlockLearner, "learn", lambda learner, progress: done.append(0) or learn(learner, progress))
    _, resumed, log = learned(chain, small, tmp_path)
    assert len(done) == 3  # the first block was not learned again, the damaged one was
    assert len(log.entries) == 3
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], weight)


def test_other_settings_do_not_find_what_was_kept(tmp_path):
    for settings in (replace(QUICK, iterations=2), replace(QUICK, iterations=3)):
        learned(chain, settings, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_blocks_that_another_rule_learned_are_learned_anew(tmp_path, monkeypatch):
    for edition in (adaround.EDITION, adaround.EDITION - 1):
        monkeypatch.setattr(adaround, "EDITION", edition)
        learned(chain, replace(QUICK, iterations=2), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_fewer_images_are_used_where_memory_is_short(monkeypatch):
    images, log = torch.zeros(10, 3, 4, 4), PassLog()
    assert len(affordable(images, 48, log)) == 10 and not log.notes
    monkeypatch.setattr(adaround, "MEMORY", 5 * 4 * 4 * 48)
    assert len(affordable(images, 48, log)) == 5 and "from 5 of 10 images" in log.notes[0]


def test_the_recipe_learns_behind_the_choice_of_scales_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("DFQ_CACHE", str(tmp_path))
    monkeypatch.setattr(dfq, "Reconstruction", lambda: replace(QUICK, iterations=20))
    model, graph = made(chain, randomise, settle)
    recipe = Recipe(**FLAGS | {"bits_weight": 4, "distill_rounding": "adaround"})
    result = quantize_data_free(model, SPEC, recipe, IMAGES.calibration, graph, judging=IMAGES.judging)
    assert sum(note.startswith("learned rounding: ") for note in result.log.notes) == 1
    assert len(list((tmp_path / "rounding").iterdir())) == 1
    assert result.fidelity.output == pytest.approx(fidelity(result.float, result.simulated, IMAGES.judging).output)
    assert result.fidelity.output >= start(chain, per_channel=False).fidelity.output


@pytest.mark.parametrize("bits", [4, 8])
def test_few_bits_of_activations_are_learned_longer_and_judged_by_images_like_those_learned_from(bits, monkeypatch):
    told = []
    monkeypatch.setattr(dfq, "learn_rounding", lambda result, images, **rest: told.append((images, rest)) or result)
    recipe = Recipe(**FLAGS | {"distill_rounding": "adaround"}, bits_weight=4, bits_activation=bits)
    model = made(chain, settle)[0]
    for real in (False, True):
        found = quantize_data_free(model, SPEC, recipe, IMAGES.calibration, judging=IMAGES.judging, real=real)
        images, settings = told[-1][0], told[-1][1]["settings"]
        alike = bits < 8 and not real
        assert (len(images.calibration), len(images.judging)) == ((56, 8) if alike else (64, 32))
        assert found.fidelity.output == fidelity(found.float, found.simulated, IMAGES.judging).output
        assert (told[-1][1]["others"] is None) == real  # pictures are judges enough
        assert (settings.iterations > Reconstruction.iterations) == (bits < 8)
        assert (settings.scale_reach > Reconstruction.scale_reach) == (bits < 8)
