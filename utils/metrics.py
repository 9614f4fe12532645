"""What the tasks are scored by: accumulators that take batches and give percentages."""

import torch
from torch import Tensor


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


def sqnr(reference: Tensor, noisy: Tensor) -> float:
    """Signal-to-quantization-noise ratio of two tensors of one shape, in dB."""
    noise = (reference - noisy).square().mean()
    return float(10 * torch.log10(reference.square().mean() / noise.clamp_min(1e-30)))
