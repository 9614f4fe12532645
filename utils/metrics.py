"""What the tasks are scored by: accumulators that take batches and give percentages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import UserError

VOID = 255  # the label of pixels that do not count

from utils.boxes import Detections, Objects
from utils.vision import torchvision


class TopK:
    """Top-1 and top-5 accuracy in percent."""

    def __init__(self) -> None:
        self.samples = self.top1 = self.top5 = 0

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """logits: [N, classes]; labels: [N]."""
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels.to(best.device)[:, None]
        self.samples += len(labels)
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.any(dim=1).sum())

    def compute(self) -> dict[str, float]:
        """Percentages by name, the one that counts first."""
        return {"top1": 100 * self.top1 / self.samples, "top5": 100 * self.top5 / self.samples}


@dataclass(frozen=True)
class Curve:
    """Precision and recall [K] of one class as the threshold falls through the detections' scores [K]."""

    precision: Tensor
    recall: Tensor
    scores: Tensor


class MeanAveragePrecision:
    """VOC's mean average precision in percent: by 11 points of recall (voc07), or by area (voc12).

    labels: the network's output for each class name. detect: heads -> Detections of each image.
    rule: the one that counts, "voc07" or "voc12"; both are given. overlap: intersection over union
    that a detection must exceed to match.
    """

    def __init__(self, labels: Mapping[str, int], detect: Callable[[tuple[Tensor, Tensor]], list[Detections]], rule: str = "voc12", overlap: float = 0.5):
        self.labels, self.detect, self.rule, self.overlap = dict(labels), detect, rule, overlap
        self.samples = 0
        self._objects: dict[int, int] = dict.fromkeys(self.labels.values(), 0)  # how many count, for each label
        self._found: list[Tensor] = []  # [K, 3] for each image: label, score, whether it is a hit

    def update(self, heads: tuple[Tensor, Tensor], targets: list[Objects]) -> None:
        """heads: what the network returns for N images; targets: their N annotations."""
        for found, objects in zip(self.detect(heads), targets, strict=True):
            hits, neutral = match(found, objects, self.overlap)
            counted = torch.stack([found.labels.double(), found.scores.double(), hits.double()], 1)
            self._found.append(counted[~neutral])
            for label in objects.labels[~objects.difficult].tolist():
                self._objects[label] += 1
        self.samples += len(targets)

    def compute(self) -> dict[str, float]:
        """Percentages by name, the one that counts first; then each class with its rule.

        The mean is over the classes of which the images hold an object that is not difficult.
        """
        hits = {name: self._hits(label)[0] for name, label in self.labels.items() if self._objects[label]}
        by_rule = {rule: {name: area(found, self._objects[self.labels[name]]) for name, found in hits.items()} for rule, area in RULES.items()}
        means = {rule: 100 * sum(each.values()) / max(len(each), 1) for rule, each in by_rule.items()}
        classes = {f"ap {name}": 100 * precision for name, precision in by_rule[self.rule].items()}
        return {"map": means[self.rule]} | {f"map_{rule}": mean for rule, mean in means.items()} | classes

    def curves(self) -> dict[str, Curve]:
        """Precision and recall of each class of which the images hold an object that is not difficult."""
        curves = {}
        for name, label in self.labels.items():
            if self._objects[label]:
                hits, scores = self._hits(label)
                curves[name] = Curve(_precision(hits), hits.cumsum(0) / self._objects[label], scores)
        return curves

    def _hits(self, label: int) -> tuple[Tensor, Tensor]:
        """Whether each detection of a class is a hit, and its score, by falling score; ties in the images' order."""
        found = torch.cat([torch.empty(0, 3, dtype=torch.double), *self._found])
        found = found[found[:, 0] == label]
        scores, order = found[:, 1].sort(descending=True, stable=True)
        return found[order, 2] > 0, scores


def match(found: Detections, objects: Objects, overlap: float) -> tuple[Tensor, Tensor]:
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


class ConfusionMatrix:
    """Mean IoU over classes and pixel accuracy in percent, from one confusion matrix of all pixels.

    counts: [true class, predicted class]. per_image: mean IoU of each image alone, in percent.
    A class that is neither there nor predicted has no IoU and stays out of the mean.
    """

    def __init__(self, classes: int) -> None:
        self.samples = 0
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)
        self.per_image: list[float] = []

    def update(self, logits: Tensor, masks: Tensor) -> None:
        """logits: [N, classes, H, W]; masks: [N, H, W] class indices and VOID."""
        images, classes, *size = logits.shape
        if [images, *size] != [*masks.shape]:
            raise UserError(f"the network's output is {tuple(logits.shape)} for masks of {tuple(masks.shape)}; it must be as large as the image")
        masks = masks.to(logits.device)
        image = torch.arange(images, device=logits.device)[:, None, None]
        cells = (image * classes + masks) * classes + logits.argmax(dim=1)
        counts = torch.bincount(cells[masks != VOID], minlength=images * classes**2).view(images, classes, classes).cpu()
        self.samples += images
        self.counts += counts.sum(dim=0)
        self.per_image += (100 * iou(counts).nanmean(dim=-1)).tolist()

    def compute(self) -> dict[str, float]:
        """Percentages by name, the one that counts first."""
        if not self.counts.any():
            raise UserError(f"every pixel of the masks is void ({VOID}), so there is nothing to score")
        return {"miou": 100 * float(iou(self.counts).nanmean()), "pixel_accuracy": 100 * float(self.counts.trace() / self.counts.sum())}


def iou(counts: Tensor) -> Tensor:
    """Intersection over union of each class, [..., C], of confusion matrices [..., C, C]; NaN for a class that is nowhere."""
    both = counts.diagonal(dim1=-2, dim2=-1)
    return both / (counts.sum(dim=-1) + counts.sum(dim=-2) - both)


def sqnr(reference: Tensor, noisy: Tensor) -> float:
    """Signal-to-quantization-noise ratio of two tensors of one shape, in dB."""
    noise = (reference - noisy).square().mean()
    return float(10 * torch.log10(reference.square().mean() / noise.clamp_min(1e-30)))
