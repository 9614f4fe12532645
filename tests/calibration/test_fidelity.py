"""Fidelity of a quantized network to its float one."""

import pytest
import torch
from networks import SPEC
from torch import nn

from utils.calibration.fidelity import fidelity
from utils.graph.capture import capture


def test_fidelity_measures_a_known_noise():
    first = capture(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 24 * 24, 3)), SPEC)
    second = capture(first, SPEC)
    images = SPEC.probe(20)
    same = fidelity(first, second, images)
    assert same.agreement == 100 and same.output > 200
    second.get_submodule("0").weight.mul_(1.1)
    second.get_submodule("0").bias.mul_(1.1)
    near = fidelity(first, second, images)
    assert near.layers["0"] == pytest.approx(20, abs=0.01)  # a tenth of the amplitude
    assert near.report(20, verbose=True).count("dB") == 2 + 1 + 2


def test_classes_of_images_pixels_and_priors():
    assert classes(torch.rand(2, 5)).shape == (2,)
    assert classes(torch.rand(2, 5, 8, 9)).shape == (2, 8, 9)
    assert classes(torch.rand(2, 300, 5)).shape == (2, 300)
