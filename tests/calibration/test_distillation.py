"""Distilled images: their statistics, their cache, and what the passes make of them."""

import pytest
import torch
from networks import SPEC, Branches, Residual, chain, randomise, settle
from torch import nn

import dfq
from dfq import Recipe, quantize_data_free
from utils.calibration import distillation as distill
from utils.calibration.distillation import (
    ChannelMoments,
    Distillation,
    distilled,
    natural_noise,
    squared_errors,
    statistics_fit,
)
from utils.calibration.observers import BINS, Histogram, channel_mean, fidelity, histograms, layer_means, watch
from utils.core.errors import UserError
from utils.graph.capture import module_of, trace, weighted_nodes
from utils.passes.log import Journal
from utils.quantization.quantizer import Quantizer, affine_grid, fake_quantize

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


def test_natural_noise_has_the_prior_and_is_smooth():
    images = natural_noise(SPEC, 64, torch.Generator().manual_seed(0))
    mean, variance = SPEC.prior()
    torch.testing.assert_close(images.mean((0, 2, 3)), mean, atol=0.1, rtol=0)
    torch.testing.assert_close(images.var((0, 2, 3)), variance, atol=0.2, rtol=0)
    neighbours = torch.corrcoef(torch.stack([images[..., 1:].flatten(), images[..., :-1].flatten()]))[0, 1]
    assert neighbours > 0.6


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


# ---- ranges


def histogram_of(x: torch.Tensor) -> Histogram:
    low, high = float(x.min()), float(x.max())
    return Histogram(low, high, torch.histc(x, BINS, low, high).double())


def test_ranges_of_a_histogram():
    x = torch.cat([torch.randn(200_000), torch.tensor([40.0])])
    histogram = histogram_of(x)
    assert histogram.range("minmax", 8) == pytest.approx((float(x.min()), 40))
    low, high = histogram.range("percentile", 8)
    assert x.min() - 0.1 < low < -3.5 and 3.5 < high < 6

    def error(low: float, high: float, bits: int) -> float:
        return float((fake_quantize(x, affine_grid(torch.tensor(low), torch.tensor(high), bits)) - x).square().mean())

    for bits in (3, 4, 8):
        low, high = histogram.range("mse", bits)
        ends = torch.linspace(0.05, 1, 30)
        least = min(error(float(a) * -5, float(b) * 40, bits) for a in ends for b in ends)
        assert error(low, high, bits) < 1.1 * least


def test_quantizers_take_what_was_seen(settled):
    images = SPEC.probe(8, seed=1)
    recipe = Recipe(quantize=True, distill_range=True)
    quantized = quantize_data_free(settled, SPEC, recipe, images)
    seen = histograms(quantized.float, images)
    ranges = {}
    for node in quantized.simulated.graph.nodes:
        module = module_of(quantized.simulated, node)
        if isinstance(module, Quantizer):
            ranges[node.name.removesuffix("_quantizer")] = module.scale * module.lowest, module.scale * module.highest
    assert ranges.pop("input_1") == pytest.approx(SPEC.range(), rel=0.02)
    assert len(ranges) == 4
    for name, (low, high) in ranges.items():
        source = seen[name]
        assert (low, high) == pytest.approx((min(source.low, 0), source.high), rel=0.02, abs=1e-6)


# ---- bias correction


@pytest.mark.parametrize("network", [chain, Residual, Branches])
def test_correction_on_images_centres_every_layer(network):
    exact = trace(settle(randomise(network())), SPEC)
    dfq.fold_batchnorm(exact, Journal())
    images, rounded = SPEC.probe(32, seed=3), trace(exact, SPEC)
    dfq.quantize_weights(rounded, weighted_nodes(rounded), Recipe(quantize=True, bits_weight=3), Journal())
    expected, before = (layer_means(net, images) for net in (exact, rounded))
    dfq.correct_biases_on_images(rounded, expected, images, Journal())
    after = layer_means(rounded, images)
    for name, mean in expected.items():
        assert (before[name] - mean).abs().max() > 1e-3
        torch.testing.assert_close(after[name], mean, atol=1e-5, rtol=1e-5)


def test_layer_means_count_every_image_once():
    traced = trace(randomise(chain()), SPEC)
    images, layer = SPEC.probe(20), weighted_nodes(traced)[-1]
    expected = channel_mean(module_of(traced, layer), traced(images))
    torch.testing.assert_close(layer_means(traced, images)[layer.target], expected)


# ---- equalization and fidelity


@pytest.mark.parametrize("network", [chain, Branches])
def test_distilled_equalization_is_never_further_than_the_plain_one(network):
    model = randomise(network())
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.mul_(torch.logspace(-1, 1, len(layer.weight)))
    images = SPEC.probe(8, seed=5)
    plain = quantize_data_free(model, SPEC, Recipe(quantize=True, equalize=True), images)
    chosen = quantize_data_free(model, SPEC, Recipe(quantize=True, equalize=True, distill_equalize=True), images)
    assert chosen.fidelity.output >= plain.fidelity.output
    assert any("the nearest" in note for note in chosen.journal.notes)


def test_fidelity_measures_a_known_noise():
    first = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 24 * 24, 3)), SPEC)
    second = trace(first, SPEC)
    images = SPEC.probe(20)
    same = fidelity(first, second, images)
    assert same.output > 200
    second.get_submodule("0").weight.mul_(1.1)
    second.get_submodule("0").bias.mul_(1.1)
    near = fidelity(first, second, images)
    assert near.layers["0"] == pytest.approx(20, abs=0.01)  # a tenth of the amplitude
    assert near.report(20, verbose=True).count("dB") == 2 + 1 + 2


def test_watching_sees_values_before_they_are_overwritten():
    model = trace(nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True)), SPEC)
    lowest = {}
    watch(model, SPEC.probe(2), lambda node, value: lowest.update({node.name: float(value.min())}))
    assert lowest["_0"] < 0 == lowest["_1"]


def test_a_recipe_says_what_it_distills():
    recipe = Recipe(quantize=True, equalize=True, correction=True, distill_correction=True, distill_range=True)
    assert str(recipe) == "+LE+DBC +DR" and recipe.needs_images
    other = Recipe(quantize=True, equalize=True, distill_equalize=True, distill_range=True, range_method="mse")
    assert str(other) == "+DLE +DR_mse"
