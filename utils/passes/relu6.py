"""ReLU6: replaced by ReLU as the published method does, or kept exact with bounds of its own for every channel."""

import math

import torch
from torch import Tensor, fx

from utils.graph.layers import Clip
from utils.graph.nodes import module_of
from utils.graph.regions import ChannelSlice
from utils.passes.log import PassLog


def replace_relu6(model: fx.GraphModule, log: PassLog) -> None:
    """Replace every ReLU6 by ReLU; changes the network's function (section 5.1.1)."""
    for node in model.graph.nodes:
        clip = module_of(model, node)
        if isinstance(clip, Clip) and clip.rectifies and bool((clip.high == 6).all()):
            clip.high = torch.tensor(math.inf)
            log.applied("replaced ReLU6 by ReLU", node.target)


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
