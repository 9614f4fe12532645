"""Networks of segmentation_models_pytorch: by name, with a checkpoint's classes, quantized whole."""

import pytest
import torch
from networks import settle
from torch import nn

from dfq import quantize_data_free
from modeling import build_model
from modeling.segmentation import build_segmenter
from utils.backends.onnxruntime.export import export
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.networks import scored
from utils.quantization.recipe import Recipe

SPEC = InputSpec(size=(64, 96), resize=64)


@pytest.fixture(scope="module")
def unet(tmp_path_factory) -> tuple[nn.Module, str]:
    """A Unet on ResNet18 with random weights for five classes, and its state dict in a file."""
    reason = "needs segmentation_models_pytorch, an extra (docs/libraries.md)"
    smp = pytest.importorskip("segmentation_models_pytorch", reason=reason)
    torch.manual_seed(0)
    model = settle(smp.Unet("resnet18", encoder_weights=None, classes=5), SPEC, 4)
    file = tmp_path_factory.mktemp("smp") / "unet.pth"
    torch.save(model.state_dict(), file)
    return model, str(file)


def test_a_network_is_built_for_its_checkpoint(unet):
    model, weights = unet
    network = build_model("smp:unet/resnet18", weights, build_segmenter)
    assert network.spec.size == (512, 512)
    images = SPEC.probe(1)
    torch.testing.assert_close(network.model(images), model(images))
    assert scored(network.model, SPEC, 4) is network.model


def test_it_is_quantized_whole_and_exported(unet, tmp_path):
    network = build_model("smp:Unet/resnet18", unet[1], build_segmenter)
    quantized = quantize_data_free(network.model, SPEC, Recipe(equalize=True, quantize=True, correction=True))
    layers = [layer for layer in quantized.simulated.modules() if isinstance(layer, nn.Conv2d)]
    assert len(layers) == 31 and all(layer.weight_qparams is not None for layer in layers)
    exported = export(quantized, SPEC, tmp_path / "unet.onnx", {}, SPEC.probe(1))
    assert sum(layer.far + layer.off for layer in exported.parity.layers) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smp:unets/resnet18", r"unknown architecture 'unets' \(did you mean unet"),
        ("smp:unet/resnet17", r"unknown encoder 'resnet17' \(did you mean resnet1"),
        ("smp:unet", "unknown encoder ''; write smp:unet/ENCODER"),
        ("smp:unet/tu-nothing", "builds no unet on 'tu-nothing'"),
        ("smp:fpn/resnet18", "does not fit this network"),
    ],
)
def test_a_name_that_the_library_does_not_know_is_one_line(unet, name, message):
    with pytest.raises(UserError, match=message) as error:
        build_model(name, unet[1], build_segmenter)
    assert "\n" not in str(error.value)
