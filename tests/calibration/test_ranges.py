"""Ranges of activations, from BatchNorm and from images."""

import pytest
import torch
from networks import SPEC, chain, folded, made, randomise, settle

from dfq import Recipe, quantize_data_free
from utils.calibration.moments import SIGMAS, Unknown, propagate
from utils.calibration.observers import histograms
from utils.calibration.ranges import analytic_ranges, batchnorm_ranges, describe_contradictions, observed_ranges
from utils.graph.nodes import module_of
from utils.quantization.quantizer import Quantizer


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_quantizers_take_the_observed_ranges(method):
    (settled, graph), images = made(chain, randomise, settle), SPEC.probe(8, seed=1)
    recipe = Recipe(quantize=True, distill_range=True, range_method=method)
    quantized = quantize_data_free(settled, SPEC, recipe, images, graph)
    observed = histograms(quantized.float, images)
    ranges = {}
    for node in quantized.simulated.graph.nodes:
        module = module_of(quantized.simulated, node)
        if isinstance(module, Quantizer):
            ranges[node.name.removesuffix("_quantizer")] = (
                module.scale * module.step_min,
                module.scale * module.step_max,
            )
    assert ranges.pop("images") == pytest.approx(SPEC.range(), rel=0.02)
    assert len(ranges) == 4
    for name, (low, high) in ranges.items():
        least, most = observed[name].range(method, 8)
        assert (low, high) == pytest.approx((min(least, 0), most), rel=0.02, abs=1e-6)


def test_ranges_from_batchnorm_are_so_many_deviations():
    model, graph = made(chain, randomise)
    low, high = batchnorm_ranges(folded(graph)[1])["0.0"]
    mean, deviation = model[0][1].bias, model[0][1].weight.abs()
    torch.testing.assert_close(low, mean - SIGMAS * deviation, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(high, mean + SIGMAS * deviation, rtol=1e-3, atol=1e-3)


def test_what_is_not_known_has_no_range():
    traced, statistics = folded(made(chain, settle)[1])
    nodes = list(traced.graph.nodes)
    analytic = analytic_ranges(propagate(traced, SPEC, statistics))
    observed = observed_ranges(traced, SPEC, SPEC.probe(4), "minmax", 8)
    assert observed(nodes[0]) == analytic(nodes[0]) == SPEC.range()
    assert isinstance(analytic(nodes[-1]), Unknown) and isinstance(observed(nodes[-1]), Unknown)


def test_contradictions_are_named_and_counted():
    nodes = list(nodes_of_names("a", "b", "c", "d"))
    observed = {"a": (0.0, 1.0), "b": (0.0, 8.0), "c": (-1.0, 0.0), "d": (0.0, 9.0)}
    analytic = {"a": (0.0, 1.5), "b": (0.0, 2.0), "c": (-10.0, 0.0)}

    def of(ranges):
        return lambda node: ranges.get(node.name, Unknown("here"))

    line = describe_contradictions(nodes, of(observed), of(analytic))
    assert line.startswith("2 ranges differ by more than 3 times between distilled images and BatchNorm")
    assert line.endswith("c 0.1, b 4)")
    assert describe_contradictions(nodes[:1], of(observed), of(analytic)) is None


def nodes_of_names(*names):
    """Graph nodes of these names."""
    graph = torch.fx.Graph()
    return [graph.placeholder(name) for name in names]
