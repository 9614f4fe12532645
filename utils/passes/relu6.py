"""ReLU6: replaced by ReLU as the published method does, or kept exact with a cap for every channel."""

import torch
from torch import Tensor, fx, nn

from utils.graph.capture import module_of, shape
from utils.graph.layers import CappedReLU
from utils.graph.regions import Port
from utils.passes.log import PassLog


def replace_relu6(model: fx.GraphModule, log: PassLog) -> None:
    """Replace every ReLU6 by ReLU; changes the network's function (section 5.1.1)."""
    for node in model.graph.nodes:
        if isinstance(module_of(model, node), nn.ReLU6):
            model.set_submodule(node.target, nn.ReLU())
            log.applied("replaced ReLU6 by ReLU", node.target)


def channel_caps(model: fx.GraphModule, clip: Port, channels: int) -> Tensor:
    """The caps [channels] that a ReLU6 or CappedReLU puts on the channels of a layer before it."""
    module = model.get_submodule(clip.name)
    if isinstance(module, CappedReLU):
        return module.cap[clip.columns(channels)].view(channels, clip.repeat)[:, 0]
    return torch.full((channels,), 6.0)


def scale_caps(model: fx.GraphModule, clip: Port, factor: Tensor) -> None:
    """Multiply a clip's caps of a layer's channels by factor [C]; a ReLU6 first becomes a CappedReLU.

    So a ReLU6 stays exact when its channels are scaled: min(max(x / s, 0), 6 / s) is relu6(x) / s.
    """
    cap = _cap(model, clip)
    cap[clip.columns(len(factor))] *= clip.spread(factor)


def lower_caps(model: fx.GraphModule, clip: Port, amount: Tensor) -> None:
    """Subtract amount [C] from a clip's caps of a layer's channels; a ReLU6 first becomes a CappedReLU."""
    cap = _cap(model, clip)
    cap[clip.columns(len(amount))] -= clip.spread(amount)


def _cap(model: fx.GraphModule, clip: Port) -> Tensor:
    """The caps of a CappedReLU, to be written to; a ReLU6 becomes one."""
    module = model.get_submodule(clip.name)
    if isinstance(module, nn.ReLU6):
        node = next(node for node in model.graph.nodes if node.target == clip.name)
        module = CappedReLU(torch.full((shape(node)[1],), 6.0))
        model.set_submodule(clip.name, module)
    return module.cap
