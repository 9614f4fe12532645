"""The module that quantizes activations, in simulation."""

import torch
from torch import Tensor, nn

from utils.graph.layers import per_channel
from utils.quantization.qparams import QParams


class Quantizer(nn.Module):
    """Rounds activations [N, C, ...] to the steps of one tensor's parameters, and back.

    cap: [C], or None: a channel's own upper bound, rounded to a step. Where zero_point is quant_min this is
    also the ReLU, the ReLU6 or the CappedReLU before it. low: None, or the lower bound of the clip that it stands for,
    where the grid reaches further down. step_min: the lowest step that it gives, counted from the zero point.
    inplace: overwrite the input, where the caller knows that nobody else reads it.
    """

    def __init__(self, qparams: QParams, cap: Tensor | None = None, inplace: bool = False, low: float | None = None):
        super().__init__()
        self.qparams, self.inplace = qparams, inplace
        self.scale, self.zero_point = float(qparams.scale), int(qparams.zero_point)
        lowest = qparams.quant_min - self.zero_point
        self.step_min = lowest if low is None else max(lowest, round(max(low / self.scale, lowest)))
        self.register_buffer("cap", None if cap is None else (cap / self.scale).round().clamp(max=float(self.step_max)))
        self.register_buffer("floor", torch.tensor(float(self.step_min)), persistent=False)

    @property
    def rectifies(self) -> bool:
        """Whether it cuts what its grid could hold: a clip's lower bound."""
        return self.step_min > self.qparams.quant_min - self.zero_point

    @property
    def step_max(self) -> int:
        """quant_max, counted from the zero point."""
        return self.qparams.quant_max - self.zero_point

    def round_(self, steps: Tensor) -> Tensor:
        """Round values in units of scale to steps that are counted from the zero point; in place."""
        steps.round_()
        if self.cap is None:
            return steps.clamp_(self.step_min, self.step_max)
        return torch.clamp(steps, self.floor, per_channel(self.cap, steps.dim()), out=steps)

    def forward(self, x: Tensor) -> Tensor:
        # Equal to torch.fake_quantize_per_tensor_affine, which writes a mask besides, in fewer passes over
        # memory. Rounding is to even, before the clamp, as in that kernel.
        steps = x.mul_(1 / self.scale) if self.inplace else x * (1 / self.scale)
        return self.round_(steps).mul_(self.scale)

    def extra_repr(self) -> str:
        low, high = (self.scale * step for step in (self.step_min, self.step_max))
        capped = "" if self.cap is None else f", capped channels={int((self.cap < self.step_max).sum())}"
        count = self.qparams.quant_max - self.qparams.quant_min + 1
        return f"[{low:.4g}, {high:.4g}] in {count} steps, zero at {self.zero_point}{capped}"
