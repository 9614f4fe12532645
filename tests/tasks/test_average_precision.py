"""Mean average precision: by hand, and against plain loops."""

import pytest
import torch

from utils.core.errors import UserError
from utils.core.torchvision_compat import torchvision
from utils.tasks.boxes import BoxCoder, Detections, Objects
from utils.tasks.metrics import RULES, MeanAveragePrecision, match

LABELS = {"helmet": 1, "head": 2}


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
        corner = torch.rand(12, 2) * 0.6
        boxes = torch.cat([corner, corner + 0.04 + torch.rand(12, 2) * 0.35], 1)
        objects = Objects(boxes, torch.randint(1, 3, (12,)), torch.rand(12) < 0.3)
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
