"""Boxes of detectors without priors, as YOLO's: distributions of distances, and class scores without a background."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from utils.core.torchvision_compat import torchvision
from utils.tasks.boxes import Coder


@dataclass(frozen=True, kw_only=True)
class DistributionFocalCoder(Coder):
    """From maps [N, 4 * reg_max + classes, H, W], one a stride, to boxes (Li et al., Generalized Focal Loss, arXiv 2006.04388).

    A cell's first channels are logits of reg_max bins for each of left, top, right and bottom: the distance from the
    cell's centre is the softmax's mean, in strides. One bin is the distance itself. Its other channels are class logits,
    each with a sigmoid of its own. strides: of the maps, in pixels. size: height and width of the image in pixels.
    The choice of detections is, by default, that with which ultralytics evaluates.
    """

    background: ClassVar[bool] = False

    strides: tuple[int, ...]
    size: tuple[int, int]
    reg_max: int = 16
    score_thresh: float = 0.001
    nms_thresh: float = 0.7
    topk_candidates: int = 1000
    detections_per_img: int | None = 300

    @property
    def expects(self) -> str:
        maps = [tuple(side // stride for side in self.size) for stride in self.strides]
        uneven = any(side % max(self.strides) for side in self.size)
        remedy = f"; --image_size must be multiples of {max(self.strides)}" if uneven else ""
        return (
            f"a detector with a DistributionFocalCoder must return a list of {len(maps)} maps "
            f"[N, {4 * self.reg_max} + classes, height, width] of {', '.join(f'{rows}x{columns}' for rows, columns in maps)} cells{remedy}"
        )

    def fits(self, outputs: Sequence[Tensor]) -> bool:
        outputs = [outputs] if isinstance(outputs, Tensor) and len(self.strides) == 1 else outputs
        if not isinstance(outputs, tuple | list) or not all(isinstance(one, Tensor) for one in outputs):
            return False
        shapes = [tuple(one.shape[1:]) for one in outputs]
        wanted = [tuple(side // stride for side in self.size) for stride in self.strides]
        channels = {shape[0] for shape in shapes if len(shape) == 3}
        return [shape[1:] for shape in shapes] == wanted and len(channels) == 1 and min(channels) > 4 * self.reg_max

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        height, width = self.size
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        scores, boxes = [], []
        for cells, stride in zip((one.float().cpu() for one in outputs), self.strides, strict=True):
            rows, columns = cells.shape[2:]
            distances, logits = cells.flatten(2).transpose(1, 2).tensor_split([4 * self.reg_max], 2)
            distances = stride * self._expected(distances.unflatten(2, (4, self.reg_max)))
            y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
            centres = stride * torch.stack([x.flatten(), y.flatten()], 1)
            boxes.append(torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], 2))
            scores.append(logits.sigmoid())
        corners = torch.cat(boxes, 1) / torch.tensor([width, height, width, height])
        return torch.cat(scores, 1), torchvision.ops.clip_boxes_to_image(corners, (1, 1))

    def _expected(self, bins: Tensor) -> Tensor:
        """Distances [..., 4] in strides from logits of bins [..., 4, reg_max]."""
        if self.reg_max == 1:
            return bins[..., 0]
        return bins.softmax(-1) @ torch.arange(self.reg_max, dtype=bins.dtype)
