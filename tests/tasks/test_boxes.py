"""Boxes and offsets: what one makes of the other, and detections of a network's heads."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.ssd_lite import ssd_coder
from utils.core.torchvision_compat import torchvision
from utils.tasks.boxes import BoxCoder, Objects, PriorSpec, box_convert
from utils.tasks.metrics import match

CLASSES = 3  # background included


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
