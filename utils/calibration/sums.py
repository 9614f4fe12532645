"""How the terms of a sum go together, of which no BatchNorm tells: measured on rendered noise. Ours.

Terms that come from one image are not independent, least of all those of a chain of residual blocks, whose sums add up.
Ratios to independent terms are no question of scale, and are much the same on noise with the spectrum of photographs as on
photographs, whatever the values themselves are there.
"""

import math

import torch
from torch import Tensor, fx

from utils.calibration.moments import TOGETHER, Together
from utils.calibration.observers import observe
from utils.calibration.rendered import natural_noise
from utils.core.input_spec import InputSpec
from utils.graph.ops import operator_of

IMAGES = 8
APART = 1.1  # times independent terms' variance, up to which extremes of few images that coincide are chance


def measure_sums(model: fx.GraphModule, spec: InputSpec) -> None:
    """Note on every sum of two tensors of a folded network how its variance and its reach compare to independent terms'."""
    sums = [node for node in model.graph.nodes if _is_sum(node)]
    if not sums:
        return
    wanted, seen = {part for node in sums for part in (node, *node.args[:2])}, {}

    def see(node: fx.Node, value: Tensor) -> None:
        if node in wanted:
            seen.setdefault(node, []).append(_spread(value))

    batch = model.meta["batch"] or 1
    noise = natural_noise(spec, math.ceil(IMAGES / batch) * batch, torch.Generator().manual_seed(0))
    observe(model, noise.clamp(*spec.range()), see)
    for node in sums:
        total, x, y = (torch.stack(seen[one]).mean(0) for one in (node, *node.args[:2]))
        if node.target is torch.ops.aten.sub.Tensor:
            y = y[[0, 2, 1]]
        apart = torch.stack([x[0] + y[0], torch.hypot(x[1], y[1]), torch.hypot(x[2], y[2])])
        variance, below, above = (total / apart.clamp_min(1e-30)).nan_to_num(1.0).tolist()
        reach = (min(max(ratio, 1.0), math.sqrt(2)) if variance > APART else 1.0 for ratio in (below, above))
        node.meta[TOGETHER] = Together(min(variance, 2.0), *reach)


def _is_sum(node: fx.Node) -> bool:
    row = operator_of(node)
    parts = node.args[:2]
    return row is not None and row.moments == "sum" and all(_is_float(part) for part in parts)


def _is_float(part: object) -> bool:
    """Whether it is a tensor that the network computes from its images."""
    about = part.meta.get("tensor_meta") if isinstance(part, fx.Node) and part.op != "get_attr" else None
    return about is not None and about.dtype.is_floating_point


def _spread(value: Tensor) -> Tensor:
    """Variance, and how far the values reach below and above their mean."""
    low, high = value.aminmax()
    mean = value.mean()
    return torch.stack([value.var(correction=0), mean - low, high - mean])
