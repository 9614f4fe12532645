"""Fidelity of a quantized network to its float one."""

import pytest
import torch
from networks import SPEC
from torch import nn

from utils.calibration.fidelity import fidelity
from utils.graph.capture import capture
from utils.graph.nodes import weighted_nodes
from utils.quantization.qparams import affine_qparams
from utils.quantization.quantizer import Quantizer


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


def test_saturation_is_the_share_of_values_beyond_a_range():
    model = capture(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 24 * 24, 3)), SPEC)
    quantized, images = capture(model, SPEC), SPEC.probe(20)
    layer = weighted_nodes(quantized)[0]
    clip = next(iter(layer.users))
    values = model.get_submodule(layer.target)(images).relu()
    top = float(values.max()) / 2
    quantized.set_submodule(clip.target, Quantizer(affine_qparams(torch.tensor(0.0), torch.tensor(top), 8)))
    expected = 100 * float((values > top * 255.5 / 255).float().mean())
    near = fidelity(model, quantized, images)
    assert near.saturation == {clip.name: pytest.approx(expected, rel=0.02)} and expected > 0.01
    assert f"cut, at 1 of 1 tensors: {clip.name}" in near.report(20, verbose=False)
