"""Distilled images: their statistics, their cache, and what the passes make of them."""

import math
from dataclasses import replace

import pytest
import torch
from networks import SPEC, Branches, Residual, chain, made, randomise, settle
from torch import nn

from dfq import Recipe
from utils.calibration import distillation as distill
from utils.calibration import image_cache
from utils.calibration.distillation import (
    ChannelMoments,
    Distillation,
    class_targets,
    evidence_loss,
    squared_errors,
    statistics_fit,
)
from utils.calibration.image_cache import distilled
from utils.calibration.rendered import dead_leaves, natural_noise
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.graph.capture import capture

CPU = torch.device("cpu")
FEW = Distillation(images=6, batch=4, steps=15)


@pytest.fixture(scope="module")
def settled() -> nn.Module:
    return settle(randomise(chain()))


# ---- images


def test_channel_moments_and_their_gradient():
    x = torch.randn(3, 4, 5, 6, dtype=torch.double, requires_grad=True)
    mean, variance = ChannelMoments.apply(x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.var((0, 2, 3), correction=0))
    with torch.enable_grad():
        assert torch.autograd.gradcheck(ChannelMoments.apply, x)


def test_squared_errors_by_hand():
    x = torch.tensor([[1.0], [5.0]])[:, :, None]  # mean 3, deviation 2
    mean, deviation = squared_errors(x, torch.tensor([1.0]), torch.tensor([16.0]), eps=0.0)
    assert (float(mean), float(deviation)) == pytest.approx((4 / 16, 4 / 16))


@pytest.mark.parametrize("network", [chain, Residual, Branches])
def test_distilled_images_meet_the_statistics_better_than_noise(network):
    model = settle(randomise(network()))
    images = distill.distill(model, SPEC, FEW, CPU)
    noise = distill.as_pixels(natural_noise(SPEC, 6, torch.Generator().manual_seed(0)), SPEC)
    fits = [sum(fit.total**2 for fit in statistics_fit(model, SPEC, x).values()) for x in (images, noise)]
    assert fits[0] < 0.3 * fits[1]
    pixels = (images * torch.tensor(SPEC.std)[:, None, None] + torch.tensor(SPEC.mean)[:, None, None]) * 255
    assert images.shape == SPEC.shape(6)
    assert pixels.min() > -0.01 and pixels.max() < 255.01
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)


def test_without_steps_images_stay_as_they_start(settled):
    settings = replace(FEW, steps=0, start="leaves")
    rendered = dead_leaves(SPEC, settings.batch, torch.Generator().manual_seed(0))
    images = distill.distill(settled, SPEC, settings, CPU)
    torch.testing.assert_close(images[: settings.batch], distill.as_pixels(rendered, SPEC))
    assert not torch.equal(images, distill.distill(settled, SPEC, replace(settings, seed=1), CPU))


def test_strided_convolutions_read_shifted_maps_while_distilling():
    strided, plain = nn.Conv2d(3, 3, 3, stride=2, padding=1, bias=False), nn.Conv2d(3, 3, 3, padding=1)
    network = nn.ModuleList([strided, plain, nn.ConvTranspose2d(3, 3, 2, stride=2)])
    x = torch.arange(192.0).view(1, 3, 8, 8)
    wide = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    outputs = [strided.forward(wide[:, :, i : i + 8, j : j + 8]) for i in range(3) for j in range(3)]
    with distill._shifting(network, 1, torch.Generator().manual_seed(1)):
        drawn = [strided(x) for _ in range(60)]
        assert all(torch.equal(module(x), module.forward(x)) for module in network[1:] for _ in range(20))
    which = [next(k for k, one in enumerate(outputs) if torch.equal(one, value)) for value in drawn]
    assert set(which) == set(range(9))
    assert torch.equal(strided(x), outputs[4])  # as it was


def test_maps_too_small_to_shift_stay(settled):
    small = nn.Conv2d(3, 3, 1, stride=2, bias=False)
    x = torch.randn(1, 3, 1, 1)
    with distill._shifting(small, 1, torch.Generator()):
        assert torch.equal(small(x), small.forward(x))
    images = [distill.distill(settled, SPEC, replace(FEW, shift=shift), CPU) for shift in (0, 1)]
    assert not torch.equal(*images)


def test_the_seed_decides(settled):
    again, other = (distill.distill(settled, SPEC, Distillation(2, 2, 2, seed=seed), CPU) for seed in (0, 1))
    torch.testing.assert_close(again, distill.distill(settled, SPEC, Distillation(2, 2, 2), CPU), rtol=0, atol=0)
    assert (again != other).any()


