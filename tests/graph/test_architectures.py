"""The passes on the architectures that people have: exact on every one, or refused with a reason."""

from dataclasses import replace
from itertools import groupby

import pytest
import torch
from networks import randomise
from torch import nn

from dfq import quantize_data_free
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision
from utils.graph.capture import capture
from utils.passes.exactness import deviation, probed_outputs
from utils.quantization.recipe import Recipe

models = torchvision.models


def resnext() -> nn.Module:
    return models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4)


def densenet() -> nn.Module:
    return models.DenseNet(8, (2, 2, 2), 16)


def vgg(batch_norm: bool) -> nn.Module:
    """Its features, and one linear layer instead of three large ones."""
    features = models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm=batch_norm)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 512, 10))


def alexnet() -> nn.Module:
    model = models.AlexNet()
    model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(256 * 6 * 6, 32), nn.ReLU(inplace=True), nn.Linear(32, 10))
    return model


def shortened(model: nn.Module, most: int = 1) -> nn.Module:
    """A network whose stages have at most so many blocks of a kind in a row: the tenth has nothing that is new."""
    for stage in (module for module in model.modules() if isinstance(module, nn.Sequential)):
        for _, row in groupby(list(stage.named_children()), lambda child: str(child[1])):
            for name, _ in list(row)[most:]:
                delattr(stage, name)
    return model


def inception(model: nn.Module, *left_out: str) -> nn.Module:
    """A network of blocks by name, without those of a kind that others are of too."""
    for name in left_out:
        setattr(model, name, nn.Identity())
    return model


def googlenet() -> nn.Module:
    model = models.googlenet(init_weights=False, aux_logits=False, transform_input=True)
    return inception(model, "inception4b", "inception4c", "inception5a")


def inception_v3() -> nn.Module:
    model = models.inception_v3(init_weights=False, aux_logits=False, transform_input=True)
    return inception(model, "Mixed_5d", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7c")


# The smallest of each family that has all of its parts, and the side of its input.
WITH_BATCHNORM = {
    "vgg11_bn": (lambda: vgg(True), 64),
    "resnet18": (models.resnet18, 64),
    "resnext": (resnext, 64),
    "densenet": (densenet, 64),
    "googlenet": (googlenet, 64),
    "inception_v3": (inception_v3, 96),
    "mobilenet_v2": (models.mobilenet_v2, 64),
    "mobilenet_v3_small": (lambda: shortened(models.mobilenet_v3_small()), 64),
    "mnasnet0_5": (lambda: shortened(models.mnasnet0_5()), 64),
    "shufflenet_v2_x0_5": (lambda: shortened(models.shufflenet_v2_x0_5()), 64),
    "efficientnet_b0": (lambda: shortened(models.efficientnet_b0(stochastic_depth_prob=0.0)), 64),
    "regnet_y_400mf": (lambda: shortened(models.regnet_y_400mf()), 64),
}
WITHOUT_BATCHNORM = {
    "alexnet": (alexnet, 80),
    "vgg11": (lambda: vgg(False), 64),
    "squeezenet1_1": (models.squeezenet1_1, 64),
    "convnext_tiny": (lambda: shortened(models.convnext_tiny(stochastic_depth_prob=0.0), 2), 64),
}
ALL = WITH_BATCHNORM | WITHOUT_BATCHNORM
EXACT = Recipe(equalize=True)


@pytest.fixture(scope="module")
def taken(request: pytest.FixtureRequest):
    """A network with random statistics, its input and its graph, and what becomes of it: quantized where it has BatchNorm,
    otherwise as exact passes leave it. All tests of one come in a row."""
    build, side = ALL[request.param]
    torch.manual_seed(0)
    model, spec = randomise(build()), InputSpec(size=(side, side))
    graph = capture(model, spec)
    recipe = replace(EXACT, quantize=True, correction=True) if request.param in WITH_BATCHNORM else EXACT
    return model, spec, graph, quantize_data_free(model, spec, recipe, captured=graph)


@pytest.mark.parametrize("taken", ALL, indirect=True)
def test_exact_passes_keep_the_output(taken):
    """quantize_data_free checks each pass against its probe; this checks all of them on other images."""
    model, spec, _, result = taken
    images = spec.probe(3, seed=11)
    assert deviation(probed_outputs(model, images), result.float, images) < 1e-4
    counts = result.log.counts()
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert counts.get("folded BatchNorm", {"applied": 0})["applied"] == norms
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    alone = sum(entry.detail == "stands alone" for entry in result.log.entries)  # BatchNorms that became layers
    assert counts["found layers"]["applied"] == layers + alone
    told = {entry.where.partition(" -> ")[0] for entry in result.log.entries if entry.action == "equalized"}
    assert {entry.where for entry in result.log.entries if entry.action == "found layers"} <= told


@pytest.mark.parametrize("taken", WITH_BATCHNORM, indirect=True)
def test_every_layer_is_quantized(taken):
    _, spec, _, result = taken
    counts = result.log.counts()
    found = counts["found layers"]["applied"]
    for action in ("quantized weights", "corrected biases", "quantized biases"):
        assert counts[action] == {"applied": found, "skipped": 0}
    assert result.simulated(spec.probe()).isfinite().all()


@pytest.mark.parametrize("taken", WITHOUT_BATCHNORM, indirect=True)
def test_networks_without_statistics_are_refused(taken):
    model, spec, graph, _ = taken
    with pytest.raises(UserError, match="no BatchNorm"):
        quantize_data_free(model, spec, Recipe(quantize=True), captured=graph)
