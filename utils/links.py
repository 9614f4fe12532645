"""From producers to readers: whose channels can be rescaled, and where they arrive."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from utils.graph import ASKS_SHAPE, describe, module_of, shape, weighted_nodes
from utils.layers import WEIGHTED, CappedReLU, channels_out, sees_padding


@dataclass(frozen=True)
class Port:
    """Where a producer's channels arrive in a module.

    name: the module. offset: the first of its input channels that is the producer's. repeat: how
    many consecutive ones each producer channel owns (positions, after a flatten).
    keeps_constants: whether a constant channel is the same constant at every tap of the module:
    no zeros were padded on the way, nor are by the module.
    """

    name: str
    offset: int = 0
    repeat: int = 1
    keeps_constants: bool = True

    def columns(self, channels: int) -> slice:
        return slice(self.offset, self.offset + channels * self.repeat)

    def spread(self, values: Tensor) -> Tensor:
        """[C] of the producer's channels -> one value for each input channel of this port."""
        return values.repeat_interleave(self.repeat)

    def across(self, inputs: int, values: Tensor, elsewhere: float) -> Tensor:
        """[C] of the producer's channels -> [inputs], with `elsewhere` for input channels of other producers."""
        everywhere = torch.full((inputs,), elsewhere, dtype=values.dtype)
        everywhere[self.columns(len(values))] = self.spread(values)
        return everywhere


@dataclass(frozen=True)
class Link:
    """A layer, and all the layers that read its channels and nothing but its channels' scale.

    clips: the ReLU6 and CappedReLU on the way, whose caps scale with the channels.
    rectified: whether every way leads through a ReLU or one of these.
    """

    producer: str
    channels: int
    readers: tuple[Port, ...]
    clips: tuple[Port, ...]
    rectified: bool


@dataclass(frozen=True)
class _Way:
    """What has happened to the channels between the producer and a node."""

    port: Port
    rectified: bool


# f(s x) = s f(x) for every s > 0, channel by channel.
_HOMOGENEOUS = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.ZeroPad2d,
    nn.Upsample,
    nn.UpsamplingBilinear2d,
    nn.UpsamplingNearest2d,
)


class _Refused(Exception):
    """Why a producer's channels cannot be scaled."""


def find_links(model: fx.GraphModule) -> tuple[list[Link], dict[str, str]]:
    """Every layer whose output channels can be rescaled, with its readers; and why the others cannot.

    The second is the reason by the layer's name, such as "read by add `add_3`".
    """
    links, refused = [], {}
    for node in weighted_nodes(model):
        producer = module_of(model, node)
        if isinstance(producer, nn.Linear) and len(shape(node)) != 2:
            refused[node.target] = "its channels are not the second axis"
            continue
        readers, clips = [], []
        try:
            rectified = _walk(model, node, _Way(Port(""), False), readers, clips)
        except _Refused as reason:
            refused[node.target] = str(reason)
            continue
        links.append(Link(node.target, channels_out(producer), tuple(readers), tuple(clips), rectified))
    return links, refused


def _walk(model: fx.GraphModule, node: fx.Node, way: _Way, readers: list[Port], clips: list[Port]) -> bool:
    """Follow the channels to their readers; whether every way was rectified."""
    rectified = True
    for user in node.users:
        if user.target in ASKS_SHAPE:
            continue
        module = module_of(model, user)
        if isinstance(module, WEIGHTED):
            if isinstance(module, nn.Linear) and len(shape(node)) != 2:
                raise _Refused(f"read by linear layer {user.target!r} along another axis")
            constant = way.port.keeps_constants and not sees_padding(module)
            readers.append(replace(way.port, name=user.target, keeps_constants=constant))
            rectified &= way.rectified
        else:
            rectified &= _walk(model, user, _step(module, user, node, way, clips), readers, clips)
    return rectified


def _step(module: nn.Module | None, user: fx.Node, node: fx.Node, way: _Way, clips: list[Port]) -> _Way:
    """The way after one operation that reads the node."""
    port = way.port
    if isinstance(module, nn.ReLU6 | CappedReLU):
        clips.append(replace(port, name=user.target))
        return replace(way, rectified=True)
    if isinstance(module, nn.PReLU) and module.num_parameters > 1 and port.offset:
        raise _Refused(f"read by {user.target!r} after a concat")
    if isinstance(module, _HOMOGENEOUS):
        pads = isinstance(module, nn.ZeroPad2d) or (
            isinstance(module, nn.AvgPool2d) and module.padding not in (0, (0, 0))
        )
        constant = port.keeps_constants and not pads
        return _Way(replace(port, keeps_constants=constant), way.rectified or isinstance(module, nn.ReLU))
    if isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
        positions = shape(node)[2:].numel()
        return replace(way, port=replace(port, offset=port.offset * positions, repeat=port.repeat * positions))
    if user.target is torch.cat and user.op == "call_function":
        parts, dim = user.args[0], user.args[1] if len(user.args) > 1 else user.kwargs.get("dim", 0)
        if dim in (1, 1 - len(shape(node))) and list(parts).count(node) == 1:
            before = sum(shape(part)[1] for part in parts[: list(parts).index(node)])
            return replace(way, port=replace(port, offset=port.offset + before))
    if user.target is F.interpolate and user.args[:1] == (node,):
        return way
    if user.target is F.pad and user.kwargs.get("mode", "constant") == "constant" and not any(user.args[2:]):
        return replace(way, port=replace(port, keeps_constants=False))
    raise _Refused(f"read by {describe(module, user)}")
