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
from utils.graph.capture import module_of, weighted_nodes
from utils.graph.layers import channels_in, input_sums, scale_inputs, taps
from utils.graph.regions import Link, Port, find_links
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

    A channel that is constantly 0 can be cleared anywhere; another constant is moved to the reader's bias where no
    padding interferes.
    """
    moments = propagate(model, spec, statistics)
    nodes = {node.target: node for node in weighted_nodes(model)}
    corrected = dict(statistics)
    for region in find_links(model)[0]:
        name = region.producer
        source = moments.get(nodes[name].args[0].name)
        if not isinstance(source, Moments) or not region.rectified:
            continue
        low, high = activation_bounds(model, nodes[name], source, region)
        constant = high - low <= 1e-5 * high.max().clamp_min(1e-6)
        found = _Constants(name, constant, constant & (high <= 0), (low + high) / 2)
        if name in statistics:  # what BatchNorm remembers of a channel that has died since is wrong
            known, bias = statistics[name], module_of(model, nodes[name]).bias
            mean = torch.where(constant & ~found.zero, bias, known.mean)
            corrected[name] = Gaussian(mean, known.variance.masked_fill(constant, 0))
        for reader in region.readers:
            _clear(model, reader, found, log)
    return corrected


def activation_bounds(model: fx.GraphModule, node: fx.Node, source: Moments, region: Link) -> tuple[Tensor, Tensor]:
    """The smallest and largest value [C] that a layer's channels can take behind their activation,
    whatever its inputs do within their own ranges."""
    layer = module_of(model, node)
    largest = torch.maximum(source.low.abs().max(), source.high.abs().max())  # of any channel: ranges are estimates
    reach = taps(layer).abs().sum((2, 3)).reshape(-1) * largest
    low, high = ((layer.bias + side * reach).clamp_min(0) for side in (-1, 1))
    for clip in region.clips:
        cap = channel_caps(model, clip, region.channels)
        low, high = torch.minimum(low, cap), torch.minimum(high, cap)
    return low, high


def _clear(model: fx.GraphModule, reader: Port, found: _Constants, log: PassLog) -> None:
    """Clear a reader's columns of the channels that are constantly 0, or constant where that is exact."""
    layer = model.get_submodule(reader.name)
    clearable = found.constant if reader.keeps_constants else found.zero
    for channel in (found.constant & ~clearable).nonzero().flatten().tolist():
        reason = "constant is not 0 and the reader pads with zeros"
        log.skipped(ACTION, f"{found.layer}[{channel}] in {reader.name}", reason)
    if not clearable.any():
        return
    moved = torch.where(clearable & ~found.zero, found.value, torch.zeros_like(found.value))
    layer.bias.data.add_(input_sums(layer, reader.across(channels_in(layer), moved, elsewhere=0)))
    scale_inputs(layer, reader.across(channels_in(layer), (~clearable).float(), elsewhere=1))
    for channel in clearable.nonzero().flatten().tolist():
        constant = f"constant {float(found.value[channel]):.3g}"
        log.applied(ACTION, f"{found.layer}[{channel}] in {reader.name}", constant)
