"""ReLU6: replaced by ReLU as the published method does, or kept exact with bounds of its own for every channel."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from utils.calibration.moments import Gaussian, Statistics, Unknown, clipped_gaussian
from utils.calibration.ranges import ChannelRanges, RangeOf
from utils.graph.layers import Clip
from utils.graph.nodes import module_of
from utils.graph.regions import ChannelSlice
from utils.passes.log import PassLog
from utils.quantization.qparams import activation_qparams

NEGLIGIBLE = 0.01  # of a tensor's rounding noise
# Activations' tails are heavier than a Gaussian's: values at 12 deviations were seen behind depthwise convolutions. This many
# times as wide a Gaussian has such tails.
TAILS = 2.0


def replace_relu6(model: fx.GraphModule, log: PassLog) -> None:
    """Replace every ReLU6 by ReLU; changes the network's function (section 5.1.1)."""
    for node in model.graph.nodes:
        clip = module_of(model, node)
        if isinstance(clip, Clip) and clip.rectifies and bool((clip.high == 6).all()):
            clip.high = torch.tensor(math.inf)
            log.applied("replaced ReLU6 by ReLU", node.target)


def drop_idle_caps(
    model: fx.GraphModule,
    statistics: Statistics,
    range_of: RangeOf,
    bits: int,
    signed: bool,
    extremes_on_images: Callable[[], ChannelRanges] | None,
    log: PassLog,
) -> None:
    """Drop the caps per channel of tensors where next to nothing gets there, by BatchNorm and on all images. Ours.

    An engine pays for every tensor that has one, and gets nothing for it where what the caps cut is under NEGLIGIBLE of the
    tensor's rounding noise. model: that will be simulated; the float network keeps its caps. range_of, bits, signed: as
    activations will be quantized. extremes_on_images: what layers give on the images of the run, if it has some.
    """
    for node in model.graph.nodes:
        clip = module_of(model, node)
        if not isinstance(clip, Clip) or not clip.rectifies or not clip.high.dim():
            continue
        layer, range_ = node.args[0].target, range_of(node)
        if layer not in statistics or isinstance(range_, Unknown) or bool((clip.high >= range_[1]).all()):
            continue
        step = activation_qparams(*map(torch.tensor, range_), bits, signed).scale
        known = statistics[layer]
        cut = _cut_above(Gaussian(known.mean, TAILS**2 * known.variance), clip.high).mean()
        if not bool(cut < NEGLIGIBLE * step**2 / 12):
            continue
        if extremes_on_images is None or bool((extremes_on_images()[layer][1] <= clip.high).all()):
            clip.high = torch.tensor(math.inf)
            log.applied("dropped caps that nothing reaches", node.target, "ReLU6 is a ReLU there")


def _cut_above(known: Gaussian, caps: Tensor) -> Tensor:
    """The mean square [C] of what lies above the caps, E[max(x - cap, 0)^2], of Gaussian channels."""
    mean, variance = clipped_gaussian(known.mean - caps, known.variance, torch.tensor(0.0), torch.tensor(math.inf))
    return variance + mean**2


def channel_caps(model: fx.GraphModule, clip: ChannelSlice, channels: int) -> Tensor:
    """The upper bounds [channels] that a Clip puts on a region's channels."""
    return -clip.reduce(-_bounds(model, clip, "high"), channels, lowest=-math.inf)


def channel_reach(model: fx.GraphModule, clip: ChannelSlice, channels: int) -> Tensor:
    """The largest absolute value [channels] that a Clip lets through."""
    largest = torch.maximum(_bounds(model, clip, "high"), -_bounds(model, clip, "low"))
    return clip.reduce(largest, channels)


def scale_bounds(model: fx.GraphModule, clip: ChannelSlice, factor: Tensor) -> None:
    """Multiply a Clip's bounds by the factor [C] of a region's channels.

    So a ReLU6 stays exact when its channels are scaled: min(max(x / s, 0), 6 / s) is relu6(x) / s.
    """
    module = model.get_submodule(clip.name)
    for side in ("low", "high"):
        if (getattr(module, side) != 0).any():
            setattr(module, side, _bounds(model, clip, side) * clip.gather(factor, 1))


def lower_caps(model: fx.GraphModule, clip: ChannelSlice, amount: Tensor) -> None:
    """Subtract amount [C] from the upper bounds of a region's channels."""
    model.get_submodule(clip.name).high = _bounds(model, clip, "high") - clip.gather(amount, 0)


def _bounds(model: fx.GraphModule, clip: ChannelSlice, side: str) -> Tensor:
    """A Clip's lower or upper bounds, one for each channel."""
    return getattr(model.get_submodule(clip.name), side).expand(len(clip.index)).clone()
