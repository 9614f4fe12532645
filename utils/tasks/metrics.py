"""What the tasks are scored by: accumulators that take batches and give percentages, and how sure those are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.core.errors import UserError
from utils.core.predictions import Outputs, first_output
from utils.core.torchvision_compat import torchvision
from utils.tasks.boxes import Coder, Detections, Objects

VOID = 255  # the label of pixels that do not count


class Metric(Protocol):
    """What a network is scored by: a record of every image, in the order of the images, and figures made from them.

    The records of several processes, one after the other, are those of one process.
    """

    records: list[Any]

    def update(self, outputs: Any, targets: Any) -> None: ...

    def compute(self) -> dict[str, float]: ...

    def weighted(self, weights: Tensor) -> Tensor: ...


def interval(metric: Metric, reference: Metric | None = None, resamples: int = 400) -> tuple[float, float]:
    """The 95 % confidence interval of a metric's main figure; with a reference, of its difference to that one's.

    By the bootstrap over images (Efron, 1979): the same images are drawn for both, so that what both networks
    find hard cancels out.
    """
    count = len(metric.records)
    drawn = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(resamples, count, dtype=torch.long).scatter_add_(1, drawn, torch.ones_like(drawn))
    figures = metric.weighted(weights)
    if reference is not None:
        figures = figures - reference.weighted(weights)
    low, high = figures.nanquantile(torch.tensor([0.025, 0.975], dtype=figures.dtype)).tolist()
    return low, high


class TopK:
    """Top-1 and top-5 accuracy in percent. records: of each image its best class, and whether it is among the best 1 and 5."""

    def __init__(self) -> None:
        self.records: list[tuple[int, bool, bool]] = []

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """logits: [N, classes]; labels: [N]."""
        logits = first_output(logits)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels.to(best.device)[:, None]
        self.records += zip(best[:, 0].tolist(), hits[:, 0].tolist(), hits.any(dim=1).tolist(), strict=True)

    @property
    def predictions(self) -> list[int]:
        """The best class of each image."""
        return [best for best, *_ in self.records]

    def compute(self) -> dict[str, float]:
        """Percentages by name, the one that counts first."""
        _, top1, top5 = zip(*self.records, strict=True)
        return {"top1": 100 * sum(top1) / len(top1), "top5": 100 * sum(top5) / len(top5)}

    def weighted(self, weights: Tensor) -> Tensor:
        """The main figure [R] where each image counts as often as [R, images] says."""
        hits = torch.tensor([hit for _, hit, _ in self.records], dtype=torch.double)
        return 100 * (weights.double() @ hits) / weights.sum(1)


def upsampled(outputs: Outputs, size: Sequence[int]) -> Tensor:
    """Logits [N, classes, H, W] of that height and width, from a network's first output: smaller ones bilinearly.

    This is outside the network, and so in float. Larger ones are left as they are.
    """
    logits = first_output(outputs)
    own = logits.shape[2:]
    if own == tuple(size) or any(mine > wanted for mine, wanted in zip(own, size, strict=True)):
        return logits
    return torch.nn.functional.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


class ConfusionMatrix:
    """Mean IoU over classes and pixel accuracy in percent, from one confusion matrix of all pixels.

    classes: their names. records: of each image its own matrix, flat: the cells that are not 0 and their
    counts, [2, K]. A class that is neither there nor predicted has no IoU and stays out of the mean.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.records: list[Tensor] = []

    def update(self, logits: Tensor, masks: Tensor) -> None:
        """logits: [N, classes, H, W], or smaller maps; masks: [N, H, W] class indices and VOID."""
        logits = upsampled(logits, masks.shape[1:])
        images, classes, *size = logits.shape
        if [images, *size] != [*masks.shape]:
            raise UserError(
                f"the network's output is {tuple(logits.shape)} for masks of {tuple(masks.shape)}; it must be as large as the image, or smaller"
            )
        masks = masks.to(logits.device)
        image = torch.arange(images, device=logits.device)[:, None, None]
        cells = (image * classes + masks) * classes + logits.argmax(dim=1)
        counts = torch.bincount(cells[masks != VOID], minlength=images * classes**2).view(images, -1).cpu()
        for own in counts:
            filled = own.nonzero().flatten()
            self.records.append(torch.stack([filled, own[filled]]))

    @property
    def counts(self) -> Tensor:
        """[true class, predicted class] over all images."""
        return sum(map(self._matrix, self.records), torch.zeros(len(self.classes), len(self.classes), dtype=torch.long))

    @property
    def per_image(self) -> list[float]:
        """Mean IoU of each image alone, in percent."""
        return [100 * float(iou(self._matrix(record)).nanmean()) for record in self.records]

    def compute(self) -> dict[str, float]:
        """Percentages by name, the one that counts first."""
        counts = self.counts
        if not counts.any():
            raise UserError(f"every pixel of the masks is void ({VOID}), so there is nothing to score")
        return {
            "miou": 100 * float(iou(counts).nanmean()),
            "pixel_accuracy": 100 * float(counts.trace() / counts.sum()),
        }

    def per_class(self) -> dict[str, float]:
        """IoU in percent by class name, of the classes that have one."""
        shares = zip(self.classes, iou(self.counts).tolist(), strict=True)
        return {name: 100 * share for name, share in shares if share == share}

    def weighted(self, weights: Tensor) -> Tensor:
        """The main figure [R] where each image counts as often as [R, images] says."""
        parts = torch.stack([torch.cat(_overlaps(self._matrix(record))) for record in self.records]).double()
        both, either = (weights.double() @ parts).chunk(2, dim=1)
        return 100 * (both / either).nanmean(1)

    def _matrix(self, record: Tensor) -> Tensor:
        classes = len(self.classes)
        cells, counts = record
        return torch.zeros(classes**2, dtype=torch.long).index_add_(0, cells, counts).view(classes, classes)


