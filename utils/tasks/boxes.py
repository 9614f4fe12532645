"""Boxes of detectors: priors and coding against them, and how detections are chosen among scored boxes.

All boxes are fractions of the image's width and height, so nothing here depends on an image's size:
resizing scales both axes on its own, and intersection over union does not change under that.
Corner form is x1, y1, x2, y2; centre form is centre x, centre y, width, height.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from utils.core.errors import UserError, message_of
from utils.core.predictions import prior_predictions
from utils.core.torchvision_compat import torchvision

SHOWS = 0.25  # score over which a place is said to show a class, where two networks are compared

box_convert = torchvision.ops.box_convert  # between corner form, "xyxy", and centre form, "cxcywh"


@dataclass(frozen=True)
class Objects:
    """The annotated objects of one image. boxes: [K, 4] corners; labels: [K], the network's outputs; difficult: [K] bool.

    pixel: width and height of a pixel, where boxes are to be matched with the pixels of their far edges, as VOC's
    development kit does; (0, 0): without.
    """

    boxes: Tensor
    labels: Tensor
    difficult: Tensor
    pixel: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Detections:
    """What a network found in one image, by falling score. boxes: [K, 4] corners; labels: [K], the network's outputs; scores: [K]."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor


@dataclass(frozen=True)
class PriorSpec:
    """Where priors stand and how large they are, one entry per feature map (SSD, section 2.2).

    strides: pixels between the centres of neighbouring cells; None: the image divided by the map.
    scales: side of a map's small square prior as a fraction of the image; one more closes the last.
    ratios: of the sides of its other priors, each lying and standing.
    The defaults are those of qfgaohao's SSD-Lite at 300 pixels: 3,000 priors.
    """

    strides: tuple[int | None, ...] = (16, 32, 64, None, None, None)
    scales: tuple[float, ...] = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.1)
    ratios: tuple[float, ...] = (2.0, 3.0)

    @property
    def per_cell(self) -> int:
        return 2 + 2 * len(self.ratios)


def make_priors(spec: PriorSpec, maps: Sequence[tuple[int, int]], image: tuple[int, int]) -> Tensor:
    """The priors [P, 4], centre form, in the order of the heads' outputs: map, row, column, shape.

    maps, image: height and width of every feature map and of the image.
    """
    priors = []
    for (rows, columns), stride, scale, next_scale in zip(
        maps, spec.strides, spec.scales[:-1], spec.scales[1:], strict=True
    ):
        roots = torch.tensor([ratio**0.5 for ratio in spec.ratios], dtype=torch.float64)
        lying = torch.stack([scale * roots, scale / roots], 1)
        squares = torch.tensor([scale, (scale * next_scale) ** 0.5], dtype=torch.float64)
        shapes = torch.cat([squares[:, None].expand(2, 2), torch.stack([lying, lying.flip(1)], 1).reshape(-1, 2)])

        y = (torch.arange(rows, dtype=torch.float64) + 0.5) * (stride / image[0] if stride else 1 / rows)
        x = (torch.arange(columns, dtype=torch.float64) + 0.5) * (stride / image[1] if stride else 1 / columns)
        centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1).reshape(-1, 1, 2)
        cells = len(centres)
        priors.append(torch.cat([centres.expand(-1, len(shapes), -1), shapes.expand(cells, -1, -1)], 2).reshape(-1, 4))
    return torch.cat(priors).clamp(0, 1).float()


