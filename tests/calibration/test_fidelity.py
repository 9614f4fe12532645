"""Fidelity of a quantized network to its float one."""

import pytest
from networks import SPEC
from torch import nn

from utils.calibration.fidelity import fidelity
from utils.graph.capture import capture


def test_fidelity_measures_a_known_noise():
    first = capture(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 24 * 24, 3)), SPEC)
    second = capture(first, SPEC)
    images = SPEC.probe(20)
    same = fidelity(first, second, images)
    assert same.output > 200 and min(same.layers.values()) > 200
    second.get_submodule("0").weight.mul_(1.1)
    second.get_submodule("0").bias.mul_(1.1)
    near = fidelity(first, second, images)
    assert near.layers["0"] == pytest.approx(20, abs=0.01)  # a tenth of the amplitude
    assert near.report(20, verbose=True).count("dB") == 2 + 1 + 2