def test_the_fit_is_exact_on_the_images_that_the_statistics_are_of(settled):
    fit = statistics_fit(settled, SPEC, SPEC.probe(64, seed=7))
    assert next(iter(fit)) == "input" and len(fit) == 4
    assert max(one.total for name, one in fit.items() if name != "input") < 0.01


def test_a_network_without_batchnorm_is_refused():
    with pytest.raises(UserError, match="no BatchNorm with running statistics"):
        distill.distill(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), SPEC, FEW, CPU)


def test_a_loss_that_is_no_number_ends_the_batch_with_the_best(settled, monkeypatch, capsys):
    losses, original = [], distill.statistics_loss

    def diverge(*args):
        losses.append(original(*args))
        return losses[-1] * (float("nan") if len(losses) == 4 else 1)

    monkeypatch.setattr(distill, "statistics_loss", diverge)
    images = distill.distill(settled, SPEC, Distillation(4, 4, 15), CPU)
    assert len(losses) == 4 and images.isfinite().all()
    assert "the loss became nan" in capsys.readouterr().err


def test_too_little_memory_names_the_setting(settled, monkeypatch):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(distill, "statistics_loss", full)
    with pytest.raises(UserError, match=r"lower --distill_batch \(now 4\)"):
        distill.distill(settled, SPEC, FEW, CPU)


