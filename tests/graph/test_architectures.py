"""The passes on the architectures that people have: exact on every one, or refused with a reason."""

import pytest
import torch
from networks import randomise

from dfq import Recipe, quantize_data_free
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision
from utils.passes.exactness import deviation, outputs_of

# Network and the side of its input; the smallest of each family that has all of its parts.
WITH_BATCHNORM = {
    "vgg11_bn": 64,
    "resnet18": 64,
    "resnet34": 64,
    "resnet50": 64,
    "wide_resnet50_2": 64,
    "resnext50_32x4d": 64,
    "densenet121": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mobilenet_v3_large": 64,
    "mnasnet0_5": 64,
    "mnasnet1_0": 64,
    "shufflenet_v2_x0_5": 64,
    "shufflenet_v2_x1_0": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
}
WITHOUT_BATCHNORM = {"alexnet": 80, "vgg11": 64, "squeezenet1_0": 64, "squeezenet1_1": 64, "convnext_tiny": 64}
OPTIONS = {
    name: {"init_weights": False, "aux_logits": False, "transform_input": True}
    for name in ("googlenet", "inception_v3")
}
EXACT = Recipe(equalize=True)


def build(name):
    return randomise(torchvision.models.get_model(name, **OPTIONS.get(name, {})))


@pytest.mark.parametrize(("name", "side"), (WITH_BATCHNORM | WITHOUT_BATCHNORM).items())
def test_exact_passes_keep_the_output(name, side):
    """quantize_data_free checks each pass against its probe; this checks all of them on other images."""
    spec = InputSpec(size=(side, side))
    model = build(name)
    result = quantize_data_free(model, spec, EXACT)
    images = spec.probe(2, seed=11)
    assert deviation(outputs_of(model, images), result.float, images) < 1e-4
    counts = result.log.counts()
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert counts.get("folded BatchNorm", {"applied": 0})["applied"] == norms
    found = counts["found layers"]["applied"]
    assert counts["equalized"]["applied"] + counts["equalized"]["skipped"] == found


@pytest.mark.parametrize(("name", "side"), WITH_BATCHNORM.items())
def test_every_layer_is_quantized(name, side):
    spec = InputSpec(size=(side, side))
    result = quantize_data_free(build(name), spec, Recipe(quantize=True, correction=True))
    counts = result.log.counts()
    found = counts["found layers"]["applied"]
    for action in ("quantized weights", "corrected biases", "quantized biases"):
        assert counts[action] == {"applied": found, "skipped": 0}
    assert result.simulated(spec.probe()).isfinite().all()


@pytest.mark.parametrize(("name", "side"), WITHOUT_BATCHNORM.items())
def test_networks_without_statistics_are_refused(name, side):
    with pytest.raises(UserError, match="no BatchNorm"):
        quantize_data_free(build(name), InputSpec(size=(side, side)), Recipe(quantize=True))
