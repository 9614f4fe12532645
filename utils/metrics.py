"""What the tasks are scored by: accumulators that take batches and give percentages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.boxes import BoxCoder, Detections, Objects
from utils.errors import UserError
from utils.vision import torchvision

VOID = 255  # the label of pixels that do not count


class TopK:
    """Top-1 and top-5 accuracy in percent. predictions: the best class of each image."""

    def __init__(self) -> None:
        self.samples = self.top1 = self.top5 = 0
        self.predictions: list[int] = []

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """logits: [N, classes]; labels: [N]."""
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels.to(best.device)[:, None]
        self.samples += len(labels)
        self.predictions += best[:, 0].tolist()
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.any(dim=1).sum())

    def compute(self) -> dict[str, float]:
        """Percentages by name, the one that counts first."""
        return {"top1": 100 * self.top1 / self.samples, "top5": 100 * self.top5 / self.samples}


class ConfusionMatrix:
    """Mean IoU over classes and pixel accuracy in percent, from one confusion matrix of all pixels.

    classes: their names. counts: [true class, predicted class]. per_image: mean IoU of each image
    alone, in percent. A class that is neither there nor predicted has no IoU and stays out of the mean.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes, self.samples = tuple(classes), 0
        self.counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)
        self.per_image: list[float] = []

    def update(self, logits: Tensor, masks: Tensor) -> None:
        """logits: [N, classes, H, W]; masks: [N, H, W] class indices and VOID."""
        images, classes, *size = logits.shape
        if [images, *size] != [*masks.shape]:
            raise UserError(
                f"the network's output is {tuple(logits.shape)} for masks of {tuple(masks.shape)}; it must be as large as the image"
            )
        masks = masks.to(logits.device)
        image = torch.arange(images, device=logits.device)[:, None, None]
        cells = (image * classes + masks) * classes + logits.argmax(dim=1)
        counts = (
            torch.bincount(cells[masks != VOID], minlength=images * classes**2).view(images, classes, classes).cpu()
        )
        self.samples += images
        self.counts += counts.sum(dim=0)
        self.per_image += (100 * iou(counts).nanmean(dim=-1)).tolist()

    def compute(self) -> dict[str, float]:
        """Percentages by name, the one that counts first."""
        if not self.counts.any():
            raise UserError(f"every pixel of the masks is void ({VOID}), so there is nothing to score")
        return {
            "miou": 100 * float(iou(self.counts).nanmean()),
            "pixel_accuracy": 100 * float(self.counts.trace() / self.counts.sum()),
        }

    def per_class(self) -> dict[str, float]:
        """IoU in percent by class name, of the classes that have one."""
        shares = zip(self.classes, iou(self.counts).tolist(), strict=True)
        return {name: 100 * share for name, share in shares if share == share}


def iou(counts: Tensor) -> Tensor:
    """Intersection over union of each class, [..., C], of confusion matrices [..., C, C]; NaN for a class that is nowhere."""
    both = counts.diagonal(dim1=-2, dim2=-1)
    return both / (counts.sum(dim=-1) + counts.sum(dim=-2) - both)


@dataclass(frozen=True)
class Curve:
    """Precision and recall [K] of one class as the threshold falls through the detections' scores [K]."""

    precision: Tensor
    recall: Tensor
    scores: Tensor