def test_images_are_kept_and_a_damaged_file_is_made_anew(settled, tmp_path, monkeypatch, capsys):
    settings = Distillation(3, 3, 2)
    images = distilled(settled, SPEC, settings, CPU, tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(distill, "distill", None)  # not called again
        torch.testing.assert_close(distilled(settled, SPEC, settings, CPU, tmp_path / "cache"), images, rtol=0, atol=0)
    assert not capsys.readouterr().err.count("damaged")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    torch.testing.assert_close(distilled(settled, SPEC, settings, CPU, tmp_path / "cache"), images, rtol=0, atol=0)
    assert "is damaged; distilling anew" in capsys.readouterr().err
    distilled(settled, SPEC, Distillation(3, 3, 2, seed=1), CPU, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_one_line(settled, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="pass --distill_cache with another folder"):
        distilled(settled, SPEC, FEW, CPU, tmp_path / "file")


def test_two_runs_may_distil_the_same_images_at_once(settled, tmp_path, monkeypatch):
    """The second one starts and ends while the first is distilling; both have their images."""
    alone, inside = distill.distill, []

    def beside_another(*given):
        if not inside:
            inside.append(None)
            monkeypatch.setattr("os.getpid", lambda: -1)
            inside.append(distilled(settled, SPEC, FEW, CPU, tmp_path))
            monkeypatch.undo()
        return alone(*given)

    monkeypatch.setattr(image_cache, "distill", beside_another)
    assert torch.equal(distilled(settled, SPEC, FEW, CPU, tmp_path), inside[1])
    assert [file.suffix for file in tmp_path.iterdir()] == [".pt"]


def test_a_recipe_says_what_it_distills():
    recipe = Recipe(quantize=True, equalize=True, correction=True, distill_correction=True, distill_range=True)
    assert str(recipe) == "+LE+DBC +DR" and recipe.needs_images
    other = Recipe(quantize=True, equalize=True, distill_equalize=True, distill_range=True, range_method="mse")
    assert str(other) == "+DLE +DR_mse"


# ---- classes


def test_evidence_is_the_nats_that_are_missing():
    logits = torch.tensor([[2.0, 0, 0], [0, 0, 0]])
    wanted, margin = torch.tensor([0, 1]), torch.tensor([5.0, 0])
    shown = 2 - math.log(2)  # over the logsumexp of two zeros
    missing = math.log1p(5 - shown), math.log1p(math.log(2))
    assert float(evidence_loss(logits, wanted, margin)) == pytest.approx(sum(missing) / 2)
    assert float(evidence_loss(logits, torch.tensor([0, -1]), margin)) == pytest.approx(missing[0])
    assert float(
        evidence_loss(logits[:, :, None, None], wanted[:, None, None], margin[:, None, None])
    ) == pytest.approx(sum(missing) / 2)


@pytest.mark.parametrize("shape", [(200, 5), (2, 5, 9, 8), (2, 400, 5)])
def test_targets_are_classes_and_margins_of_every_answer(shape):
    logits = torch.randn(shape)
    wanted, margin = class_targets(logits, 10.0, torch.Generator().manual_seed(0))
    answers = logits.argmax(-1 if len(shape) == 3 else 1).shape
    assert wanted.shape == margin.shape == answers
    assert 0 <= float(margin.min()) < 3 and 7 < float(margin.max()) <= 10
    assert int(wanted.max()) <= 4
    if len(shape) == 4:  # regions of one class, of which an image has 16
        assert len(torch.unique(margin[0])) == 16
    if len(shape) == 3:  # most priors show nothing in particular
        assert 0.85 < float((wanted < 0).float().mean()) < 0.99


def test_images_with_evidence_reach_further_at_the_output():
    model, reached = settle(randomise(chain())), []
    model[3].linear.weight.mul_(20)  # sure of what it sees, as trained ones are
    for evidence in (0.0, 0.5):
        images = distill.distill(model, SPEC, replace(FEW, evidence=evidence), CPU)
        reached.append(float(model(images).softmax(1).amax(1).mean()))
    assert reached[1] > reached[0] + 0.05


def test_a_few_images_take_the_memory_of_sixteen_of_224_pixels():
    """Ranges that nothing else tells of must not need more memory than the rest of a run, however large the images."""
    assert distill.few_images(InputSpec(size=(224, 224), resize=224)).batch == 16
    large = distill.few_images(InputSpec(size=(360, 480), resize=360))
    assert large.images == 16 and large.batch * 360 * 480 <= 16 * 224 * 224 < (large.batch + 1) * 360 * 480
    assert distill.few_images(InputSpec(size=(2000, 2000), resize=2000)).batch == 1


def test_a_few_images_are_made_once_for_a_captured_network(monkeypatch):
    calls, real = [], distill.distill
    monkeypatch.setattr(distill, "distill", lambda *arguments: calls.append(arguments) or real(*arguments))
    graph, other = made(chain, settle)[1], made(chain, randomise)[1]
    first, again, others = (distill.distill_few(network, SPEC) for network in (graph, graph, other))
    assert first is again and len(calls) == 2 and not torch.equal(first, others)
    assert torch.equal(first, real(graph, SPEC, distill.few_images(SPEC), torch.device("cpu")))


@pytest.mark.parametrize("contrast", [1, 0.1])
def test_leaves_serve_for_few_bits_where_a_network_knows_them(contrast):
    torch.manual_seed(0)
    model = randomise(chain()).train()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = None
        norm.reset_running_stats()
    model(contrast * dead_leaves(SPEC, 64, torch.Generator().manual_seed(5)))
    settings = replace(FEW, seed=3)
    assert distill.from_leaves(settings, 7) == replace(settings, start="leaves", steps=7, shift=1, evidence=0.0)
    for learned in (False, True):
        leaves = distill.from_leaves(settings, distill.LEAVES_STEPS if learned else 0)
        found = distill.for_few_bits(capture(model.eval(), SPEC), SPEC, settings, learned)
        assert found == (leaves if contrast == 1 else settings)


def test_of_leaves_half_are_distilled_and_each_follows_on_itself(settled):
    both = distill.distill(settled, SPEC, distill.from_leaves(FEW, 15), CPU)
    plain = distill.distill(settled, SPEC, distill.from_leaves(replace(FEW, images=3), 0), CPU)
    assert both.shape == SPEC.shape(6) and torch.equal(both[1::2], plain)
    assert ((both[::2] - plain).abs().mean((1, 2, 3)) < (both[::2] - plain.roll(1, 0)).abs().mean((1, 2, 3))).all()
    fits = [
        sum(fit.total**2 for fit in statistics_fit(settled, SPEC, images).values())
        for images in (both[::2], both[1::2])
    ]
    assert fits[0] < 0.5 * fits[1]
    odd = distill.distill(settled, SPEC, distill.from_leaves(replace(FEW, images=1), 2), CPU)
    assert odd.shape == SPEC.shape(1)


@pytest.mark.parametrize(("count", "made"), [(1, 8), (2, 8), (3, 9), (8, 8), (16, 16)])
def test_leaves_to_judge_by_are_eight_at_least_and_fill_batches_that_fixed_networks_take(count, made):
    leaves = distill.leaves_to_judge(SPEC, count)
    assert leaves.shape == (made, 3, *SPEC.size) and leaves.isfinite().all()
    assert torch.equal(leaves, distill.leaves_to_judge(SPEC, count))


def test_images_to_judge_by_are_distilled_from_noise():
    of_leaves, of_noise = distill.for_judging(distill.from_leaves(FEW, 150)), distill.for_judging(FEW)
    assert of_leaves == replace(of_noise, steps=Distillation.steps)
    assert (of_noise.start, of_noise.images, of_noise.seed, of_noise.steps) == ("natural", 2, 1, 15)
    assert distill.for_judging(replace(FEW, steps=0)).steps == Distillation.steps
