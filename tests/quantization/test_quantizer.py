"""The module that quantizes activations, against torch's own kernels."""

import pytest
import torch

from utils.graph.layers import Clip
from utils.quantization.qparams import affine_qparams, fake_quantize
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