class MeanAveragePrecision:
    """VOC's mean average precision in percent: by 11 points of recall (voc07), or by area (voc12).

    labels: the network's output for each class name. coder: from the network's heads to detections.
    rule: the one that counts, "voc07" or "voc12"; both are given. reference: the metric of another
    network, updated with each batch before this one: then scores and boxes are compared to its.
    """

    def __init__(
        self,
        labels: Mapping[str, int],
        coder: BoxCoder,
        rule: str = "voc12",
        reference: MeanAveragePrecision | None = None,
    ):
        self.labels, self.coder, self.rule, self.reference = dict(labels), coder, rule, reference
        self.samples = 0
        self._counting: dict[int, int] = dict.fromkeys(
            self.labels.values(), 0
        )  # objects that are not difficult, by label
        self._found: list[Tensor] = []  # [K, 3] for each image: label, score, whether it is a hit
        self._last: tuple[Tensor, Tensor] | None = None  # scores and boxes of the last batch
        self._shifts: list[Tensor] = []  # [2, N * P] for each batch: of scores, of boxes

    def update(self, heads: tuple[Tensor, Tensor], targets: list[Objects]) -> None:
        """heads: what the network returns for N images; targets: their N annotations."""
        self._last = self.coder.decode(heads)
        for found, objects in zip(self.coder.choose(*self._last), targets, strict=True):
            self.add(found, objects)
        if self.reference:
            moved = [
                (mine - theirs).abs().amax(-1).flatten()
                for mine, theirs in zip(self._last, self.reference._last, strict=True)
            ]
            self._shifts.append(torch.stack(moved))

    def add(self, found: Detections, objects: Objects) -> None:
        """Count the detections of one image."""
        hits, neutral = match(found, objects)
        counted = torch.stack([found.labels.double(), found.scores.double(), hits.double()], 1)
        self._found.append(counted[~neutral])
        for label in objects.labels[~objects.difficult].tolist():
            self._counting[label] += 1
        self.samples += 1

    def compute(self) -> dict[str, float]:
        """Percentages by name, the one that counts first; with a reference, also how far heads have moved.

        The mean is over the classes of which the images hold an object that is not difficult. Shifts are
        over all priors: the largest of a prior's class scores, and of its box's edges in percent of the
        image's side; their mean and 99th percentile.
        """
        if not any(self._counting.values()):
            raise UserError(
                "the images hold no object that counts, so there is nothing to score; pass other images, or more with --limit"
            )
        other = next(rule for rule in RULES if rule != self.rule)
        return {f"map_{rule}": _mean(self.per_class(rule).values()) for rule in (self.rule, other)} | self.shifts()

    def per_class(self, rule: str | None = None) -> dict[str, float]:
        """Average precision in percent by class name, by the rule that counts or another."""
        area = RULES[rule or self.rule]
        return {name: 100 * area(self._hits(label)[0], self._counting[label]) for name, label in self._scored().items()}

    def shifts(self) -> dict[str, float]:
        """Mean and 99th percentile of how far scores and boxes are from the reference's; nothing without one."""
        scores = {}
        if self._shifts:
            for kind, shift in zip(("score", "box"), 100 * torch.cat(self._shifts, 1), strict=True):
                percentile = shift.kthvalue(-(-99 * len(shift) // 100)).values
                scores |= {f"{kind}_shift_mean": float(shift.mean()), f"{kind}_shift_p99": float(percentile)}
        return scores

    def remark(self) -> str:
        """The shifts in a line; nothing without a reference."""
        moved = ", ".join(f"{name} {value:.3f}" for name, value in self.shifts().items())
        return moved and f"against FP32, over all priors, in percent: {moved}"

    def curves(self) -> dict[str, Curve]:
        """Precision and recall of each class of which the images hold an object that is not difficult."""
        curves = {}
        for name, label in self._scored().items():
            hits, scores = self._hits(label)
            curves[name] = Curve(_precision(hits), hits.cumsum(0) / self._counting[label], scores)
        return curves

    def _scored(self) -> dict[str, int]:
        return {name: label for name, label in self.labels.items() if self._counting[label]}

    def _hits(self, label: int) -> tuple[Tensor, Tensor]:
        """Whether each detection of a class is a hit, and its score, by falling score; ties in the images' order."""
        found = torch.cat([torch.empty(0, 3, dtype=torch.double), *self._found])
        found = found[found[:, 0] == label]
        scores, order = found[:, 1].sort(descending=True, stable=True)
        return found[order, 2] > 0, scores


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def match(found: Detections, objects: Objects, overlap: float = 0.5) -> tuple[Tensor, Tensor]:
    """Which detections [K] of one image are hits, and which are neutral (VOC development kit).

    A detection goes for the object of its class that it overlaps most. If by more than `overlap`, it is a hit
    where it is the best-scored one to do so; on a difficult object it is neutral.
    """
    if not len(objects.labels):
        return torch.zeros(len(found.labels), dtype=torch.bool), torch.zeros(len(found.labels), dtype=torch.bool)
    overlaps = torchvision.ops.box_iou(found.boxes, objects.boxes)
    overlaps[found.labels[:, None] != objects.labels] = 0
    best, which = overlaps.max(1)
    matched = best > overlap
    neutral = matched & objects.difficult[which]

    rank = torch.arange(len(which))  # detections come by falling score
    first = torch.full((len(objects.labels),), len(which)).scatter_reduce(0, which[matched], rank[matched], "amin")
    return matched & ~neutral & (first[which] == rank), neutral


def eleven_points(hits: Tensor, objects: int) -> float:
    """Mean of the best precision at recall 0, 0.1, ..., 1 or beyond (VOC until 2009). hits: [K] by falling score."""
    needed = (torch.arange(11) * objects + 9).div(10, rounding_mode="floor")  # hits for that recall, exactly
    place = torch.searchsorted(hits.cumsum(0), needed)
    return float(torch.cat([_best_beyond(hits), torch.zeros(1)])[place].mean())


def area_under_curve(hits: Tensor, objects: int) -> float:
    """Area under the best precision at a recall or beyond (VOC since 2010). hits: [K] by falling score."""
    return float(_best_beyond(hits)[hits].sum() / objects)


RULES = {"voc07": eleven_points, "voc12": area_under_curve}


def _precision(hits: Tensor) -> Tensor:
    return hits.cumsum(0).double() / torch.arange(1, len(hits) + 1)


def _best_beyond(hits: Tensor) -> Tensor:
    """The best precision at each detection or after it."""
    return _precision(hits).flip(0).cummax(0).values.flip(0)


def sqnr(reference: Tensor, noisy: Tensor) -> float:
    """Signal-to-quantization-noise ratio of two tensors of one shape, in dB."""
    noise = (reference - noisy).square().mean()
    return float(10 * torch.log10(reference.square().mean() / noise.clamp_min(1e-30)))
