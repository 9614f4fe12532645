"""GPTQ: a layer's weights are rounded one input after the other, with error compensation.

What a layer reads is correlated: neighbouring pixels are alike, and so are channels. The nearest steps are then not
the best ones. What each rounding does to the output is passed on to the inputs that are still to come, as well as
these can compensate for it (Frantar et al., Optimal Brain Compression, NeurIPS 2022; GPTQ, ICLR 2023,
arXiv 2210.17323).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.graph.layers import grouped_weight, padding
from utils.passes.log import PassLog
from utils.quantization.qparams import QParams

ACTION = "rounded with GPTQ"

POSITIONS = 2**15  # of a layer's output that the moments of its input are taken over, spread at random over the images
DAMPING = 0.1  # of the mean power: how far inputs are also taken to vary on their own, since images are few
BLOCK = 128  # inputs that are rounded before their errors reach the later ones, which saves passes over memory


def gptq_round_layer(name: str, layer: nn.Module, exact: Tensor, x: Tensor, log: PassLog) -> None:
    """Round one layer's weights again, from their exact values, by what the layer reads on images.

    exact: shaped like the layer's weight. x: the layer's input [N, C, H, W] or [N, ..., C].
    """
    qparams = layer.weight_qparams
    if qparams is None:
        log.skipped(ACTION, name, "its weights are not quantized")
        return
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        log.skipped(ACTION, name, f"not written for {type(layer).__name__}")
        return
    nearest, wanted = grouped_weight(layer), grouped_weight(layer, exact).double()
    moment = second_moment(layer, x)
    rounded = gptq_round(wanted, moment, qparams).view(nearest.shape)
    before, after = (_output_noise(weights - wanted, moment) for weights in (nearest, rounded))
    gain = 10 * float((before / after.clamp_min(1e-30)).clamp_min(1e-30).log10())
    nearest.copy_(rounded)
    log.applied(ACTION, name, f"{gain:.1f} dB less noise than the nearest steps")


def _output_noise(error: Tensor, moment: Tensor) -> Tensor:
    """Power that an error of the weights [groups, out, in, positions] adds to the layer's output."""
    error = error.flatten(2)
    return (error @ moment * error).sum()


def second_moment(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    """E[x x^T] of what each output of the layer reads: [groups, D, D] in float64, D = in / groups * kernel positions.

    x: the layer's input [N, C, H, W] or [N, ..., C]. Not about the mean: other data than these have another one.
    """
    generator = torch.Generator().manual_seed(0)
    products, count = torch.zeros((), dtype=torch.double), 0
    for image in x.split(1):
        read = _columns(layer, image)  # [groups, D, positions]
        share = torch.randperm(read.shape[2], generator=generator)[: max(1, POSITIONS // len(x))]
        read = read[:, :, share.to(read.device)]
        products = products.to(read.device) + (read @ read.transpose(1, 2)).double()
        count += len(share)
    return products / count


def _columns(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    """[groups, D, positions] of one image: all that the layer's outputs read."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2).T[None]
    before, after = padding(layer)
    sides = [side for axis in (1, 0) for side in (before[axis], after[axis])]
    padded = F.pad(x, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    read = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    return read[0].reshape(layer.groups, -1, read.shape[2])


def gptq_round(exact: Tensor, moment: Tensor, qparams: QParams) -> Tensor:
    """The rounded weights [groups, out, D] in float64.

    exact: [groups, out, in, positions] before rounding. moment: [groups, D, D] of what they read; see second_moment.
    """
    groups, out = exact.shape[:2]
    scale, zero = (part.double().expand(groups * out).view(groups, out) for part in (qparams.scale, qparams.zero_point))

    def nearest(weights: Tensor) -> Tensor:
        return (((weights / scale).round() + zero).clamp(qparams.quant_min, qparams.quant_max) - zero) * scale

    power = moment.diagonal(dim1=1, dim2=2)
    order = power.argsort(1, descending=True)  # first those whose error would weigh most
    weights = _take(exact.flatten(2).double(), order, 2)
    damped = moment + torch.diag_embed((DAMPING * power.mean(1, keepdim=True)).clamp_min(1e-30).expand_as(power))
    damped = _take(_take(damped, order, 1), order, 2)
    # Row i of this factor, over its diagonal: how the inputs after i compensate for an error at i.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    rounded = torch.empty_like(weights)
    for first in range(0, weights.shape[2], BLOCK):
        end = min(first + BLOCK, weights.shape[2])
        errors = torch.empty_like(weights[:, :, first:end])
        for i in range(first, end):
            rounded[:, :, i] = nearest(weights[:, :, i])
            error = (weights[:, :, i] - rounded[:, :, i]) / factor[:, i, i, None]
            weights[:, :, i:end] -= error[:, :, None] * factor[:, None, i, i:end]
            errors[:, :, i - first] = error
        weights[:, :, end:] -= errors @ factor[:, first:end, end:]
    return _take(rounded, order.argsort(1), 2)


def _take(values: Tensor, order: Tensor, axis: int) -> Tensor:
    """values [G, ...] with that axis in each group's own order [G, D]."""
    index = order[:, :, None] if axis == 1 else order[:, None, :]
    return values.gather(axis, index.expand_as(values))
