"""The passes on the whole networks of segmentation and detection."""

import copy
from functools import cache

import pytest
import torch
from networks import randomise, settle, sqnr

from dfq import Recipe, quantize_data_free
from modeling.deeplab import DeepLab
from modeling.segmentation import Logits
from modeling.ssd_lite import SSDLite
from utils.backends.lowering import lower_to_integers
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision
from utils.graph.capture import capture
from utils.graph.regions import find_regions
from utils.passes.exactness import deviation, probed_outputs, rounding_noise
from utils.passes.fold_batchnorm import fold_batchnorm
from utils.passes.log import PassLog
from utils.quantization.quantizer import Quantizer

SPEC = InputSpec(size=(96, 128))


def deeplab():
    return DeepLab(classes=4, width=0.25, channels=16, reduced=8)


def ssd_lite():
    return SSDLite(classes=3, width=0.25)


def torchvision_segmenter():
    options = {"weights": None, "weights_backbone": None, "num_classes": 4}
    return Logits(torchvision.models.segmentation.lraspp_mobilenet_v3_large(**options))


NETWORKS = {"deeplab": deeplab, "ssd_lite": ssd_lite, "lraspp": torchvision_segmenter}


@pytest.fixture(scope="module", params=NETWORKS)
def quantized(request):
    """A network with the statistics of random images, and what becomes of it. All tests of one come in a row."""
    torch.manual_seed(0)
    model = settle(randomise(NETWORKS[request.param]()), SPEC, images=64)
    recipe = Recipe(equalize=True, quantize=True, correction=True)
    return model, quantize_data_free(model, SPEC, recipe, captured=captured(model))


@cache
def captured(model):
    """The graph of a network, to be copied."""
    return capture(model, SPEC)


def test_exact_passes_keep_every_output(quantized):
    model, result = quantized
    images = SPEC.probe(2, seed=9)
    allowed = max(
        1e-4, 10 * rounding_noise(model, images)
    )  # float32's own, which these amplify; AVX-512 sums otherwise
    assert deviation(probed_outputs(model, images), result.float, images) < allowed
    assert result.log.counts()["equalized"]["applied"] >= 15
    assert not [note for note in result.log.notes if "differ by more than 3 times" not in note]  # those are of images


def test_every_layer_is_quantized_and_stays_close(quantized):
    model, result = quantized
    counts = result.log.counts()
    assert (
        counts["quantized weights"]
        == counts["quantized biases"]
        == {"applied": counts["found layers"]["applied"], "skipped": 0}
    )
    images = SPEC.probe(4, seed=7)
    for exact, rounded in zip(
        probed_outputs(model, images),
        probed_outputs(lower_to_integers(result.simulated), images),
        strict=True,
    ):
        assert sqnr(exact, rounded) > 4  # random networks amplify noise; a broken one is at 0 or below


@pytest.mark.parametrize("quantized", ["ssd_lite"], indirect=True)
def test_the_tap_is_equalized_with_all_of_its_sinks(quantized):
    network = copy.deepcopy(captured(quantized[0]))
    fold_batchnorm(network, PassLog())
    sinks = {region.sources: [sink.name for sink in region.sinks] for region in find_regions(network)[0]}
    assert sinks["base_net.14.conv.0.0",] == [
        "base_net.14.conv.1.0",
        "classification_headers.0.0",
        "regression_headers.0.0",
    ]


@pytest.mark.parametrize("quantized", ["deeplab"], indirect=True)
def test_the_pyramids_branches_share_one_grid(quantized):
    _, result = quantized
    scales = {
        name: module.scale
        for name, module in result.simulated.named_modules()
        if isinstance(module, Quantizer) and name.startswith("aspp.aspp")
    }
    assert len(scales) == 4 and len(set(scales.values())) == 1
    assert torch.isfinite(result.simulated(SPEC.probe())).all()
