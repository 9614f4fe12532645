"""GPTQ: the second moment that errors are weighed by, and what error compensation gains."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from networks import SPEC, Branches, Residual, chain, made, randomise, settle
from torch import nn

from dfq import Recipe, quantize_data_free
from utils.calibration.distillation import as_pixels
from utils.calibration.rendered import natural_noise
from utils.graph.layers import grouped_weight
from utils.graph.nodes import weighted_nodes
from utils.passes.gptq import gptq_round, second_moment
from utils.quantization.qparams import choose_weight_qparams

LAYERS = {
    "dense": partial(nn.Conv2d, 6, 8, 3, stride=2, padding=1),
    "grouped": partial(nn.Conv2d, 6, 8, (3, 2), dilation=2, groups=2),
    "depthwise": partial(nn.Conv2d, 6, 6, 3, padding="same", groups=6),
    "linear": partial(nn.Linear, 6, 5),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name]().requires_grad_(False)


def correlated(layer: nn.Module, count: int = 8) -> torch.Tensor:
    """Inputs whose channels and neighbours are alike, as a network's are."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.einsum(
        "nchw,dc->ndhw",
        torch.randn(count, 6, 12, 12, generator=generator),
        torch.randn(6, 6, generator=generator) + 2,
    )
    smooth = F.avg_pool2d(mixed, 3, 1, 1).relu()
    return smooth.movedim(1, -1).flatten(0, 2) if isinstance(layer, nn.Linear) else smooth


@pytest.mark.parametrize("name", LAYERS)
def test_second_moment_predicts_the_power_of_the_output(name):
    layer = build(name)
    x = correlated(layer)
    view = grouped_weight(layer).double().flatten(2)
    predicted = torch.einsum("god,gde,goe->go", view, second_moment(layer, x), view).flatten()
    y = layer(x).double()
    y = (y if isinstance(layer, nn.Linear) else y.movedim(1, -1).flatten(0, -2)) - layer.bias
    torch.testing.assert_close(predicted, y.square().mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_errors_compensate_each_other(name, per_channel, asymmetric):
    layer = build(name)
    qparams = choose_weight_qparams(layer, 4, per_channel, not asymmetric)
    spread, exact = second_moment(layer, correlated(layer)), grouped_weight(layer).double()
    rounded = gptq_round(exact, spread, qparams)
    scale, zero = (
        part.double().expand(layer.weight.shape[0]).view(*exact.shape[:2], 1)
        for part in (qparams.scale, qparams.zero_point)
    )
    steps = rounded / scale + zero
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert steps.min() > qparams.quant_min - 0.5 and steps.max() < qparams.quant_max + 0.5
    nearest = ((exact.flatten(2) / scale).round() + zero).clamp(qparams.quant_min, qparams.quant_max).sub(zero) * scale

    def noise(weights: torch.Tensor) -> float:
        error = weights - exact.flatten(2)
        return float(torch.einsum("god,gde,goe->", error, spread, error))

    assert noise(rounded) < 0.8 * noise(nearest)


def test_inputs_that_have_nothing_in_common_are_rounded_to_the_nearest():
    layer = build("dense")
    qparams = choose_weight_qparams(layer, 4, False, True)
    exact = grouped_weight(layer).double()
    rounded = gptq_round(exact, torch.eye(54).double()[None], qparams)
    nearest = (exact.flatten(2) / qparams.scale).round().clamp(qparams.quant_min, qparams.quant_max)
    torch.testing.assert_close(rounded, nearest * qparams.scale.double(), rtol=0, atol=1e-6)


def test_an_input_that_never_varies_is_no_obstacle():
    layer = build("dense")
    qparams = choose_weight_qparams(layer, 4, False, True)
    assert gptq_round(grouped_weight(layer).double(), torch.zeros(1, 54, 54).double(), qparams).isfinite().all()


@pytest.mark.parametrize("network", [chain, Residual, Branches])
def test_a_network_comes_nearer_to_its_float_one(network):
    model, graph = made(network, randomise, settle)
    images = as_pixels(natural_noise(SPEC, 32, torch.Generator().manual_seed(3)), SPEC)
    flags = {"quantize": True, "equalize": True, "correction": True, "distill_correction": True, "bits_weight": 4}
    nearest, rounded = (
        quantize_data_free(model, SPEC, Recipe(**flags, distill_rounding=rounding), images, graph)
        for rounding in (False, True)
    )
    assert rounded.fidelity.output > nearest.fidelity.output + 1
    assert rounded.log.counts()["rounded with GPTQ"]["applied"] == len(weighted_nodes(rounded.simulated))


def test_the_row_says_so():
    assert (
        str(Recipe(quantize=True, equalize=True, correction=True, distill_correction=True, distill_rounding=True))
        == "+LE+GPTQ+DBC"
    )
