"""SSD-Lite, its checkpoints, its priors, and other detectors that can be built."""

import math

import pytest
import torch
import torch.nn.functional as F
from networks import randomise
from torch import Tensor, nn

from modeling import build_model
from modeling.detection import RawHeads, box_coder, build_detector
from modeling.mobilenet_v2 import to_torchvision_layout
from modeling.ssd_lite import SSDLite, ssd_coder, ssd_lite
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision
from utils.graph.capture import capture
from utils.tasks.boxes import PriorSpec
from utils.tasks.detection import count_classes

SPEC = InputSpec(size=(64, 64), resize=64)
CLASSES = 3  # background included


STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
WIDTHS = (8, 8, 8, 16, 24, 40, 80)  # of the stages at width 0.25
EXTRAS = ((12, 24), (6, 16), (8, 16), (4, 8))


def upstream_tensors() -> dict[str, Tensor]:
    """A random checkpoint of width 0.25 with the names and shapes of qfgaohao's mb2-ssd-lite."""
    tensors = {}

    def conv(name: str, outputs: int, inputs: int, kernel: int, bias: bool = False) -> None:
        tensors[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel) * (inputs * kernel**2) ** -0.5
        if bias:
            tensors[f"{name}.bias"] = torch.randn(outputs) * 0.3

    def norm(name: str, size: int) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.rand(size) + 0.5, torch.randn(size) * 0.3
        tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"] = (
            torch.randn(size) * 0.3,
            torch.rand(size) + 0.5,
        )

    def residual(name: str, inputs: int, hidden: int, outputs: int) -> None:
        first = 0 if hidden == inputs else 3
        if first:
            conv(f"{name}.conv.0", hidden, inputs, 1)
            norm(f"{name}.conv.1", hidden)
        conv(f"{name}.conv.{first}", hidden, 1, 3)
        norm(f"{name}.conv.{first + 1}", hidden)
        conv(f"{name}.conv.{first + 3}", outputs, hidden, 1)
        norm(f"{name}.conv.{first + 4}", outputs)

    conv("base_net.0.0", 8, 3, 3)
    norm("base_net.0.1", 8)
    inputs, index = 8, 1
    for (expansion, _, count, _), outputs in zip(STAGES, WIDTHS, strict=True):
        for _ in range(count):
            residual(f"base_net.{index}", inputs, inputs * expansion, outputs)
            inputs, index = outputs, index + 1
    conv("base_net.18.0", 1280, 80, 1)
    norm("base_net.18.1", 1280)
    channels = [24 * 6, 1280]
    for i, (hidden, outputs) in enumerate(EXTRAS):
        residual(f"extras.{i}", channels[-1], hidden, outputs)
        channels.append(outputs)
    for kind, values in (("classification", CLASSES), ("regression", 4)):
        for i, inputs in enumerate(channels[:-1]):
            head = f"{kind}_headers.{i}"
            conv(f"{head}.0", inputs, 1, 3, bias=True)
            norm(f"{head}.1", inputs)
            conv(f"{head}.3", 6 * values, inputs, 1, bias=True)
        conv(f"{kind}_headers.5", 6 * values, channels[-1], 1, bias=True)
    return tensors


