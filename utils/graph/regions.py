"""Equalization regions: layers whose output channels can be rescaled, and the input channels that make up for it.

A region is found by sending the indices of a layer's output channels through the graph in the place of its values. What
only moves values (reshape, slice, concat, shuffles) moves the indices as it moves values, so that no pass has to know how.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.graph.layers import WEIGHTED, ChannelAffine, Clip, Elementwise, sees_padding
from utils.graph.nodes import describe, is_tensor, module_of, shape
from utils.graph.ops import is_size, operator_of

aten = torch.ops.aten
ELSEWHERE = -1  # in a map of indices: not a channel of the region


@dataclass(frozen=True, eq=False)
class ChannelSlice:
    """Where a region's channels arrive in a module.

    name: the module. index: [C_in] of its input channels, the region's channel that each is, or ELSEWHERE.
    keeps_constants: whether a constant channel is the same constant at every tap of the module: no zeros were padded on the
    way, nor are by the module.
    """

    name: str
    index: Tensor
    keeps_constants: bool = True

    @cached_property
    def _own(self) -> Tensor:
        """[C_in] which of the module's channels are the region's."""
        return self.index != ELSEWHERE

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """The module's channels that are the region's, and which of the region's they are."""
        return self._own.nonzero().flatten(), self.index[self._own]

    def gather(self, values: Tensor, elsewhere: float) -> Tensor:
        """[C] of the region's channels -> [C_in] of the module's, with `elsewhere` for those of other layers."""
        return torch.where(self._own, values[self.index], elsewhere)  # ELSEWHERE is a place too, the last

    def reduce(self, values: Tensor, channels: int, lowest: float = 0.0) -> Tensor:
        """[C_in] of the module's channels -> [C]: the largest of those that are each of the region's, or `lowest`."""
        inside, places = self._places
        start = torch.full((channels,), lowest, dtype=values.dtype)
        return start.scatter_reduce(0, places, values[inside], "amax")


@dataclass(frozen=True, eq=False)
class Region:
    """Sources, layers or functions that no scale passes, with one scale for each output channel, and the sinks whose input channels make up for it.

    clips: the Clips on the way, whose bounds scale with the channels. gains: the functions at which a scale ends, since
    they multiply by it first. rectified: whether every way leads through a Clip at 0. Several sources are tied by sums.
    """

    sources: tuple[str, ...]
    channels: int
    sinks: tuple[ChannelSlice, ...]
    clips: tuple[ChannelSlice, ...]
    gains: tuple[ChannelSlice, ...]
    rectified: bool

    @property
    def source(self) -> str:
        return self.sources[0]

    @property
    def tied(self) -> bool:
        return len(self.sources) > 1


class _Refused(Exception):
    """Why a layer's channels cannot be scaled."""


def find_regions(model: fx.GraphModule, through_sums: bool = False) -> tuple[list[Region], dict[str, str]]:
    """The region of every layer whose output channels can be rescaled; and why the others cannot, by name.

    through_sums: layers whose outputs are added are scaled together, as one region.
    """
    regions, refused, done = [], {}, set()
    for node in _sources(model):
        if node.target in done:
            continue
        walk = _Walk(model, through_sums)
        try:
            regions.append(walk.region(node))
        except _Refused as reason:
            refused |= {name: str(reason) for name in walk.sources if isinstance(model.get_submodule(name), WEIGHTED)}
        done |= set(walk.sources)
    return regions, refused


def _sources(model: fx.GraphModule) -> list[fx.Node]:
    """What can scale its own output: layers, and functions that no scale passes."""
    kinds = {node: module_of(model, node) for node in model.graph.nodes}
    return [
        node
        for node, module in kinds.items()
        if isinstance(module, WEIGHTED)
        or (isinstance(module, Elementwise) and not module.homogeneous and len(shape(node)) > 1)
    ]


