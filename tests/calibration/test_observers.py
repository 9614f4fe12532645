"""What is observed of a network's activations on images."""

import pytest
import torch
from networks import SPEC, chain, folded, made, randomise
from torch import nn

from utils.calibration.observers import (
    BINS,
    Histogram,
    channel_extremes,
    channel_mean,
    histograms,
    input_means,
    layer_means,
    observe,
    run_layers,
)
from utils.calibration.range_rules import image_extremes
from utils.graph.capture import capture
from utils.graph.nodes import module_of, weighted_nodes
from utils.quantization.qparams import activation_qparams, affine_qparams, fake_quantize


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
        return float(
            (fake_quantize(x, affine_qparams(torch.tensor(low), torch.tensor(high), bits)) - x).square().mean()
        )

    for bits in (3, 4, 8):
        low, high = histogram.range("mse", bits)
        ends = torch.linspace(0.05, 1, 16)
        least = min(error(float(a) * -5, float(b) * 40, bits) for a in ends for b in ends)
        assert error(low, high, bits) < 1.1 * least


def test_layer_means_count_every_image_once():
    traced = made(chain, randomise)[1]
    images, layer = SPEC.probe(20), weighted_nodes(traced)[-1]
    expected = channel_mean(module_of(traced, layer), traced(images))
    torch.testing.assert_close(layer_means(traced, images)[layer.target], expected)


class Windowed(nn.Module):
    """A linear layer that reads windows of a map, 16 of each image, as attention in windows does."""

    def __init__(self):
        super().__init__()
        self.before, self.layer = nn.Conv2d(3, 4, 1), nn.Linear(4, 4)

    def forward(self, x):
        windows = self.before(x).unflatten(2, (4, 6)).unflatten(4, (4, 6)).permute(0, 2, 4, 3, 5, 1).reshape(-1, 36, 4)
        return self.layer(windows).unflatten(0, (-1, 16)).mean((1, 2))


def test_means_and_extremes_of_windows_are_those_of_all_images():
    model, images = made(Windowed)[1], SPEC.probe(20)
    layer = weighted_nodes(model)[1]
    values = {}
    observe(model, images, lambda node, value: values.setdefault(node.name, []).append(value))
    read, made_ = (torch.cat(values[name]).flatten(0, 1) for name in (layer.args[0].name, layer.name))
    assert len(read) == 20 * 16 * 36
    torch.testing.assert_close(input_means(model, images)[layer.target], read.mean(0))
    torch.testing.assert_close(layer_means(model, images)[layer.target], made_.mean(0))
    low, high = image_extremes(model, images)[layer.name]
    torch.testing.assert_close(low, made_.reshape(20, -1).amin(1))
    torch.testing.assert_close(high, made_.reshape(20, -1).amax(1))


class Last(nn.Module):
    """Values with the images along their last axis."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return (self.layer(x).permute(1, 2, 3, 0).softmax(1)).permute(3, 0, 1, 2)


def test_extremes_of_values_that_mix_images_are_those_of_all():
    model, images = capture(Last(), SPEC), SPEC.probe(3)
    node = next(node for node in model.graph.nodes if node.target is torch.ops.aten.softmax.int)
    low, high = image_extremes(model, images)[node.name]
    assert low.shape == high.shape == (3,)
    values = model(images)
    assert float(low.min()) == float(values.min()) and float(high.max()) == float(values.max())


def test_observing_shows_values_before_they_are_overwritten():
    model = capture(nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True)), SPEC)
    smallest = {}
    observe(model, SPEC.probe(2), lambda node, value: smallest.update({node.name: float(value.min())}))
    assert smallest["_0"] < 0 == smallest["_1"]


def test_histograms_count_every_value_of_every_batch():
    traced, images = made(chain, randomise)[1], SPEC.probe(20)
    found, output = histograms(traced, images), traced(images)
    last = found[weighted_nodes(traced)[-1].name]
    assert (last.low, last.high) == pytest.approx((float(output.min()), float(output.max())), rel=1e-5)
    assert int(last.counts.sum()) == output.numel()


def test_means_and_extremes_are_those_of_all_images():
    traced, images = made(chain, randomise)[1], SPEC.probe(20)
    assert torch.allclose(input_means(traced, images)["0.0"], images.mean((0, 2, 3)), atol=1e-6)
    low, high = channel_extremes(traced, images)[next(iter(traced.graph.nodes)).name]
    torch.testing.assert_close(low, images.amin((0, 2, 3)), rtol=0, atol=0)
    torch.testing.assert_close(high, images.amax((0, 2, 3)), rtol=0, atol=0)


def test_layers_are_run_in_order_and_what_they_return_is_read():
    (traced, _), images, names = folded(made(chain, randomise)[1]), SPEC.probe(2), []

    def run_layer(name, layer, x):
        names.append(name)
        return torch.zeros_like(layer(x)) if name == "2.0" else layer(x)

    output = run_layers(traced, images, run_layer)
    assert names == [node.target for node in weighted_nodes(traced)]
    torch.testing.assert_close(output, traced.get_submodule("3.linear").bias.expand(2, -1))


def test_the_range_of_least_error_on_a_signed_grid():
    x = torch.cat([torch.randn(200_000).relu(), torch.tensor([40.0])])
    histogram = histogram_of(x)

    def error(low: float, high: float, bits: int) -> float:
        qparams = activation_qparams(torch.tensor(low), torch.tensor(high), bits, signed=True)
        return float((fake_quantize(x, qparams) - x).square().mean())

    for bits in (4, 6, 8):
        found = error(*histogram.range("mse", bits, signed=True), bits)
        assert found < 1.1 * min(error(0.0, float(share) * 40, bits) for share in torch.linspace(0.02, 1, 60))


def test_layers_see_all_images_of_a_network_that_takes_one_at_a_time():
    graph, images = (
        capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval(), SPEC),
        SPEC.probe(5),
    )
    expected = run_layers(graph, images, lambda _, layer, x: layer(x))
    graph.meta["batch"] = 1
    seen = []
    found = run_layers(graph, images, lambda _, layer, x: (seen.append(len(x)), layer(x))[1])
    assert seen == [5, 5] and torch.equal(found, expected)