def upstream_forward(tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The heads by plain functions from a checkpoint's tensors: an independent statement of the network."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = tensors[f"{name}.weight"]
        return F.conv2d(
            x, weight, tensors.get(f"{name}.bias"), stride, weight.shape[2] // 2, groups=x.shape[1] // weight.shape[1]
        )

    def norm(x: Tensor, name: str) -> Tensor:
        return F.batch_norm(
            x, *(tensors[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        )

    def residual(x: Tensor, name: str, stride: int) -> tuple[Tensor, Tensor]:
        y, first = x, 0
        if f"{name}.conv.6.weight" in tensors:
            y, first = F.relu6(norm(conv(x, f"{name}.conv.0"), f"{name}.conv.1")), 3
        expanded = y
        y = F.relu6(norm(conv(y, f"{name}.conv.{first}", stride), f"{name}.conv.{first + 1}"))
        y = norm(conv(y, f"{name}.conv.{first + 3}"), f"{name}.conv.{first + 4}")
        return (x + y if stride == 1 and x.shape == y.shape else y), expanded

    x, index, maps = F.relu6(norm(conv(x, "base_net.0.0", 2), "base_net.0.1")), 1, []
    for _, _, count, stride in STAGES:
        for i in range(count):
            x, expanded = residual(x, f"base_net.{index}", stride if i == 0 else 1)
            if index == 14:
                maps.append(expanded)
            index += 1
    maps.append(F.relu6(norm(conv(x, "base_net.18.0"), "base_net.18.1")))
    for i in range(4):
        maps.append(residual(maps[-1], f"extras.{i}", 2)[0])
    heads = []
    for kind, values in (("classification", CLASSES), ("regression", 4)):
        rows = []
        for i, x in enumerate(maps):
            name = f"{kind}_headers.{i}"
            if i < 5:
                x, name = F.relu6(norm(conv(x, f"{name}.0"), f"{name}.1")), f"{name}.3"
            rows.append(conv(x, name).permute(0, 2, 3, 1).reshape(len(x), -1, values))
        heads.append(torch.cat(rows, 1))
    return tuple(heads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[str, dict[str, Tensor]]:
    torch.manual_seed(1)
    path, tensors = tmp_path_factory.mktemp("weights") / "mb2-ssd-lite.pth", upstream_tensors()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}, path)
    return str(path), tensors


def test_a_qfgaohao_checkpoint_loads_as_it_is_and_gives_the_same_heads(checkpoint):
    path, tensors = checkpoint
    network = build_model("ssd_lite_mobilenet_v2", path, build_detector)
    images = torch.randn(2, 3, 96, 96)
    for heads, expected in zip(network.model(images), upstream_forward(tensors, images), strict=True):
        torch.testing.assert_close(heads, expected, rtol=1e-4, atol=1e-4)
    assert network.model.classes == CLASSES
    assert network.spec.size == (300, 300)
    low, high = network.spec.range()
    assert (low, high) == pytest.approx((-127 / 128, 1))
    assert len(box_coder(network.model, network.spec).priors) == 3000


def test_a_checkpoint_of_another_network_is_refused_by_name(checkpoint, tmp_path):
    tensors = dict(checkpoint[1])
    tensors["extra.weight"] = tensors.pop("extras.2.conv.4.bias")
    torch.save(tensors, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"1 missing \(extras.2.conv.1.1.bias\); 1 unexpected \(extra.weight\)"):
        build_model("ssd_lite_mobilenet_v2", str(tmp_path / "other.pth"), build_detector)


def test_blocks_are_renamed_wherever_they_stand():
    names = to_torchvision_layout(upstream_tensors())
    assert {
        "base_net.1.conv.0.0.weight",
        "base_net.1.conv.2.bias",
        "extras.3.conv.1.1.running_var",
        "classification_headers.0.3.bias",
    } <= names.keys()
    assert to_torchvision_layout(names) == names
    assert ssd_lite(names).state_dict().keys() - names.keys() == {
        key for key in ssd_lite(names).state_dict() if key.endswith("num_batches_tracked")
    }


def test_the_traced_network_has_the_tap_as_one_value_with_three_readers():
    model = randomise(SSDLite(CLASSES, width=0.25, extras=EXTRAS))
    traced = capture(model, SPEC)
    images = SPEC.probe()
    for heads, expected in zip(traced(images), model(images), strict=True):
        torch.testing.assert_close(heads, expected)
    readers = [
        node
        for node in traced.graph.nodes
        if node.target in {f"{kind}_headers.0.0" for kind in ("classification", "regression")}
    ]
    tap = readers[0].args[0]
    assert readers[1].args[0] is tap
    assert {user.target for user in tap.users} == {"base_net.14.conv.1.0", *(reader.target for reader in readers)}
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert len(called) == len(set(called))


def test_a_smaller_network_has_the_priors_of_its_own_maps():
    priors = PriorSpec(strides=(16, 32, None), scales=(0.15, 0.3, 0.6, 1.0), ratios=(2.0,))
    model = SSDLite(CLASSES, width=0.25, extras=((8, 16),), priors=priors).eval()
    for size in ((96, 96), (100, 130)):
        scores, offsets = model(torch.randn(1, 3, *size))
        assert scores.shape[1:] == (len(model.coder(size).priors), CLASSES)
        assert offsets.shape[1:] == (len(model.coder(size).priors), 4)
    with pytest.raises(ValueError, match="2 feature maps, but priors for 3"):
        SSDLite(CLASSES, width=0.25, extras=(), priors=priors)


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "ssd300_vgg16"])
def test_torchvisions_detectors_give_what_torchvision_gives(name):
    ssd = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, num_classes=CLASSES).eval()
    size = ssd.transform.fixed_size[::-1]
    wrapped = RawHeads(ssd).eval()
    images = torch.rand(1, 3, *size)
    maps = list(ssd.backbone(images).values())
    for heads, key in zip(torch.fx.symbolic_trace(wrapped)(images), ("cls_logits", "bbox_regression"), strict=True):
        torch.testing.assert_close(heads, ssd.head(maps)[key])

    coder = wrapped.coder(size)
    logits, offsets = (
        torch.randn(1, len(coder.priors), CLASSES) * 2 + torch.tensor([5.0, 0, 0]),
        torch.randn(1, len(coder.priors), 4),
    )
    anchors = ssd.anchor_generator(torchvision.models.detection.image_list.ImageList(images, [size]), maps)
    expected = ssd.postprocess_detections({"cls_logits": logits, "bbox_regression": offsets}, anchors, [size])[0]
    found = coder.detect((logits, offsets))[0]
    torch.testing.assert_close(found.boxes * size[0], expected["boxes"], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.scores, expected["scores"])
    assert found.labels.equal(expected["labels"])