def stored_nodes(model: fx.GraphModule, region: Region) -> dict[str, str | None]:
    """The nodes whose values an engine stores with the region's channels, by name: behind a source's activation, with
    that source's name, and sums, with None."""
    targets = {node.target: node for node in model.graph.nodes}
    todo, stored = [(targets[name], name) for name in region.sources], {}
    for node, source in todo:  # grows
        users = list(node.users)
        if len(users) == 1 and isinstance(module_of(model, users[0]), Clip):
            todo.append((users[0], source))
        elif node.name not in stored:
            stored[node.name] = source
            todo += [(u, None) for u in users if u.target is aten.add.Tensor or isinstance(module_of(model, u), Clip)]
    return stored


@dataclass(frozen=True)
class _Way:
    """What has happened to the channels up to a node.

    index: their map, of the activation's shape for one image. multiplied: by a tensor, which may change their sign.
    """

    index: Tensor
    rectified: bool = False
    keeps_constants: bool = True
    multiplied: bool = False


class _Walk:
    """One region as far as it is known."""

    def __init__(self, model: fx.GraphModule, through_sums: bool):
        self.model, self.through_sums = model, through_sums
        self.sources: dict[str, fx.Node] = {}
        self.sinks: list[ChannelSlice] = []
        self.clips: list[ChannelSlice] = []
        self.gains: list[ChannelSlice] = []
        self.rectified = True
        self.met: dict[fx.Node, None] = {}  # sums
        self.multiplied: set[fx.Node] = set()

    def region(self, node: fx.Node) -> Region:
        self.sources[node.target] = node
        for source in iter_growing(self.sources):
            self._follow(source, _Way(self._start(source)))
        sources, channels = tuple(self.sources), shape(node)[1]
        ends = tuple(self.sinks), tuple(self.clips), tuple(self.gains)
        return Region(sources, channels, *ends, self.rectified and len(sources) == 1)

    def _start(self, node: fx.Node) -> Tensor:
        """The map of a layer's own output."""
        layer, size = module_of(self.model, node), shape(node)
        if isinstance(layer, nn.Linear) and len(size) != 2:
            raise _Refused("its channels are not the second axis")
        return _spread(torch.arange(size[1]), size)

    def _follow(self, node: fx.Node, way: _Way) -> None:
        for user in node.users:
            if is_size(user):
                continue
            module = module_of(self.model, user)
            if isinstance(module, WEIGHTED):
                self._arrive(user, module, way)
            elif isinstance(module, Elementwise) and not module.homogeneous:
                index = _by_channel(way.index, describe(module, user))
                self.gains.append(ChannelSlice(user.target, index, way.keeps_constants))
                self.rectified = False
            elif module is not None:
                self._follow(user, self._through_module(user, module, way))
            else:
                self._through_operator(user, node, way)

    def _arrive(self, user: fx.Node, layer: nn.Module, way: _Way) -> None:
        if isinstance(layer, nn.Linear) and way.index.dim() != 2:
            raise _Refused(f"read by linear layer {user.target!r} along another axis")
        constant = way.keeps_constants and not sees_padding(layer)
        self.sinks.append(ChannelSlice(user.target, _by_channel(way.index, describe(layer, user)), constant))
        self.rectified &= way.rectified

    def _through_module(self, user: fx.Node, module: nn.Module, way: _Way) -> _Way:
        if isinstance(module, Clip):
            index = _by_channel(way.index, describe(module, user))
            if module.capped or not module.rectifies:
                self.clips.append(ChannelSlice(user.target, index, way.keeps_constants))
            return replace(way, rectified=way.rectified or (module.rectifies and not way.multiplied))
        if isinstance(module, Elementwise):
            return way
        if isinstance(module, ChannelAffine) and not module.shift.any():
            return way
        if isinstance(module, _BatchNorm):
            raise _Refused(f"read by {describe(module, user)}, which is not folded")
        raise _Refused(f"read by {describe(module, user)}")

    def _through_operator(self, user: fx.Node, node: fx.Node, way: _Way) -> None:
        row = operator_of(user)
        if row is None or user.op == "output":
            raise _Refused(f"read by {describe(None, user)}")
        if row.channels == "moved":
            self._follow(user, replace(way, index=self._moved(user, node, way.index)))
        elif row.channels == "kept" and shape(user)[1] == way.index.shape[1]:
            index = _spread(_by_channel(way.index, describe(None, user)), shape(user))
            constant = way.keeps_constants and row.kind != "pad" and not _pads(user)
            self._follow(user, replace(way, index=index, keeps_constants=constant))
        elif row.kind == "product":
            self._multiply(user, node, way)
        elif (
            row.kind == "sum"
            and self.through_sums
            and torch.equal(way.index, _spread(way.index.new_tensor(range(shape(node)[1])), shape(node)))
        ):
            self._add(user)
        else:
            raise _Refused(f"read by {describe(None, user)}")

    def _moved(self, user: fx.Node, node: fx.Node, index: Tensor) -> Tensor:
        """The operator itself, on the indices; what it joins them with is elsewhere."""

        def value(source: fx.Node) -> Tensor:
            if source.op == "get_attr" and source.meta["tensor_meta"].dtype == torch.int64:  # positions to pick
                return getattr(self.model, source.target)
            if not is_tensor(source):  # how many images there are
                raise _Refused(f"read by {describe(None, user)}, which mixes positions with images")
            return index if source is node else torch.full(shape(source), ELSEWHERE)

        args, kwargs = (fx.map_arg(part, value) for part in (user.args, user.kwargs))
        try:
            return user.target(*args, **kwargs)
        except RuntimeError:  # a shape that one row of indices does not have
            raise _Refused(f"read by {describe(None, user)}, which mixes positions with images") from None

    def _multiply(self, user: fx.Node, node: fx.Node, way: _Way) -> None:
        """s x * y = s (x * y): a product passes a scale of one of its operands, as long as the other has none of it."""
        if user in self.multiplied or list(user.args).count(node) != 1 or shape(user) != shape(node):
            raise _Refused(f"read by {describe(None, user)}")
        self.multiplied.add(user)
        self._follow(user, _Way(way.index, rectified=False, keeps_constants=False, multiplied=True))

    def _add(self, user: fx.Node) -> None:
        """Past a sum of layers, all of which join the region."""
        if user in self.met:
            return
        self.met[user] = None
        for origin in self._origins(user):
            self.sources.setdefault(origin.target, origin)
        self._follow(user, _Way(_spread(torch.arange(shape(user)[1]), shape(user))))

    def _origins(self, node: fx.Node) -> list[fx.Node]:
        """The layers whose channels a sum holds, all of them at its own channels."""
        module, row = module_of(self.model, node), operator_of(node)
        if isinstance(module, WEIGHTED):
            return [node]
        if row is not None and row.kind == "sum":
            if any(not isinstance(part, fx.Node) or shape(part) != shape(node) for part in node.args):
                raise _Refused(f"read by {describe(module, node)}, whose terms differ in shape")
            return [origin for part in node.args for origin in self._origins(part)]
        passes = isinstance(module, Clip) or (isinstance(module, Elementwise) and module.homogeneous)
        if passes or (row is not None and row.channels == "kept" and shape(node)[1] == shape(node.args[0])[1]):
            return self._origins(node.args[0])
        raise _Refused(f"added to {describe(module, node)}")


def iter_growing(mapping: dict[str, fx.Node]) -> Iterator[fx.Node]:
    """The values of a dict, those included that are added meanwhile."""
    done = 0
    while done < len(mapping):
        yield list(mapping.values())[done]
        done += 1


def _spread(index: Tensor, size: torch.Size) -> Tensor:
    """[C] as a map of an activation's size [N, C, ...], without memory of its own."""
    return index.view(1, -1, *[1] * (len(size) - 2)).expand(size)


def _by_channel(index: Tensor, where: str) -> Tensor:
    """The map [N, C, ...] as [C]: every position of a channel holds the same one."""
    if index.dim() < 2:
        raise _Refused(f"read by {where}, without an axis for channels")
    flat = index.flatten(2) if index.dim() > 2 else index[:, :, None]
    first = flat[0, :, 0]
    if not bool((flat == first[None, :, None]).all()):
        raise _Refused(f"read by {where}, whose channels mix several of its own")
    return first.clone()


def _pads(user: fx.Node) -> bool:
    """Whether a pooling averages zeros beyond the border in."""
    if operator_of(user).kind != "average" or user.target is aten.mean.dim or len(user.args) < 4:
        return False
    return any(user.args[3])