@dataclass(frozen=True, kw_only=True)
class Coder:
    """Between what a detector returns and boxes: how it is decoded, and how detections are chosen.

    A kind of its own says decode(). score_thresh: scores at or below are dropped. nms_thresh: intersection over union
    above which the lower of two boxes of one class is dropped (NMS); 1: none is. topk_candidates: best boxes of a class
    that NMS looks at. detections_per_img: at most that many; None: all.
    """

    background: ClassVar[bool] = True  # whether class 0 is none
    expects: ClassVar[str] = "a detector must return what its coder(size) decodes"

    score_thresh: float = 0.01
    nms_thresh: float = 0.45
    topk_candidates: int = 200
    detections_per_img: int | None = None

    def decode(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """Class scores [N, P, classes] and boxes [N, P, 4] in corner form, on the CPU, from what the network returns."""
        raise NotImplementedError(f"{type(self).__name__} does not define decode()")

    def fits(self, outputs: Any) -> bool:
        """Whether the outputs are of the kind and the shapes that decode() takes."""
        return self.misfit(outputs) is None

    def misfit(self, outputs: Any) -> str | None:
        """What is wrong with what decode() makes of the outputs; None: nothing."""
        try:
            scores, boxes = self.decode(outputs)
            if scores.dim() == boxes.dim() == 3 and boxes.shape == (*scores.shape[:2], 4):
                return None if scores.numel() else "decode() gives no score"
            shapes = f"{tuple(scores.shape)} and {tuple(boxes.shape)}"
        except Exception as error:  # whatever outputs of another kind, or a mistake in a user's decode(), lead to
            return f"decode() fails: {type(error).__name__}: {message_of(error)}"
        return f"decode() gives {shapes}, not scores [N, P, classes] and boxes [N, P, 4]"

    @property
    def takes_heads(self) -> bool:
        """Whether decode() takes class logits first and box offsets second, whatever else follows."""
        return False

    def doubt(self, outputs: Any) -> str | None:
        """What looks wrong with the values that decode() makes of outputs that fit; None: nothing."""
        scores, boxes = self.decode(outputs)
        if not ((scores > -1e-3) & (scores < 1.001)).all():
            return f"scores from {scores.min():.3g} to {scores.max():.3g}, not between 0 and 1: a sigmoid or softmax is missing"
        if boxes.abs().median() > 2:
            return f"boxes of up to {boxes.max():.3g}, not fractions of the image's sides: they look like pixels"
        if (boxes[..., 2:] < boxes[..., :2]).any(-1).float().mean() > 0.5:
            return "boxes whose second corner is left of or above the first, mostly: they look like centre and size"
        return None

    def predictions(self, outputs: Any) -> Tensor:
        """What two networks are compared by: the class [N, P] that each place shows, -1 where it shows none."""
        best = self.decode(outputs)[0].max(2)
        return torch.where(best.values > SHOWS, best.indices, -1)

    def choose(self, scores: Tensor, boxes: Tensor) -> list[Detections]:
        """The detections of each image among its scored boxes, as decode() gives them."""
        return [self._choose(*image) for image in zip(scores, boxes, strict=True)]

    def detect(self, outputs: Any) -> list[Detections]:
        """The detections of each image from what the network returns."""
        return self.choose(*self.decode(outputs))

    def _choose(self, scores: Tensor, boxes: Tensor) -> Detections:
        """scores: [P, classes]; boxes: [P, 4]."""
        chosen = [(torch.empty(0, 4), torch.empty(0, dtype=torch.long), torch.empty(0))]
        for label in (scores > self.score_thresh).any(0).nonzero().flatten().tolist():
            if label == 0 and self.background:
                continue
            passing = (scores[:, label] > self.score_thresh).nonzero().flatten()
            best = scores[passing, label].sort(descending=True, stable=True)
            rows = passing[best.indices[: self.topk_candidates]]
            rows = rows[torchvision.ops.nms(boxes[rows], scores[rows, label], self.nms_thresh)]
            chosen.append((boxes[rows], torch.full((len(rows),), label), scores[rows, label]))
        boxes, labels, scores = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        order = scores.argsort(descending=True, stable=True)[: self.detections_per_img]
        return Detections(boxes[order], labels[order], scores[order])


@dataclass(frozen=True)
class BoxCoder(Coder):
    """Of single-shot detectors: class logits [N, P, classes] and offsets [N, P, 4] from priors.

    priors: [P, 4], centre form. centre_variance, size_variance: scale of the predicted offsets. clip: cut boxes at the
    image's border. background: whether class 0 is that, and a softmax gives the scores; without it each class has a
    sigmoid, as focal loss trains them; None: as a subclass says, or true. A subclass with a decode() of its own may give
    priors another meaning.
    """

    priors: Tensor = field(repr=False)
    centre_variance: float = 0.1
    size_variance: float = 0.2
    clip: bool = False
    background: bool = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        said = (self.background, type(self).background, Coder.background)
        object.__setattr__(self, "background", next(value for value in said if value is not None))
        if not self.takes_heads:
            return
        priors = torch.as_tensor(self.priors, dtype=torch.float32)
        wrong = f"priors of shape {tuple(priors.shape)}" if priors.dim() != 2 or priors.shape[1] != 4 else None
        if wrong is None and len(priors) and priors[:, :2].abs().median() > 2:
            wrong = f"priors with centres of up to {priors[:, :2].max():g}, so in pixels"
        if wrong:
            raise UserError(
                f"BoxCoder gets {wrong}; it takes [P, 4]: centre x, centre y, width, height, as fractions of the image's sides"
            )
        object.__setattr__(self, "priors", priors)

    @property
    def takes_heads(self) -> bool:
        return type(self).decode is BoxCoder.decode

    def doubt(self, outputs: Any) -> str | None:
        if not self.takes_heads:
            return super().doubt(outputs)
        ends = self.priors[:, :2] + self.priors[:, 2:] / 2
        ordered = (self.priors[:, 2:] >= self.priors[:, :2]).all() and self.priors.min() >= 0 and self.priors.max() <= 1
        if len(self.priors) > 8 and ordered and (ends > 1).any(1).float().mean() > 1 / 3:
            return "boxes from priors that look like corners; it takes centre x, centre y, width and height"
        return None

    @property
    def expects(self) -> str:
        first = ", class 0 the background," if self.background else ""
        return (
            f"a detector must return class logits [N, {len(self.priors)}, classes]{first} and box offsets "
            f"[N, {len(self.priors)}, 4], for the priors of its coder(size), or of SSD-Lite where it has none; "
            "define coder(size), as docs/libraries.md shows"
        )

    def heads(self, tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
        """Which of a network's tensors, by name, are its class logits and its box offsets; None: it is not clear.

        Names that speak of classes and of boxes settle it, otherwise the shapes do; a centerness is of one class.
        """
        rows = {name: one for name, one in tensors.items() if one.dim() == 3 and one.shape[1] == len(self.priors)}
        fours = [name for name, one in rows.items() if one.shape[2] == 4]
        classes = [name for name in rows if re.search(r"cls|class|logit|score|conf", name.lower())]
        named = [name for name in fours if name not in classes and re.search(r"box|reg|loc|offset|delta", name.lower())]
        boxes = named or fours
        others = [name for name in rows if name not in boxes]
        several = [name for name in others if rows[name].shape[2] > 1]
        scores = next((found for found in (others, classes, several) if len(found) == 1), [])
        return (scores[0], boxes[0]) if scores and len(boxes) == 1 and scores != boxes else None

    def boxes(self, offsets: Tensor) -> Tensor:
        """Predicted offsets [..., P, 4] as boxes in corner form."""
        priors = self.priors.to(offsets.device)
        centre = priors[:, :2] + offsets[..., :2] * self.centre_variance * priors[:, 2:]
        growth = (offsets[..., 2:] * self.size_variance).clamp(
            max=math.log(1000 / 16)
        )  # torchvision's bound; an exp must not overflow
        boxes = box_convert(torch.cat([centre, growth.exp() * priors[:, 2:]], -1), "cxcywh", "xyxy")
        return torchvision.ops.clip_boxes_to_image(boxes, (1, 1)) if self.clip else boxes

    def offsets(self, boxes: Tensor) -> Tensor:
        """Boxes [..., P, 4] in corner form, one for each prior, as the offsets that predict them."""
        priors, boxes = self.priors.to(boxes.device), box_convert(boxes, "xyxy", "cxcywh")
        centre = (boxes[..., :2] - priors[:, :2]) / priors[:, 2:] / self.centre_variance
        return torch.cat([centre, (boxes[..., 2:] / priors[:, 2:]).log() / self.size_variance], -1)

    def encode(self, objects: Objects, iou_thresh: float = 0.5) -> tuple[Tensor, Tensor]:
        """What each prior should predict: labels [P], 0 for background (-1 where that is no class), and offsets [P, 4].

        A prior takes the object that it overlaps most, if by an intersection over union of at least
        iou_thresh; and every object has
        the prior that overlaps it most (SSD, section 2.2, matching).
        """
        labels = torch.full((len(self.priors),), 0 if self.background else -1)
        boxes = box_convert(self.priors, "cxcywh", "xyxy")
        if len(objects.labels):
            ious = torchvision.ops.box_iou(boxes, objects.boxes)
            ious[ious.argmax(0), torch.arange(len(objects.labels))] = 2.0
            best, which = ious.max(1)
            labels = torch.where(best >= iou_thresh, objects.labels[which], labels)
            boxes = torch.where((best >= iou_thresh)[:, None], objects.boxes[which], boxes)
        return labels, self.offsets(boxes)

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        logits, offsets = (head.float().cpu() for head in outputs[:2])  # others may follow
        if offsets.shape[-1] != 4:  # which arithmetic would broadcast
            raise ValueError(f"{offsets.shape[-1]} offsets a prior, not 4")
        return logits.softmax(-1) if self.background else logits.sigmoid(), self.boxes(offsets)

    def predictions(self, outputs: Sequence[Tensor]) -> Tensor:
        if not self.background:
            return super().predictions(outputs)
        found = prior_predictions(outputs)
        return torch.where(found > 0, found, -1)
