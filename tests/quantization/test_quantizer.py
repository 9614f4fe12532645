"""Grids and quantizers, against torch's own kernels and by what a grid must be."""

import pytest
import torch
from torch import nn

from utils.graph.layers import CappedReLU
from utils.quantization.quantizer import (
    Quantizer,
    affine_grid,
    bias_grid,
    fake_quantize,
    quantize_bias,
    quantize_weight,
    symmetric_grid,
    weight_grid,
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
def test_activation_has_at_most_two_to_the_bits_values_and_zero_stays(bits):
    x = torch.randn(4, 8, 32, 32) * 3
    x[0, 0, 0, 0] = 0.0
    quantizer = Quantizer(affine_grid(torch.tensor(-1.7), torch.tensor(4.1), bits))
    y = quantizer(x)
    assert len(y.unique()) <= 2**bits
    assert y[0, 0, 0, 0] == 0
    inside = (x > y.min()) & (x < y.max())
    assert (x - y)[inside].abs().max() <= quantizer.scale / 2 + 1e-6  # float32 counts values of 4 in steps of 5e-7


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("inplace", [False, True])
def test_quantizer_is_torchs_fake_quantize(bits, inplace):
    x = torch.randn(2, 5, 40, 40) * 2
    grid = affine_grid(torch.tensor(-1.3), torch.tensor(2.9), bits)
    expected = fake_quantize(x, grid)
    torch.testing.assert_close(Quantizer(grid, inplace=inplace)(x.clone()), expected, rtol=0, atol=0)


def test_quantizer_leaves_its_input_unless_told_to_overwrite_it():
    x = torch.randn(1, 3, 4, 4)
    kept = x.clone()
    quantizer = Quantizer(affine_grid(torch.tensor(0.0), torch.tensor(1.0), 8))
    quantizer(x)
    quantizer.before = 1.0
    quantizer(x)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)


def test_quantizer_with_caps_is_capped_relu_on_the_grid():
    cap = torch.tensor([1.0, 2.5, 9.0, float("inf")])
    x = torch.randn(3, 4, 16, 16) * 4
    quantizer = Quantizer(affine_grid(torch.tensor(0.0), torch.tensor(6.0), 8), cap)
    on_grid = (cap / quantizer.scale).round() * quantizer.scale
    expected = fake_quantize(CappedReLU(on_grid)(x), quantizer.grid)
    torch.testing.assert_close(quantizer(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_weights_lie_on_their_grid(kind, symmetric, channelwise, bits):
    layer = LAYERS[kind]().requires_grad_(False)
    before = layer.weight.clone()
    grid = weight_grid(layer, bits, channelwise, symmetric)
    quantize_weight(layer, grid)
    axis = 1 if kind == "transposed" else 0
    if channelwise and kind != "transposed":
        torch.testing.assert_close(layer.weight, fake_quantize(before, grid, axis), rtol=0, atol=0)
        assert all(len(row.unique()) <= 2**bits for row in layer.weight)
    elif not channelwise:
        torch.testing.assert_close(layer.weight, fake_quantize(before, grid), rtol=0, atol=0)
        assert len(layer.weight.unique()) <= 2**bits
    assert (layer.weight - before).abs().max() <= grid.scale.max() / 2 + 1e-7
    assert (grid.zero_point >= grid.lowest).all() and (grid.zero_point <= grid.highest).all()
    if symmetric:
        assert (grid.zero_point == 0).all()


def test_per_channel_grid_of_a_transposed_convolution_runs_along_its_output():
    layer = nn.ConvTranspose2d(4, 6, 2, groups=2).requires_grad_(False)
    layer.weight.normal_()
    layer.weight[:2, 1] *= 10  # group 0, output 1
    grid = weight_grid(layer, 8, channelwise=True, symmetric=True)
    assert grid.scale.shape == (6,)
    assert grid.scale.argmax() == 1


def test_a_tensor_of_zeros_stays_zeros():
    layer = nn.Conv2d(3, 3, 1).requires_grad_(False)
    layer.weight.zero_()
    for symmetric in (False, True):
        quantize_weight(layer, weight_grid(layer, 8, channelwise=False, symmetric=symmetric))
        assert (layer.weight == 0).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_narrow_bias_has_few_values(bits):
    bias = torch.randn(4096)
    rounded = quantize_bias(bias, bias_grid(bias, bits, None))
    assert len(rounded.unique()) <= 2**bits
    assert (rounded - bias).abs().max() <= bias.abs().max() / (2 ** (bits - 1) - 1) * 0.5001


def test_wide_bias_lies_on_the_grid_of_the_accumulator():
    bias, scale = torch.randn(64), torch.rand(64) * 1e-4 + 1e-6
    rounded = quantize_bias(bias, bias_grid(bias, 32, scale))
    steps = rounded.double() / scale.double()
    torch.testing.assert_close(steps, steps.round(), rtol=1e-6, atol=1e-2)
    assert ((rounded - bias).abs() <= scale * 0.51 + 1e-7).all()


def test_grids_hold_zero_even_where_the_range_does_not():
    for low, high in ((1.0, 3.0), (-3.0, -1.0), (0.0, 0.0)):
        grid = affine_grid(torch.tensor(low), torch.tensor(high), 8)
        assert fake_quantize(torch.zeros(1), grid) == 0
    assert symmetric_grid(torch.tensor(0.0), 8).scale > 0
