"""High-bias absorption: what channels almost never fall below moves to the layers that read them (section 4.1.3)."""

import torch
from torch import Tensor, fx

from utils.calibration.moments import Gaussian, Statistics
from utils.graph.layers import WEIGHTED, input_sums
from utils.graph.nodes import tidy
from utils.graph.regions import Region, find_regions
from utils.passes.log import PassLog
from utils.passes.relu6 import channel_caps, lower_caps

ACTION = "absorbed high biases"


def absorb_high_biases(model: fx.GraphModule, statistics: Statistics, log: PassLog) -> Statistics:
    """Move c = max(0, mean - 3 std) from a layer's bias to its sinks'; returns the statistics after that.

    relu(x - c) = relu(x) - c for all but 0.1 % of x. Only where every sink sees the constant at every tap: zero
    padding would make the border wrong.
    """
    moved = dict(statistics)
    for region in find_regions(model)[0]:
        if not isinstance(model.get_submodule(region.source), WEIGHTED):
            continue
        name, known = region.source, statistics.get(region.source)
        reason = _why_not(region, known)
        if reason:
            log.skipped(ACTION, name, reason)
            continue
        excess = (known.mean - 3 * known.variance.sqrt()).clamp_min(0)
        for clip in region.clips:  # a cap must stay above what was absorbed
            excess = torch.minimum(excess, 0.5 * channel_caps(model, clip, region.channels))
        if not (excess > 0).any():
            log.skipped(ACTION, name, "no channel has a mean above 3 deviations")
            continue
        _move_bias(model, region, excess)
        moved[name] = Gaussian(known.mean - excess, known.variance)
        log.applied(ACTION, name, f"{int((excess > 0).sum())} channels, up to {float(excess.max()):.3g}")
    tidy(model)
    return moved


def _why_not(region: Region, known: Gaussian | None) -> str | None:
    if known is None:
        return "no BatchNorm statistics"
    if not region.rectified:
        return "no ReLU on the way to its sinks"
    if not all(sink.keeps_constants for sink in region.sinks):
        return "a sink sees zero padding"
    return None


def _move_bias(model: fx.GraphModule, region: Region, excess: Tensor) -> None:
    model.get_submodule(region.source).bias.data.sub_(excess)
    for sink in region.sinks:
        layer = model.get_submodule(sink.name)
        layer.bias.data.add_(input_sums(layer, sink.gather(excess, elsewhere=0)))
    for clip in region.clips:
        lower_caps(model, clip, excess)
