"""The module that quantizes activations, against torch's own kernels."""

import pytest
import torch

from utils.graph.layers import Clip
from utils.quantization.qparams import activation_qparams, affine_qparams, fake_quantize
from utils.quantization.quantizer import Quantizer

BITS = range(2, 17)


@pytest.mark.parametrize("bits", BITS)
def test_activation_has_at_most_two_to_the_bits_values_and_zero_stays(bits):
    x = torch.randn(4, 8, 32, 32) * 3
    x[0, 0, 0, 0] = 0.0
    quantizer = Quantizer(affine_qparams(torch.tensor(-1.7), torch.tensor(4.1), bits))
    y = quantizer(x)
    assert len(y.unique()) <= 2**bits
    assert y[0, 0, 0, 0] == 0
    inside = (x > y.min()) & (x < y.max())
    assert (x - y)[inside].abs().max() <= quantizer.scale / 2 + 1e-6  # float32 counts values of 4 in steps of 5e-7


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("inplace", [False, True])
def test_quantizer_is_torchs_fake_quantize(bits, inplace):
    x = torch.randn(2, 5, 40, 40) * 2
    qparams = affine_qparams(torch.tensor(-1.3), torch.tensor(2.9), bits)
    expected = fake_quantize(x, qparams)
    torch.testing.assert_close(Quantizer(qparams, inplace=inplace)(x.clone()), expected, rtol=0, atol=0)


def test_quantizer_leaves_its_input_unless_told_to_overwrite_it():
    x = torch.randn(1, 3, 4, 4)
    kept = x.clone()
    quantizer = Quantizer(affine_qparams(torch.tensor(0.0), torch.tensor(1.0), 8))
    quantizer(x)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)


def test_quantizer_with_caps_is_a_clip_on_its_steps():
    cap = torch.tensor([1.0, 2.5, 9.0, float("inf")])
    x = torch.randn(3, 4, 16, 16) * 4
    quantizer = Quantizer(affine_qparams(torch.tensor(0.0), torch.tensor(6.0), 8), cap)
    on_steps = (cap / quantizer.scale).round() * quantizer.scale
    expected = fake_quantize(Clip(0.0, on_steps)(x), quantizer.qparams)
    torch.testing.assert_close(quantizer(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_signed_grid_is_symmetric_and_equals_torchs(bits):
    qparams = activation_qparams(torch.tensor(-1.3), torch.tensor(2.9), bits, signed=True)
    assert int(qparams.zero_point) == 0 and qparams.bits == bits and qparams.quant_min == -(2 ** (bits - 1))
    assert float(qparams.scale) == pytest.approx(2.9 / (2 ** (bits - 1) - 1))
    x = torch.linspace(-4, 4, 999)
    torch.testing.assert_close(Quantizer(qparams)(x.clone()), fake_quantize(x, qparams), rtol=0, atol=0)


@pytest.mark.parametrize("cap", [None, torch.tensor([1.0, 2.0, 9.0])])
@pytest.mark.parametrize("low", [0.0, -1.0, -9.0])
def test_a_signed_quantizer_cuts_as_the_clip_that_it_stands_for(low, cap):
    qparams = activation_qparams(torch.tensor(0.0), torch.tensor(6.0), 8, signed=True)
    quantizer = Quantizer(qparams, cap, low=low)
    x = torch.randn(4, 3, 5, 5) * 6
    steps = (x / quantizer.scale).round().clamp(-128, 127)
    steps = steps.clamp(min=round(max(low / quantizer.scale, -128)))
    if cap is not None:
        steps = steps.minimum((cap / quantizer.scale).round().clamp(max=127).view(1, 3, 1, 1))
    torch.testing.assert_close(quantizer(x), steps * quantizer.scale)
    assert quantizer.rectifies == (low > -6.05)
