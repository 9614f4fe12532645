"""From producers to readers: whose channels can be rescaled, and where they arrive."""

import operator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from utils.graph.capture import ASKS_SHAPE, describe, module_of, shape, weighted_nodes
from utils.graph.layers import CLIPS, WEIGHTED, CappedReLU, channels_out, sees_padding


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
    tied: further layers whose channels are added to the producer's, so that they have one scale.
    """

    producer: str
    channels: int
    readers: tuple[Port, ...]
    clips: tuple[Port, ...]
    rectified: bool
    tied: tuple[str, ...] = ()

    @property
    def producers(self) -> tuple[str, ...]:
        return (self.producer, *self.tied)


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


def find_links(model: fx.GraphModule, through_sums: bool = False) -> tuple[list[Link], dict[str, str]]:
    """Every layer whose output channels can be rescaled, with its readers; and why the others cannot.

    The second is the reason by the layer's name, such as "read by add `add_3`". through_sums: layers whose outputs
    are added are scaled together, by one link.
    """
    links, refused, done = [], {}, set()
    for node in weighted_nodes(model):
        if node.target in done:
            continue
        producer = module_of(model, node)
        if isinstance(producer, nn.Linear) and len(shape(node)) != 2:
            refused[node.target] = "its channels are not the second axis"
            continue
        producers = [node]
        try:
            link = _follow(model, producers, through_sums)
        except _Refused as reason:
            refused |= {tied.target: str(reason) for tied in producers}
        else:
            links.append(link)
        done |= {tied.target for tied in producers}
    return links, refused


def stored_nodes(model: fx.GraphModule, link: Link) -> dict[str, str | None]:
    """The nodes whose values an engine stores with the link's channels, by name: behind a producer's activation, with
    that producer's name, and sums, with None."""
    targets = {node.target: node for node in model.graph.nodes}
    todo, stored = [(targets[name], name) for name in link.producers], {}
    for node, producer in todo:  # grows
        users = list(node.users)
        if len(users) == 1 and isinstance(module_of(model, users[0]), CLIPS):
            todo.append((users[0], producer))
        elif node.name not in stored:
            stored[node.name] = producer
            todo += [(u, None) for u in users if u.target is operator.add or isinstance(module_of(model, u), CLIPS)]
    return stored


def _follow(model: fx.GraphModule, producers: list[fx.Node], through_sums: bool) -> Link:
    """The link of a producer; whatever sums tie to it joins the list."""
    channels = channels_out(module_of(model, producers[0]))
    readers, clips, adds, rectified = {}, {}, {}, True
    for producer in producers:  # grows
        met: list[fx.Node] | None = [] if through_sums else None
        rectified &= _walk(model, producer, _Way(Port(""), False), readers, clips, met)
        for add in met or ():
            if add in adds:
                continue
            adds[add] = None
            for origin in _origins(model, add):
                if origin not in producers:
                    producers.append(origin)
    first, *tied = (producer.target for producer in producers)
    return Link(first, channels, tuple(readers), tuple(clips), rectified and not tied, tuple(tied))


def _origins(model: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The layers whose channels a sum holds, all of them at its own channels."""
    module = module_of(model, node)
    if isinstance(module, WEIGHTED):
        return [node]
    if node.target is operator.add:
        if any(not isinstance(part, fx.Node) or shape(part) != shape(node) for part in node.args):
            raise _Refused(f"read by {describe(module, node)}, whose terms differ in shape")
        return [origin for part in node.args for origin in _origins(model, part)]
    if isinstance(module, (*_HOMOGENEOUS, nn.ReLU6, CappedReLU)):
        return _origins(model, node.args[0])
    raise _Refused(f"added to {describe(module, node)}")


def _walk(
    model: fx.GraphModule,
    node: fx.Node,
    way: _Way,
    readers: dict[Port, None],
    clips: dict[Port, None],
    adds: list[fx.Node] | None,
) -> bool:
    """Follow the channels to their readers, through adds if there is a list for them; whether every way was rectified."""
    rectified = True
    for user in node.users:
        if user.target in ASKS_SHAPE:
            continue
        module = module_of(model, user)
        if isinstance(module, WEIGHTED):
            if isinstance(module, nn.Linear) and len(shape(node)) != 2:
                raise _Refused(f"read by linear layer {user.target!r} along another axis")
            constant = way.port.keeps_constants and not sees_padding(module)
            readers[replace(way.port, name=user.target, keeps_constants=constant)] = None
            rectified &= way.rectified
        elif adds is not None and user.target is operator.add and (way.port.offset, way.port.repeat) == (0, 1):
            adds.append(user)
            rectified &= _walk(model, user, _Way(Port(""), False), readers, clips, adds)
        else:
            rectified &= _walk(model, user, _step(module, user, node, way, clips), readers, clips, adds)
    return rectified


def _step(module: nn.Module | None, user: fx.Node, node: fx.Node, way: _Way, clips: dict[Port, None]) -> _Way:
    """The way after one operation that reads the node."""
    port = way.port
    if isinstance(module, nn.ReLU6 | CappedReLU):
        clips[replace(port, name=user.target)] = None
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
