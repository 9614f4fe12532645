"""Detection: SSD-Lite and its checkpoints, priors and coding, VOC annotations, average precision, pictures."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import randomise
from PIL import Image
from torch import Tensor, nn

from modeling import build_model
from modeling.detection import RawHeads, box_coder, build_detector
from modeling.mobilenet_v2 import to_torchvision_layout
from modeling.ssd_lite import SSDLite, ssd_coder, ssd_lite
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision
from utils.experiment.evaluation import evaluate
from utils.graph.capture import capture
from utils.tasks.boxes import BoxCoder, Detections, Objects, PriorSpec, box_convert
from utils.tasks.data import Batches
from utils.tasks.detection import class_labels, count_classes, read_annotation, stack, voc_detection
from utils.tasks.detection import draw as detection_pictures
from utils.tasks.metrics import RULES, MeanAveragePrecision, match
from utils.tasks.voc import open_voc

CPU = torch.device("cpu")
SPEC = InputSpec(size=(64, 64), resize=64)
LABELS = {"helmet": 1, "head": 2}
CLASSES = 3  # background included

# ------------------------------------------------------------------------------------ checkpoints

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
    with pytest.raises(UserError, match=r"returns \(1, 2\); a detector must return class logits \[N, 3000, classes\]"):
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


def to_corners(boxes: Tensor) -> Tensor:
    return box_convert(boxes, "cxcywh", "xyxy")


def to_centres(boxes: Tensor) -> Tensor:
    return box_convert(boxes, "xyxy", "cxcywh")


def random_boxes(count: int) -> Tensor:
    centre, size = torch.rand(count, 2) * 0.6 + 0.2, torch.rand(count, 2) * 0.35 + 0.04
    return to_corners(torch.cat([centre, size], 1))


def test_offsets_and_boxes_undo_each_other():
    coder = ssd_coder(PriorSpec(), (300, 300))
    boxes = random_boxes(3000)
    torch.testing.assert_close(to_corners(to_centres(boxes)), boxes)
    torch.testing.assert_close(coder.boxes(coder.offsets(boxes)), boxes, rtol=1e-4, atol=1e-5)
    offsets = torch.tensor([1.0, -2.0, 0.5, 0.0]).expand(3000, 4)
    x, y, w, h = coder.priors.unbind(1)
    expected = torch.stack([x + 0.1 * w, y - 0.2 * h, w * math.exp(0.1), h], 1)
    torch.testing.assert_close(to_centres(coder.boxes(offsets)), expected, rtol=1e-4, atol=1e-5)
    assert coder.boxes(torch.full((3000, 4), 1e4)).isfinite().all()


def test_encode_gives_every_object_a_prior_and_detect_finds_it_again():
    coder = ssd_coder(PriorSpec(), (300, 300))
    tiny = torch.tensor([[0.5, 0.5, 0.52, 0.52]])  # overlaps no prior by half
    objects = Objects(
        torch.cat([random_boxes(5), tiny]), torch.tensor([1, 2, 1, 2, 1, 2]), torch.zeros(6, dtype=torch.bool)
    )
    labels, offsets = coder.encode(objects)
    overlaps = torchvision.ops.box_iou(to_corners(coder.priors), objects.boxes)
    assert (labels > 0).sum() >= (overlaps.amax(1) >= 0.5).sum()
    assert (labels[overlaps.amax(1) >= 0.5] > 0).all()
    assert labels[overlaps[:, 5].argmax()] == 2
    found = coder.detect((20 * F.one_hot(labels, CLASSES).float()[None], offsets[None]))[0]
    hits, _ = match(found, objects, 0.99)
    assert hits.sum() == 6

    labels, offsets = coder.encode(
        Objects(torch.empty(0, 4), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.bool))
    )
    assert not labels.any()
    assert offsets.abs().max() < 1e-4


def test_detections_equal_those_of_a_plain_loop():
    priors = to_centres(random_boxes(300))
    coder = BoxCoder(priors, topk_candidates=40, detections_per_img=50)
    logits, offsets = torch.randn(1, 300, 4) * 3, torch.randn(1, 300, 4)
    scores, boxes = logits[0].softmax(-1), coder.boxes(offsets[0])
    expected = []
    for label in (1, 2, 3):
        ranked = sorted((i for i in range(300) if scores[i, label] > 0.01), key=lambda i: -scores[i, label])[:40]
        kept: list[int] = []
        for i in ranked:
            if all(torchvision.ops.box_iou(boxes[i : i + 1], boxes[k : k + 1]) <= 0.45 for k in kept):
                kept.append(i)
        expected += [(float(scores[i, label]), label, i) for i in kept]
    expected = sorted(expected, reverse=True)[:50]
    found = coder.detect((logits, offsets))[0]
    assert found.labels.tolist() == [label for _, label, _ in expected]
    torch.testing.assert_close(found.scores, torch.tensor([score for score, _, _ in expected]))
    torch.testing.assert_close(found.boxes, boxes[[i for _, _, i in expected]])


def test_heads_without_a_score_give_no_detection():
    coder = BoxCoder(to_centres(random_boxes(10)))
    found = coder.detect((torch.tensor([9.0, 0, 0]).expand(1, 10, 3), torch.zeros(1, 10, 4)))[0]
    assert (found.boxes.shape, found.labels.shape, found.scores.shape) == ((0, 4), (0,), (0,))
    broken = coder.detect((torch.full((1, 10, 3), torch.nan), torch.zeros(1, 10, 4)))[0]
    assert not len(broken.labels)


# ------------------------------------------------------------------------------ average precision

LEFT, RIGHT, MIDDLE = [0.0, 0.0, 0.4, 0.4], [0.6, 0.6, 1.0, 1.0], [0.3, 0.3, 0.7, 0.7]


def objects_at(*boxes: list[float], labels: list[int] | None = None, difficult: list[bool] | None = None) -> Objects:
    labels, difficult = labels or [1] * len(boxes), difficult or [False] * len(boxes)
    return Objects(
        torch.tensor(boxes).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.long),
        torch.tensor(difficult, dtype=torch.bool),
    )


def found_at(*scored: tuple[float, list[float]], label: int = 1) -> Detections:
    scored = sorted(scored, key=lambda pair: -pair[0])
    boxes = torch.tensor([box for _, box in scored]).reshape(-1, 4)
    return Detections(boxes, torch.full((len(scored),), label), torch.tensor([score for score, _ in scored]))


def average_precision(*images: tuple[Detections, Objects]) -> dict[str, float]:
    metric = MeanAveragePrecision(LABELS, BoxCoder(torch.empty(0, 4)))
    for found, objects in images:
        metric.add(found, objects)
    return metric.compute() | metric.per_class()


def test_average_precision_of_a_case_worked_by_hand():
    scores = average_precision(
        (found_at((0.9, LEFT), (0.6, LEFT), (0.7, RIGHT)), objects_at(LEFT, RIGHT)),  # 0.6 is a duplicate
        (found_at((0.8, MIDDLE)), objects_at(LEFT)),
    )
    # hit, miss, hit, miss of 3 objects: precision 1, 1/2, 2/3, 1/2 at recall 1/3, 1/3, 2/3, 2/3
    assert scores["map_voc07"] == pytest.approx(100 * (4 * 1 + 3 * 2 / 3) / 11)
    assert scores["map_voc12"] == scores["helmet"] == pytest.approx(100 * (1 + 2 / 3) / 3)
    assert "head" not in scores  # no object of the class: it has no precision and stays out of the mean


def test_difficult_objects_neither_count_nor_hurt():
    plain = average_precision((found_at((0.8, LEFT), (0.7, MIDDLE)), objects_at(LEFT)))
    found = found_at((0.9, RIGHT), (0.85, RIGHT), (0.8, LEFT), (0.7, MIDDLE))
    assert average_precision((found, objects_at(LEFT, RIGHT, difficult=[False, True]))) == plain
    assert average_precision((found, objects_at(LEFT)))["map_voc12"] == pytest.approx(100 / 3)


def test_equal_scores_count_in_the_order_of_the_images():
    hit, miss = (found_at((0.5, LEFT)), objects_at(LEFT)), (found_at((0.5, MIDDLE)), objects_at())
    assert average_precision(hit, miss)["map_voc12"] == 100
    assert average_precision(miss, hit)["map_voc12"] == 50


def test_no_detection_scores_nothing_and_no_object_is_an_error():
    nothing = found_at()
    assert average_precision((nothing, objects_at(LEFT)))["map_voc12"] == 0
    assert average_precision((nothing, objects_at(LEFT)))["map_voc07"] == 0
    for objects in (objects_at(), objects_at(LEFT, difficult=[True])):
        with pytest.raises(UserError, match="no object that counts"):
            average_precision((found_at((0.9, LEFT)), objects))


def test_the_mean_is_over_the_classes_that_are_there():
    scores = average_precision((found_at((0.9, LEFT)), objects_at(LEFT, RIGHT, labels=[1, 2])))
    assert (scores["helmet"], scores["head"], scores["map_voc12"]) == (100, 0, 50)


def test_half_an_overlap_is_no_match():
    whole, half, more = [0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.25, 0.5], [0.0, 0.0, 0.26, 0.5]
    assert average_precision((found_at((0.9, half)), objects_at(whole)))["map_voc12"] == 0
    assert average_precision((found_at((0.9, more)), objects_at(whole)))["map_voc12"] == 100


@pytest.mark.parametrize("hits", range(11))
def test_recall_reaches_its_eleven_points_exactly(hits):
    found = torch.ones(hits, dtype=torch.bool)
    assert RULES["voc07"](found, torch.tensor(10)) == pytest.approx(
        (hits + 1) / 11 if hits else 0
    )  # 3 of 10 is recall 0.3, whatever floats say
    assert RULES["voc12"](found, torch.tensor(10)) == pytest.approx(hits / 10)


def test_matching_equals_a_plain_loop():
    for seed in range(20):
        torch.manual_seed(seed)
        objects = Objects(random_boxes(12), torch.randint(1, 3, (12,)), torch.rand(12) < 0.3)
        near = objects.boxes.repeat(4, 1) + torch.randn(48, 4) * 0.03
        found = Detections(near, objects.labels.repeat(4), torch.rand(48).sort(descending=True).values)
        taken, hits, neutral = set(), [], []
        for box, label in zip(found.boxes, found.labels, strict=True):
            overlaps = torchvision.ops.box_iou(box[None], objects.boxes)[0] * (objects.labels == label)
            best = int(overlaps.argmax())
            matched = bool(overlaps[best] > 0.5)
            neutral.append(matched and bool(objects.difficult[best]))
            hits.append(matched and not neutral[-1] and best not in taken)
            taken |= {best} if matched else set()
        assert [part.tolist() for part in match(found, objects)] == [hits, neutral]


def test_curves_and_shifts():
    coder = BoxCoder(torch.tensor([[0.2, 0.2, 0.4, 0.4], [0.8, 0.8, 0.4, 0.4]]))
    first = MeanAveragePrecision(LABELS, coder)
    second = MeanAveragePrecision(LABELS, coder, reference=first)
    heads = (torch.tensor([[[0.0, 9.0, 0.0], [0.0, 3.0, 0.0]]]), torch.zeros(1, 2, 4))
    moved = (heads[0], torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]]]))
    for metric, output in ((first, heads), (second, moved)):
        metric.update(output, [objects_at(LEFT, RIGHT)])
    curve = first.curves()["helmet"]
    assert (curve.precision.tolist(), curve.recall.tolist()) == ([1, 1], [0.5, 1])
    scores = second.compute()
    assert (scores["score_shift_mean"], scores["box_shift_mean"], scores["box_shift_p99"]) == pytest.approx(
        (0, 1, 2), abs=1e-4
    )
    assert not any("shift" in name for name in first.compute())


# ------------------------------------------------------------------------------------ annotations


def annotation(*objects: str, size: str = "<size><width>200</width><height>100</height></size>") -> str:
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def entry(name: str = "helmet", box: tuple = (1, 1, 101, 51), difficult: int = 0) -> str:
    corners = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


@pytest.fixture
def voc(tmp_path) -> Path:
    """A VOC folder of four pictures, 200x100, with an annotation each."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    names = [f"{i:06d}" for i in range(4)]
    for i, name in enumerate(names):
        Image.new("RGB", (200, 100), (60 * i, 80, 200)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        (tmp_path / "Annotations" / f"{name}.xml").write_text(
            annotation(entry(), entry("head", (11, 11, 41, 91), i % 2))
        )
    (tmp_path / "ImageSets/Main/val.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "labels.txt").write_text("helmet,head")
    return tmp_path


def open_samples(folder: Path, outputs: int = CLASSES):
    return voc_detection(open_voc(str(folder), "Main"), SPEC, outputs)


def test_images_are_squeezed_and_boxes_are_fractions(voc):
    samples, labels = open_samples(voc)
    assert labels == LABELS
    image, objects = samples[1]
    assert image.shape == (3, 64, 64)
    torch.testing.assert_close(
        image * torch.tensor(SPEC.std)[:, None, None] + torch.tensor(SPEC.mean)[:, None, None],
        image.new_tensor([60, 80, 200])[:, None, None].expand(3, 64, 64) / 255,
        atol=0.01,
        rtol=0,
    )
    torch.testing.assert_close(
        objects.boxes, torch.tensor([[0, 0, 0.5, 0.5], [0.05, 0.1, 0.2, 0.9]])
    )  # VOC counts from 1
    assert objects.labels.tolist() == [1, 2]
    assert objects.difficult.tolist() == [False, True]


def test_an_image_without_objects_is_one(voc):
    (voc / "Annotations/000002.xml").write_text(annotation())
    samples, _ = open_samples(voc)
    images, objects = stack([samples[1], samples[2]])
    assert images.shape == (2, 3, 64, 64)
    assert [len(image.labels) for image in objects] == [2, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><size>", "'.*000001.xml' is no valid XML: "),
        ("", "is no valid XML: "),
        (annotation(entry(), entry("hat")), r"object 2 \(hat\): unknown class; the classes are helmet, head"),
        (annotation("<object><bndbox/></object>"), r"object 1 \(without a name\): unknown class"),
        (annotation("<object><name>head</name></object>"), r"object 1 \(head\): no <bndbox> with numbers"),
        (annotation(entry(box=(1, 1, "nan", 9))), "no <bndbox> with numbers"),
        (annotation(entry(box=(51, 1, 51, 51))), r"object 1 \(helmet\): box 51, 1, 51, 51 .* is empty"),
        (annotation(entry(box=(201, 1, 201, 51))), "is empty"),
        (annotation(entry(box=(1, 1, 300, 51))), "reaches outside the image of 200x100"),
        (annotation(entry(box=(-5, 1, 100, 51))), "reaches outside the image"),
    ],
)
def test_a_bad_annotation_is_named(voc, text, message):
    (voc / "Annotations/000001.xml").write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        open_samples(voc)
    assert "000001.xml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_box_at_the_border_is_no_mistake_whatever_pixels_are_counted_from(tmp_path):
    file = tmp_path / "edge.xml"
    for box in ((0, 0, 199, 99), (1, 1, 200, 100), (0, 0, 200, 100)):
        file.write_text(annotation(entry(box=box)))
        read = read_annotation(file, LABELS)
        assert read.size == (200, 100)
        assert len(read.objects.labels) == 1


def test_what_else_is_missing_is_named(voc):
    with pytest.raises(UserError, match="network has 21 outputs, background included, but the data have 2 classes"):
        open_samples(voc, 21)
    (voc / "JPEGImages/000003.jpg").unlink()
    with pytest.raises(UserError, match="'000003'"):
        open_samples(voc)
    (voc / "ImageSets/Main/val.txt").write_text("\n")
    with pytest.raises(UserError, match="split 'val' is empty"):
        open_samples(voc)
    (voc / "ImageSets/Main/val.txt").write_text("000000\n")
    (voc / "Annotations/000000.xml").write_text(annotation(entry(difficult=1)))
    with pytest.raises(UserError, match=r"split 'val' of .* holds no object that counts"):
        open_samples(voc)
    (voc / "Annotations/000000.xml").unlink()
    with pytest.raises(UserError, match=r"000000\.xml"):
        open_samples(voc)


def test_a_picture_of_another_size_than_its_annotation_says_is_not_scored(voc):
    Image.new("RGB", (100, 200)).save(voc / "JPEGImages/000001.jpg")
    samples, labels = open_samples(voc)
    model = randomise(small_detector_of(CLASSES))
    metric = MeanAveragePrecision(labels, model.coder(SPEC.size))
    with pytest.raises(UserError, match=r"000001\.jpg \(it is 100x200, its annotation says 200x100"):
        evaluate({"fp32": model}, Batches(samples, 2, 0, 0, stack), {"fp32": metric}, CPU)


def test_outputs_of_a_network_trained_on_coco_are_found_by_name():
    assert class_labels(("person", "sofa", "tvmonitor"), 91) == {"person": 1, "sofa": 63, "tvmonitor": 72}
    with pytest.raises(UserError, match="does not know helmet"):
        class_labels(("person", "helmet"), 91)
    assert class_labels(("BACKGROUND", "helmet", "head"), 3) == LABELS


# ----------------------------------------------------------------------------------- the whole way


def small_detector_of(classes: int) -> SSDLite:
    return SSDLite(classes, width=0.25, extras=EXTRAS)


def test_evaluation_pictures_and_curves(voc, tmp_path):
    samples, labels = open_samples(voc)
    model = randomise(small_detector_of(CLASSES))
    coder = replace(model.coder(SPEC.size), score_thresh=0.3)
    networks = {"FP32": model, "INT8": capture(model, SPEC)}
    metrics = {"FP32": MeanAveragePrecision(labels, coder)}
    metrics["INT8"] = MeanAveragePrecision(labels, coder, reference=metrics["FP32"])
    evaluate(networks, Batches(samples, 3, 0, 0, stack), metrics, CPU)
    assert len(metrics["INT8"].records) == 4
    scores = metrics["INT8"].compute()
    assert next(iter(scores)) == "map_voc12"
    assert scores["score_shift_p99"] == pytest.approx(0, abs=1e-3)

    folder = tmp_path / "report"
    folder.mkdir()
    files = detection_pictures(folder, networks, metrics, CPU, samples, coder, labels, SPEC, count=2)
    assert [file.name for file in files] == ["1_000000.png", "2_000002.png", "precision_recall.csv"]
    with Image.open(files[0]) as sheet:
        assert sheet.width > 3 * 64
        assert len(sheet.getcolors(10**6)) > 2
    with files[2].open() as text:
        rows = list(csv.DictReader(text))
    assert {row["network"] for row in rows} <= {"FP32", "INT8"}
    assert len(rows) == sum(len(curve.scores) for metric in metrics.values() for curve in metric.curves().values())


def test_the_helmet_network_scores_as_with_the_code_that_trained_it(shared):
    network = build_model("ssd_lite_mobilenet_v2", str(shared / "weights/mb2-ssd-lite-helmet.pth"), build_detector)
    samples, labels = voc_detection(open_voc(str(shared / "data/helmet-voc"), "Main", "test"), network.spec, CLASSES)
    metric = MeanAveragePrecision(labels, box_coder(network.model, network.spec), "voc07")
    # This network multiplies rounding by 100,000 in two layers, and kernels round by batch size and threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    evaluate({"fp32": network.model}, Batches(samples, 8, 0, 0, stack), {"fp32": metric}, CPU)
    torch.set_num_threads(threads)
    scores = metric.compute()
    assert (scores["map_voc07"], scores["map_voc12"]) == pytest.approx((14.5, 14.8), abs=1.0)
    assert tuple(metric.per_class().values()) == pytest.approx((16.7, 12.3), abs=1.5)