def test_a_torchvision_checkpoint_says_how_many_classes(tmp_path):
    ssd = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)
    torch.save(ssd.state_dict(), tmp_path / "ssdlite.pth")
    network = build_model("torchvision:ssdlite320_mobilenet_v3_large", str(tmp_path / "ssdlite.pth"), build_detector)
    assert network.model(torch.zeros(1, 3, 320, 320))[0].shape[-1] == 5
    assert (network.spec.mean, network.spec.std) == ((0.5,) * 3, (0.5,) * 3)


def small_detector() -> nn.Module:
    return SSDLite(2, width=0.25, extras=EXTRAS)


def classifier() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ssd_lite_mobilenet", "did you mean ssd_lite_mobilenet_v2"),
        ("torchvision:fasterrcnn_resnet50_fpn", "finds boxes inside the network.*torchvision:ssd300_vgg16"),
        ("torchvision:ssd300", "did you mean ssd300_vgg16"),
    ],
)
def test_a_model_that_is_no_detector_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        build_model(name, None, build_detector)


def test_a_network_that_returns_no_heads_is_refused():
    network = build_model(f"{__name__}:classifier", None, build_detector)
    with pytest.raises(
        UserError, match=r"returns output \(1, 2\); a detector must return class logits \[N, 3000, classes\]"
    ):
        count_classes(network.model, network.spec, box_coder(network.model, network.spec))


def test_the_users_own_detector_brings_its_coder():
    network = build_model(f"{__name__}:small_detector", None, build_detector)
    assert len(box_coder(network.model, network.spec).priors) == 3000


# --------------------------------------------------------------------------------- priors, coding


def test_the_standard_priors():
    priors = ssd_coder(PriorSpec(), (300, 300)).priors
    assert priors.shape == (3000, 4)
    maps = (
        (19, 16, 60, 105),
        (10, 32, 105, 150),
        (5, 64, 150, 195),
        (3, 100, 195, 240),
        (2, 150, 240, 285),
        (1, 300, 285, 330),
    )
    expected = []
    for cells, shrink, low, high in maps:
        shapes = [(low, low), (math.sqrt(low * high),) * 2]
        for ratio in (2, 3):
            shapes += [
                (low * math.sqrt(ratio), low / math.sqrt(ratio)),
                (low / math.sqrt(ratio), low * math.sqrt(ratio)),
            ]
        for y in range(cells):
            for x in range(cells):
                expected += [((x + 0.5) * shrink, (y + 0.5) * shrink, *shape) for shape in shapes]
    torch.testing.assert_close(priors, (torch.tensor(expected) / 300).clamp(0, 1))
    torch.testing.assert_close(priors[1], torch.tensor([8, 8, math.sqrt(60 * 105), math.sqrt(60 * 105)]) / 300)
    torch.testing.assert_close(priors[6 * 19 + 2], torch.tensor([8, 24, 60 * math.sqrt(2), 60 / math.sqrt(2)]) / 300)
    assert priors[6 * 361 + 6 * 9, 0] == 1  # 9.5 * 32 = 304: cut at the border
