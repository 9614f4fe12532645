"""Dead channels: weights that read constant channels are cleared, so that they do not set a layer's range.

Training leaves channels whose weights have decayed to nothing: their output is a constant, act(b).
A BatchNorm behind such a channel saw no variance, so folding multiplied the weights that read it by
up to 1 / sqrt(eps), and these set the range of the whole layer. Not in the paper.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from utils.calibration.moments import Gaussian, Moments, Statistics, propagate
from utils.core.input_spec import InputSpec
from utils.graph.layers import grouped_weight, input_sums, scale_inputs
from utils.graph.nodes import module_of, weighted_nodes
from utils.graph.regions import ChannelSlice, Region, find_regions
from utils.passes.log import PassLog
from utils.passes.relu6 import channel_caps

ACTION = "cleared dead channels"


@dataclass(frozen=True)
class _Constants:
    """Which channels [C] of a layer are constant behind their activation, which of these are 0, and their values."""

    layer: str
    constant: Tensor
    zero: Tensor
    value: Tensor


def clear_dead_channels(model: fx.GraphModule, spec: InputSpec, statistics: Statistics, log: PassLog) -> Statistics:
    """Zero the weights that read constant channels, keeping the output as it is; returns the true statistics.

    A channel that is constantly 0 can be cleared anywhere; another constant is moved to the sink's bias where no
    padding interferes.
    """
    moments = propagate(model, spec, statistics)
    nodes = {node.target: node for node in weighted_nodes(model)}
    corrected = dict(statistics)
    for region in find_regions(model)[0]:
        name = region.source
        source = moments.get(nodes[name].args[0].name) if region.rectified and name in nodes else None
        if not isinstance(source, Moments):
            continue
        low, high = activation_bounds(model, nodes[name], source, region)
        constant = high - low <= 1e-5 * high.max().clamp_min(1e-6)
        found = _Constants(name, constant, constant & (high <= 0), (low + high) / 2)
        if name in statistics:  # what BatchNorm remembers of a channel that has died since is wrong
            known, bias = statistics[name], module_of(model, nodes[name]).bias
            mean = torch.where(constant & ~found.zero, bias, known.mean)
            corrected[name] = Gaussian(mean, known.variance.masked_fill(constant, 0))
        for sink in region.sinks:
            _clear(model, sink, found, log)
    return corrected


def activation_bounds(model: fx.GraphModule, node: fx.Node, source: Moments, region: Region) -> tuple[Tensor, Tensor]:
    """The smallest and largest value [C] that a layer's channels can take behind their activation,
    whatever its inputs do within their own ranges."""
    layer = module_of(model, node)
    largest = torch.maximum(source.low.abs().max(), source.high.abs().max())  # of any channel: ranges are estimates
    reach = grouped_weight(layer).abs().sum((2, 3)).reshape(-1) * largest
    low, high = ((layer.bias + side * reach).clamp_min(0) for side in (-1, 1))
    for clip in region.clips:
        cap = channel_caps(model, clip, region.channels)
        low, high = torch.minimum(low, cap), torch.minimum(high, cap)
    return low, high


def _clear(model: fx.GraphModule, sink: ChannelSlice, found: _Constants, log: PassLog) -> None:
    """Clear a sink's columns of the channels that are constantly 0, or constant where that is exact."""
    layer = model.get_submodule(sink.name)
    clearable = found.constant if sink.keeps_constants else found.zero
    for channel in (found.constant & ~clearable).nonzero().flatten().tolist():
        reason = "constant is not 0 and the sink pads with zeros"
        log.skipped(ACTION, f"{found.layer}[{channel}] in {sink.name}", reason)
    if not clearable.any():
        return
    moved = torch.where(clearable & ~found.zero, found.value, torch.zeros_like(found.value))
    layer.bias.data.add_(input_sums(layer, sink.gather(moved, elsewhere=0)))
    scale_inputs(layer, sink.gather((~clearable).float(), elsewhere=1))
    for channel in clearable.nonzero().flatten().tolist():
        constant = f"constant {float(found.value[channel]):.3g}"
        log.applied(ACTION, f"{found.layer}[{channel}] in {sink.name}", constant)
