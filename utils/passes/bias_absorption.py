"""High-bias absorption: what channels almost never fall below moves to the layers that read them (section 4.1.3)."""

import torch
from torch import Tensor, fx

from utils.calibration.moments import Gaussian, Statistics
from utils.graph.capture import tidy
from utils.graph.layers import channels_in, input_sums
from utils.graph.regions import Link, find_links
from utils.passes.log import PassLog
from utils.passes.relu6 import channel_caps, lower_caps

ACTION = "absorbed high biases"


def absorb_high_biases(model: fx.GraphModule, statistics: Statistics, log: PassLog) -> Statistics:
    """Move c = max(0, mean - 3 std) from a layer's bias to its readers'; returns the statistics after that.

    relu(x - c) = relu(x) - c for all but 0.1 % of x. Only where every reader sees the constant at every tap: zero
    padding would make the border wrong.
    """
    moved = dict(statistics)
    for region in find_links(model)[0]:
        name, known = region.producer, statistics.get(region.producer)
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


def _why_not(region: Link, known: Gaussian | None) -> str | None:
    if known is None:
        return "no BatchNorm statistics"
    if not region.rectified:
        return "no ReLU on the way to its readers"
    if not all(reader.keeps_constants for reader in region.readers):
        return "a reader sees zero padding"
    return None


def _move_bias(model: fx.GraphModule, region: Link, excess: Tensor) -> None:
    model.get_submodule(region.producer).bias.data.sub_(excess)
    for reader in region.readers:
        layer = model.get_submodule(reader.name)
        layer.bias.data.add_(input_sums(layer, reader.across(channels_in(layer), excess, elsewhere=0)))
    for clip in region.clips:
        lower_caps(model, clip, excess)