def iou(counts: Tensor) -> Tensor:
    """Intersection over union [C] of each class of a confusion matrix [C, C]; NaN for a class that is nowhere."""
    both, either = _overlaps(counts)
    return both / either


def _overlaps(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [C] that are of a class and predicted as it, and that are either."""
    both = counts.diagonal()
    return both, counts.sum(0) + counts.sum(1) - both


@dataclass(frozen=True)
class Curve:
    """Precision and recall [K] of one class as the threshold falls through the detections' scores [K]."""

    precision: Tensor
    recall: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Scored:
    """One image. found: [K, 3] label, score and whether it is a hit, of each detection that counts;
    objects: labels of those that are not difficult; shifts: [2, P] of scores and boxes, with a reference."""

    found: Tensor
    objects: tuple[int, ...]
    shifts: Tensor | None = None


class MeanAveragePrecision:
    """VOC's mean average precision in percent: by 11 points of recall (voc07), or by area (voc12).

    labels: the network's output for each class name. coder: from the network's heads to detections.
    rule: the one that counts, "voc07" or "voc12"; both are given. reference: the metric of another
    network, updated with each batch before this one: then scores and boxes are compared to its.
    keep: remember all scores and boxes, for networks that are compared once all batches have passed.
    """

    def __init__(
        self,
        labels: Mapping[str, int],
        coder: Coder,
        rule: str = "voc12",
        reference: MeanAveragePrecision | None = None,
        keep: bool = False,
    ):
        self.labels, self.coder, self.rule, self.reference, self.keep = dict(labels), coder, rule, reference, keep
        self.records: list[Scored] = []
        self._batches = 0
        self.decoded: dict[int, tuple[Tensor, Tensor]] = {}  # scores and boxes by batch: the last one, or all

    def update(self, heads: Any, targets: list[Objects]) -> None:
        """heads: what the network returns for N images; targets: their N annotations."""
        decoded = self.coder.decode(heads)
        shifts = [None] * len(targets)
        if self.reference:
            pairs = zip(decoded, self.reference.decoded[self._batches], strict=True)
            shifts = torch.stack([(mine - theirs).abs().amax(-1) for mine, theirs in pairs], 1)
        for found, objects, shift in zip(self.coder.choose(*decoded), targets, shifts, strict=True):
            self.add(found, objects, shift)
        self.decoded[self._batches] = decoded
        if not self.keep:
            self.decoded.pop(self._batches - 1, None)
        self._batches += 1

    def add(self, found: Detections, objects: Objects, shifts: Tensor | None = None) -> None:
        """Count the detections of one image."""
        hits, neutral = match(found, objects)
        counted = torch.stack([found.labels.double(), found.scores.double(), hits.double()], 1)
        self.records.append(Scored(counted[~neutral], tuple(objects.labels[~objects.difficult].tolist()), shifts))

    def compute(self) -> dict[str, float]:
        """Percentages by name, the one that counts first; with a reference, also how far heads have moved.

        The mean is over the classes of which the images hold an object that is not difficult. Shifts are
        over all priors: the largest of a prior's class scores, and of its box's edges in percent of the
        image's side; their mean and 99th percentile.
        """
        if not any(record.objects for record in self.records):
            raise UserError(
                "the images hold no object that counts, so there is nothing to score; pass other images, or more with --limit"
            )
        other = next(rule for rule in RULES if rule != self.rule)
        return {f"map_{rule}": _mean(self.per_class(rule).values()) for rule in (self.rule, other)} | self.shifts()

    def per_class(self, rule: str | None = None) -> dict[str, float]:
        """Average precision in percent by class name, by the rule that counts or another."""
        area = RULES[rule or self.rule]
        counting, found = self._counting(), self._found()
        return {
            name: 100 * float(area(found.of(label).hits, counting[:, label].sum()))
            for name, label in self._scored().items()
        }

    def weighted(self, weights: Tensor) -> Tensor:
        """The main figure [R] where each image counts as often as [R, images] says."""
        area, found = RULES[self.rule], self._found()
        objects = weights @ self._counting()  # [R, labels]
        precisions = []
        for label in self._scored().values():
            ranked = found.of(label)
            rows = max(1, _AT_ONCE // max(1, len(ranked.images)))
            known = [
                area(ranked.hits, total, drawn[:, ranked.images])
                for drawn, total in zip(weights.split(rows), objects[:, label].split(rows), strict=True)
            ]
            known = torch.cat(known)
            precisions.append(torch.where(objects[:, label] > 0, known, torch.nan))
        return 100 * torch.stack(precisions).nanmean(0)

    def shifts(self) -> dict[str, float]:
        """Mean and 99th percentile of how far scores and boxes are from the reference's; nothing without one."""
        scores = {}
        if self.reference and self.records:
            moved = 100 * torch.cat([record.shifts for record in self.records], 1)
            for kind, shift in zip(("score", "box"), moved, strict=True):
                percentile = shift.kthvalue(-(-99 * len(shift) // 100)).values
                scores |= {f"{kind}_shift_mean": float(shift.mean()), f"{kind}_shift_p99": float(percentile)}
        return scores

    def remark(self) -> str:
        """The shifts in a line; nothing without a reference."""
        moved = ", ".join(f"{name} {value:.3f}" for name, value in self.shifts().items())
        return moved and f"against FP32, over all priors, in percent: {moved}"

    def curves(self) -> dict[str, Curve]:
        """Precision and recall of each class of which the images hold an object that is not difficult."""
        curves, counting, found = {}, self._counting().sum(0), self._found()
        for name, label in self._scored().items():
            ranked = found.of(label)
            recall = ranked.hits.cumsum(0) / counting[label]
            curves[name] = Curve(_precision(ranked.hits, torch.ones_like(ranked.images)), recall, ranked.scores)
        return curves

    def _scored(self) -> dict[str, int]:
        there = self._counting().any(0)
        return {name: label for name, label in self.labels.items() if there[label]}

    def _counting(self) -> Tensor:
        """[images, labels]: objects that are not difficult."""
        width = max(self.labels.values()) + 1
        rows = [torch.tensor(record.objects, dtype=torch.long).bincount(minlength=width) for record in self.records]
        return torch.stack(rows)

    def _found(self) -> _Found:
        images = torch.arange(len(self.records)).repeat_interleave(torch.tensor([len(r.found) for r in self.records]))
        return _Found(images, torch.cat([record.found for record in self.records]))


@dataclass(frozen=True)
class _Ranked:
    """Detections [K] of one class by falling score, ties in the images' order."""

    images: Tensor
    hits: Tensor
    scores: Tensor


@dataclass(frozen=True)
class _Found:
    """All detections: images [K], and rows [K, 3] of label, score, hit."""

    images: Tensor
    rows: Tensor

    def of(self, label: int) -> _Ranked:
        own = self.rows[:, 0] == label
        scores, order = self.rows[own, 1].sort(descending=True, stable=True)
        return _Ranked(self.images[own][order], self.rows[own, 2][order] > 0, scores)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def match(found: Detections, objects: Objects, iou_thresh: float = 0.5) -> tuple[Tensor, Tensor]:
    """Which detections [K] of one image are hits, and which are neutral (VOC development kit).

    A detection goes for the object of its class that it overlaps most. If by more than iou_thresh, it is a hit
    where it is the best-scored one to do so; on a difficult object it is neutral.
    """
    if not len(objects.labels):
        return torch.zeros(len(found.labels), dtype=torch.bool), torch.zeros(len(found.labels), dtype=torch.bool)
    far_edges = found.boxes.new_tensor([0.0, 0.0, *objects.pixel])
    ious = torchvision.ops.box_iou(found.boxes + far_edges, objects.boxes + far_edges)
    ious[found.labels[:, None] != objects.labels] = 0
    best, which = ious.max(1)
    matched = best > iou_thresh
    neutral = matched & objects.difficult[which]

    rank = torch.arange(len(which))  # detections come by falling score
    first = torch.full((len(objects.labels),), len(which)).scatter_reduce(0, which[matched], rank[matched], "amin")
    return matched & ~neutral & (first[which] == rank), neutral


def eleven_points(hits: Tensor, objects: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of the best precision at recall 0, 0.1, ..., 1 or beyond (VOC until 2009).

    hits: [K] by falling score. objects: [] or [R]. weights: [R, K], how often each detection counts (default: once).
    """
    weights = torch.ones_like(hits, dtype=torch.long) if weights is None else weights
    needed = (torch.arange(11) * objects[..., None] + 9).div(10, rounding_mode="floor")  # hits for that recall, exactly
    place = torch.searchsorted((hits * weights).cumsum(-1), needed)
    best = _best_beyond(hits, weights)
    return torch.cat([best, best.new_zeros(*best.shape[:-1], 1)], -1).gather(-1, place).mean(-1)


def area_under_curve(hits: Tensor, objects: Tensor, weights: Tensor | None = None) -> Tensor:
    """Area under the best precision at a recall or beyond (VOC since 2010).

    hits: [K] by falling score. objects: [] or [R]. weights: [R, K], how often each detection counts (default: once).
    """
    weights = torch.ones_like(hits, dtype=torch.long) if weights is None else weights
    return (_best_beyond(hits, weights) * hits * weights).sum(-1) / objects


RULES = {"voc07": eleven_points, "voc12": area_under_curve}
_AT_ONCE = 1 << 20  # detections, over all resamples, that the rules are computed for at a time


def _precision(hits: Tensor, weights: Tensor) -> Tensor:
    return (hits * weights).cumsum(-1).double() / weights.cumsum(-1).clamp_min(1)


def _best_beyond(hits: Tensor, weights: Tensor) -> Tensor:
    """The best precision at each detection or after it."""
    return _precision(hits, weights).flip(-1).cummax(-1).values.flip(-1)
