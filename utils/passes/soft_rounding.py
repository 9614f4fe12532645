"""Layers and quantizers while their rounding is learned: every weight between two steps, by a variable of its own.

AdaRound (Nagel et al., ICML 2020, arXiv 2004.10568): a weight is scale * (floor + h(v)), with h a sigmoid that is
stretched beyond [0, 1] and cut to it, and a penalty that drives every h to 0 or 1. The floor stays what it was while
the scale is learned too (GENIE, Jeon et al., CVPR 2023). Steps of activations learn by the gradient of LSQ (Esser et
al., ICLR 2020, arXiv 1902.08153). Whatever is learned ends as an ordinary layer and an ordinary quantizer.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from utils.graph.layers import grouped_weight, per_channel
from utils.quantization.qparams import QParams
from utils.quantization.quantizer import Quantizer

STRETCH = (-0.1, 1.1)  # of the sigmoid; what goes beyond [0, 1] is cut, so that 0 and 1 are reached
SURE = 0.98  # how near to a step variables may start


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(v) in [0, 1], equation 23 of AdaRound."""
    low, high = STRETCH
    return (torch.sigmoid(v) * (high - low) + low).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The v of an h inside (0, 1)."""
    low, high = STRETCH
    return torch.logit((h - low) / (high - low))


def rounding_penalty(h: Tensor, beta: float) -> Tensor:
    """Mean of 1 - |2h - 1|^beta, equation 24: 0 where every h is 0 or 1."""
    return 1 - (2 * h - 1).abs().pow(beta).mean()


class SoftLayer(nn.Module):
    """A layer whose weights lie between two neighbouring steps.

    layer: with qparams, rounded already, which says between which steps. exact: its weights before rounding. trust: how
    far each variable starts from where the exact weight lies towards the rounded one. unit: [C_out] in which the bias's
    shift is learned.
    """

    def __init__(self, layer: nn.Module, exact: Tensor, trust: float, unit: Tensor):
        super().__init__()
        self.layer, qparams = layer, layer.weight_qparams
        self.qparams = qparams
        view = grouped_weight(layer)
        self.along = (*view.shape[:2], 1, 1) if qparams.per_channel else ()
        self.zero = qparams.zero_point.view(self.along).float().to(view.device)
        self.start = scale = qparams.scale.view(self.along).to(view.device)
        wanted, rounded = grouped_weight(layer, exact) / scale + self.zero, (view / scale).round() + self.zero
        # The rounded weight is one of the two steps, and the exact one lies on its side of it.
        self.floor = torch.where((rounded > wanted) & (rounded > qparams.quant_min), rounded - 1, rounded)
        self.floor = torch.minimum(self.floor, torch.full_like(self.floor, qparams.quant_max - 1))
        part = (wanted - self.floor).clamp(0, 1)
        part = part + trust * ((rounded - self.floor) - part)
        self.v = nn.Parameter(inverse_rectified_sigmoid(part.clamp(1 - SURE, SURE)))
        self.log_scale = nn.Parameter(torch.zeros_like(scale))
        self.bias_shift = nn.Parameter(torch.zeros_like(layer.bias))
        self.bias_unit = unit

    @property
    def h(self) -> Tensor:
        return rectified_sigmoid(self.v)

    @property
    def scale(self) -> Tensor:
        return self.start * self.log_scale.exp()

    @property
    def bias(self) -> Tensor:
        return self.layer.bias + self.bias_unit * self.bias_shift

    def weight(self, h: Tensor) -> Tensor:
        """Shaped like the layer's, for h of every weight."""
        steps = (self.floor + h).clamp(self.qparams.quant_min, self.qparams.quant_max) - self.zero
        view = steps * self.scale
        view = view.transpose(1, 2) if isinstance(self.layer, _ConvTransposeNd) else view
        return view.reshape(self.layer.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.layer, {"weight": self.weight(self.h), "bias": self.bias}, (x,))

    def hard(self) -> tuple[Tensor, Tensor, QParams]:
        """Weight, bias and qparams as they are once every h is 0 or 1."""
        weight = self.weight((self.h > 0.5).float()).detach()
        scale = self.scale.detach().reshape(self.qparams.scale.shape)
        return weight, self.bias.detach().clone(), replace(self.qparams, scale=scale)


class _RoundSteps(torch.autograd.Function):
    """x rounded to steps of a scale and cut; the gradients pass as in LSQ. mixed: [N, C, 1, ...], where not to round."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, low: float, high: Tensor, mixed: Tensor | None) -> Tensor:
        steps = x / scale
        cut = torch.clamp(steps, torch.full_like(high, low), high)
        rounded = cut.round()
        ctx.save_for_backward(steps, scale, high, mixed)
        ctx.low = low
        return (rounded if mixed is None else torch.where(mixed, cut, rounded)) * scale

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        steps, scale, high, mixed = ctx.saved_tensors
        inside = (steps >= ctx.low) & (steps <= high)
        of_scale = None
        if ctx.needs_input_grad[1]:
            cut = torch.clamp(steps, torch.full_like(high, ctx.low), high)
            rounded = cut.round() if mixed is None else torch.where(mixed, cut, cut.round())
            of_scale = (grad * torch.where(inside, rounded - steps, rounded)).sum().reshape(scale.shape)
        return grad * inside, of_scale, None, None, None


class SoftQuantizer(nn.Module):
    """A quantizer whose scale is learned, and which leaves a random part of its channels unrounded (QDrop).

    drop: the share of channels, of every image, that are cut to the range alone. learn: whether the scale is.
    """

    def __init__(self, quantizer: Quantizer, drop: float, learn: bool, generator: torch.Generator):
        super().__init__()
        self.quantizer, self.drop, self.generator = quantizer, drop, generator
        self.log_scale = nn.Parameter(torch.zeros((), device=quantizer.floor.device), requires_grad=learn)

    @property
    def scale(self) -> Tensor:
        return self.quantizer.scale * self.log_scale.exp()

    def forward(self, x: Tensor) -> Tensor:
        q, scale = self.quantizer, self.scale
        high = torch.full((), float(q.step_max), device=x.device)
        if q.cap is not None:
            high = per_channel((q.cap * (q.scale / scale.detach())).round().clamp(max=q.step_max), x.dim())
        mixed = None
        if self.drop:
            shape = (*x.shape[:2], *[1] * (x.dim() - 2))
            mixed = (torch.rand(shape, generator=self.generator) < self.drop).to(x.device)
        return _RoundSteps.apply(x, scale, float(q.step_min), high, mixed)

    @property
    def factor(self) -> float:
        """By what the scale was changed."""
        return float(self.log_scale.detach().exp())


def scaled_quantizer(quantizer: Quantizer, factor: float) -> Quantizer:
    """A quantizer with its scale times a factor, and the same zero point; caps keep their values."""
    cap = None if quantizer.cap is None else quantizer.cap * quantizer.scale
    low = quantizer.step_min * quantizer.scale if quantizer.rectifies else None
    return Quantizer(replace(quantizer.qparams, scale=quantizer.qparams.scale * factor), cap, low=low)
