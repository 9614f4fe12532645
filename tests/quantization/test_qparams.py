"""Quantization parameters, against torch's own kernels and by what they must be."""

import pytest
import torch
from torch import Tensor, nn

from utils.quantization import qparams
from utils.quantization.qparams import (
    affine_qparams,
    choose_bias_qparams,
    choose_weight_qparams,
    fake_quantize,
    fit_bias_to_int32,
    overflows,
    round_bias,
    round_weight,
    symmetric_qparams,
)

BITS = range(2, 17)
LAYERS = {
    "conv": lambda: nn.Conv2d(6, 8, 3),
    "grouped": lambda: nn.Conv2d(6, 8, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
    "transposed": lambda: nn.ConvTranspose2d(6, 8, 3, groups=2),
    "linear": lambda: nn.Linear(6, 8),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_weights_lie_on_their_steps(kind, symmetric, channelwise, bits):
    layer = LAYERS[kind]().requires_grad_(False)
    before = layer.weight.clone()
    qparams = choose_weight_qparams(layer, bits, channelwise, symmetric)
    round_weight(layer, qparams)
    axis = 1 if kind == "transposed" else 0
    if channelwise and kind != "transposed":
        torch.testing.assert_close(layer.weight, fake_quantize(before, qparams, axis), rtol=0, atol=0)
        assert all(len(row.unique()) <= 2**bits for row in layer.weight)
    elif not channelwise:
        torch.testing.assert_close(layer.weight, fake_quantize(before, qparams), rtol=0, atol=0)
        assert len(layer.weight.unique()) <= 2**bits
    if bits >= 8:
        assert (layer.weight - before).abs().max() <= qparams.scale.max() / 2 + 1e-7
    assert (qparams.zero_point >= qparams.quant_min).all() and (qparams.zero_point <= qparams.quant_max).all()
    if symmetric:
        assert (qparams.zero_point == 0).all()


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_few_bits_round_no_worse_than_a_grid_that_spans_all(kind, symmetric, channelwise, bits):
    layer = LAYERS[kind]().requires_grad_(False)
    layer.weight.copy_(torch.distributions.Laplace(0.0, 1.0).sample(layer.weight.shape))
    exact = layer.weight.clone()
    qparams = choose_weight_qparams(layer, bits, channelwise, symmetric)
    round_weight(layer, qparams)
    error = (layer.weight - exact).square()
    parts = exact if qparams.per_channel else [exact]
    for weights, mine in zip(parts, error if qparams.per_channel else [error], strict=True):
        spanning = (
            symmetric_qparams(weights.abs().max(), bits) if symmetric else affine_qparams(*weights.aminmax(), bits)
        )
        assert mine.sum() <= (fake_quantize(weights, spanning) - weights).square().sum() * (1 + 1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_few_bits_cut_what_is_rare(symmetric):
    layer = nn.Linear(4096, 1).requires_grad_(False)
    layer.weight.copy_(torch.distributions.Laplace(0.0, 1.0).sample(layer.weight.shape))
    exact = layer.weight.clone()
    qparams = choose_weight_qparams(layer, 4, per_channel=False, symmetric=symmetric)
    round_weight(layer, qparams)
    kept = exact.abs() < 0.9 * layer.weight.abs().max()
    assert 0.95 < kept.float().mean() < 1 and layer.weight.abs().max() < 0.8 * exact.abs().max()
    assert (layer.weight - exact)[kept].abs().max() <= qparams.scale / 2 + 1e-6
    assert len(layer.weight.unique()) == 16


@pytest.mark.parametrize("size", [1e-37, 1e-25, 1e25, 1e37])
@pytest.mark.parametrize("channelwise", [False, True])
def test_the_grid_does_not_depend_on_the_size_of_weights(channelwise, size):
    layer = nn.Linear(256, 4).requires_grad_(False)
    layer.weight.copy_(torch.distributions.Laplace(0.0, 1.0).sample(layer.weight.shape))
    wanted = choose_weight_qparams(layer, 4, channelwise, True).scale
    assert wanted.max() < layer.weight.abs().max() / 8
    layer.weight.mul_(size)
    torch.testing.assert_close(choose_weight_qparams(layer, 4, channelwise, True).scale / size, wanted)


def normal(shape):
    return torch.randn(shape)


def heavy_tails(shape):
    return torch.distributions.StudentT(3.0).sample(shape)


def one_outlier(shape):
    return torch.cat([torch.randn(*shape[:-1], shape[-1] - 1), 10 * torch.ones(*shape[:-1], 1)], -1)


@pytest.mark.parametrize("bits", [3, 4, 7])
@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize("weights", [normal, heavy_tails, one_outlier])
def test_a_sample_of_a_large_layer_chooses_nearly_the_grid_of_all(weights, channelwise, bits, monkeypatch):
    torch.manual_seed(0)
    layer = nn.Linear(8192, 16).requires_grad_(False)
    layer.weight.copy_(weights(layer.weight.shape))

    def error() -> Tensor:
        rounded = fake_quantize(layer.weight, choose_weight_qparams(layer, bits, channelwise, True))
        return (rounded - layer.weight).square().sum()

    least = error()
    monkeypatch.setattr(qparams, "SAMPLED", 2**13)
    assert qparams._sample(layer.weight)[0].shape == (16, qparams.SAMPLED_OF_ROW + qparams.LARGEST)
    assert least <= error() < 1.1 * least


def test_a_sample_reaches_from_the_first_to_the_last_weight():
    rows = torch.arange(2**25 + 100, dtype=torch.float32).flip(0)[None].contiguous()
    values, counts = qparams._sample(rows)
    assert values[0, 0] == rows[0, 0] and values[0, qparams.SAMPLED - 1] == rows[0, -1]
    assert float(counts.double().sum()) == pytest.approx(rows.shape[1], rel=1e-5)


def test_with_8_bits_a_grid_spans_all_weights():
    layer = nn.Linear(400, 1).requires_grad_(False)
    layer.weight[0, 0] = 50.0
    scale = choose_weight_qparams(layer, 8, per_channel=False, symmetric=True).scale
    assert torch.equal(scale * 127, torch.tensor(50.0))


def test_per_channel_scales_of_a_transposed_convolution_run_along_its_output():
    layer = nn.ConvTranspose2d(4, 6, 2).requires_grad_(False)
    layer.weight.normal_()
    layer.weight[:, 1] *= 10
    qparams = choose_weight_qparams(layer, 8, per_channel=True, symmetric=True)
    assert qparams.scale.shape == (6,)
    assert qparams.scale.argmax() == 1


def test_a_grouped_transposed_convolution_has_one_scale():
    layer = nn.ConvTranspose2d(4, 6, 2, groups=2).requires_grad_(False)
    scale = choose_weight_qparams(layer, 8, per_channel=True, symmetric=True).scale
    assert scale.dim() == 0 and torch.equal(scale * 127, layer.weight.abs().max())


def test_a_tensor_of_zeros_stays_zeros():
    layer = nn.Conv2d(3, 3, 1).requires_grad_(False)
    layer.weight.zero_()
    for symmetric in (False, True):
        round_weight(layer, choose_weight_qparams(layer, 8, per_channel=False, symmetric=symmetric))
        assert (layer.weight == 0).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_narrow_bias_has_few_values(bits):
    bias = torch.randn(4096)
    rounded = round_bias(bias, choose_bias_qparams(bias, bits, None))
    assert len(rounded.unique()) <= 2**bits
    assert (rounded - bias).abs().max() <= bias.abs().max() / (2 ** (bits - 1) - 1) * 0.5001


def test_wide_bias_lies_on_the_steps_of_the_accumulator():
    bias, scale = torch.randn(64), torch.rand(64) * 1e-4 + 1e-6
    rounded = round_bias(bias, choose_bias_qparams(bias, 32, scale))
    steps = rounded.double() / scale.double()
    torch.testing.assert_close(steps, steps.round(), rtol=1e-6, atol=1e-2)
    assert ((rounded - bias).abs() <= scale * 0.51 + 1e-7).all()


def test_zero_is_exact_even_where_the_range_does_not_hold_it():
    for low, high in ((1.0, 3.0), (-3.0, -1.0), (0.0, 0.0)):
        qparams = affine_qparams(torch.tensor(low), torch.tensor(high), 8)
        assert fake_quantize(torch.zeros(1), qparams) == 0
    assert symmetric_qparams(torch.tensor(0.0), 8).scale > 0


def test_bits_are_those_that_hold_all_steps():
    for bits in BITS:
        assert affine_qparams(torch.tensor(-1.0), torch.tensor(1.0), bits).bits == bits
        assert symmetric_qparams(torch.tensor(1.0), bits).bits == bits


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_bias_fits_int32_with_room_for_the_products(per_channel):
    layer, input_scale = nn.Conv2d(3, 4, 1).requires_grad_(False), 0.02
    layer.weight[0] = 1e-9
    layer.bias.copy_(torch.tensor([7.0, 0.1, -0.1, 0.0]))
    qparams = choose_weight_qparams(layer, 8, per_channel, symmetric=True)
    roomy = fit_bias_to_int32(qparams, layer.bias, input_scale)
    steps = layer.bias / (roomy.scale * input_scale)
    assert steps.abs().max() <= 2**30 * (1 + 1e-6)
    kept = slice(1, None) if per_channel else ...
    torch.testing.assert_close(roomy.scale[kept], qparams.scale[kept], rtol=0, atol=0)
    assert not overflows(layer.bias, choose_bias_qparams(layer.bias, 32, roomy.scale * input_scale))
    assert overflows(layer.bias, choose_bias_qparams(layer.bias, 32, qparams.scale * input_scale)) == per_channel
