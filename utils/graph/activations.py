"""Elementwise arithmetic is an activation, however it is written.

Any sub-graph of elementwise operators with one tensor as its only variable input is a function of one number,
channel by channel. What it is follows from its values, not from its wording: x * relu6(x + 3) / 6, (x + |x|) / 2
and a comparison times x are found by trying them out on a few hundred points. It becomes a Clip, a BatchNorm or
ChannelAffine where it is a straight line, nothing where it is the identity, and an Elementwise otherwise.
"""

import torch
from torch import Tensor, fx, nn

from utils.graph.batchnorm_arithmetic import find_batchnorm
from utils.graph.layers import ChannelAffine, Clip, Elementwise
from utils.graph.nodes import free_name

# Elementwise, though torch does not tag them so.
_UNTAGGED = {
    "hardswish",
    "prelu",
    "log_sigmoid",
    "where",
    "to",
    "_to_copy",
    "type_as",
    "_prelu_kernel",
    "rrelu",
    "softshrink",
    "zeros_like",
    "ones_like",
    "full_like",
}


def find_activations(model: fx.GraphModule) -> None:
    """Put a module in the place of every elementwise function of one tensor."""
    functions = _functions(model)
    made: dict[fx.Node, fx.Node] = {}  # what a node has been replaced by
    for output in [node for node in model.graph.nodes if node in functions and _is_output(node, functions)]:
        root = functions[output]
        for segment in _segments(made.get(root, root), output):
            segment.source = made.get(segment.source, segment.source)
            made[segment.result] = _replace(model, segment)
    model.graph.eliminate_dead_code()


# ------------------------------------------------------------------------------------ which nodes


def is_elementwise(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._schema.name.partition("::")[2]
    return torch.Tag.pointwise in node.target.tags or name in _UNTAGGED


def _functions(model: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """For every node that is an elementwise function of one tensor, the node of that tensor.

    A value that anything else reads is a tensor of its own: its readers' functions begin there.
    """
    cuts: set[fx.Node] = set()
    while True:
        roots: dict[fx.Node, fx.Node] = {}
        for node in model.graph.nodes:
            sources = {s if s in cuts else roots.get(s, s) for s in node.all_input_nodes if s.op != "get_attr"}
            if is_elementwise(node) and len(sources) == 1 and _per_channel_constants(node):
                root = sources.pop()
                if _size(root) == _size(node) and _is_float(root):
                    roots[node] = root
        fresh = {
            node
            for node, root in roots.items()
            if node not in cuts
            and any(u in roots for u in node.users)
            and any(roots.get(user) is not root for user in node.users)
        }
        if not fresh:
            return roots
        cuts |= fresh


def _is_output(node: fx.Node, functions: dict[fx.Node, fx.Node]) -> bool:
    return any(functions.get(user) is not functions[node] for user in node.users)


def _size(node: fx.Node) -> tuple:
    return node.meta.get("size", ())


def _is_float(node: fx.Node) -> bool:
    exported = node.meta.get("exported")
    value = exported.meta.get("val") if exported is not None else None
    return not isinstance(value, Tensor) or value.dtype.is_floating_point


def _per_channel_constants(node: fx.Node) -> bool:
    """Whether the constants that a node reads differ by channel at most: along axis 1, or the last of two."""
    dims = len(_size(node))
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            if node.target is torch.ops.aten.prelu.default:
                continue
            sides = (1,) * (dims - len(_size(source))) + _size(source)
            if any(side != 1 for axis, side in enumerate(sides) if axis != 1):
                return False
    return True


def _members(root: fx.Node, output: fx.Node) -> list[fx.Node]:
    """The nodes between a tensor and a function of it, in order."""
    found, todo = {output}, [output]
    for node in todo:  # grows
        for source in node.all_input_nodes:
            if source is not root and source.op != "get_attr" and source not in found:
                found.add(source)
                todo.append(source)
    return [node for node in root.graph.nodes if node in found]


# ------------------------------------------------------------------------------------- its parts


class _Segment:
    """Part of a function through which all of it goes: nodes, the value that they read, their result."""

    def __init__(self, source: fx.Node, nodes: list[fx.Node]):
        self.source, self.nodes = source, nodes

    @property
    def result(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def constants(self) -> list[fx.Node]:
        return [s for node in self.nodes for s in node.all_input_nodes if s.op == "get_attr"]

    def __call__(self, x: Tensor) -> Tensor:
        """The function's values on any tensor."""
        values = {self.source: x}
        for constant in self.constants:
            values[constant] = getattr(self.source.graph.owning_module, constant.target)
        for node in self.nodes:
            args, kwargs = (fx.map_arg(part, values.__getitem__) for part in (node.args, node.kwargs))
            values[node] = node.target(*args, **kwargs)
        return values[self.result]

    def module(self) -> fx.GraphModule:
        """The function as a network of its own."""
        graph, made = fx.Graph(), {}
        made[self.source] = graph.placeholder("x")
        for node in self.nodes:
            for constant in node.all_input_nodes:
                if constant.op == "get_attr" and constant not in made:
                    made[constant] = graph.get_attr(constant.target)
            made[node] = graph.node_copy(node, made.__getitem__)
        graph.output(made[self.result])
        return fx.GraphModule(self.source.graph.owning_module, graph)


def _segments(root: fx.Node, output: fx.Node) -> list[_Segment]:
    """The function's parts: straight lines that differ by channel stand alone, and so do those before a clip."""
    parts, source, nodes = [], root, []
    members = _members(root, output)
    inside = set(members)
    for i, node in enumerate(members):
        nodes.append(node)
        before = {*members[: i + 1], root}
        passed = _is_float(node) and all(
            reader in before or reader not in inside or value is node for value in before for reader in value.users
        )
        if node is output or passed:
            parts.append(_Segment(source, nodes))
            source, nodes = node, []
    return _merged(parts)


def _merged(parts: list[_Segment]) -> list[_Segment]:
    """Neighbours joined where that makes one thing of them."""
    lines = [line(part) for part in parts]
    groups: list[list[_Segment]] = []
    kinds: list[bool] = []
    for part, straight in zip(parts, lines, strict=True):
        by_channel = straight is not None and any(_by_channel(c) for c in part.constants)
        if groups and kinds[-1] == by_channel:
            groups[-1].append(part)
        else:
            groups.append([part])
            kinds.append(by_channel)
    joined = [_joined(group) for group in groups]
    return [piece for whole in joined for piece in _line_before_clip(whole, parts)]


def _line_before_clip(whole: _Segment, parts: list[_Segment]) -> list[_Segment]:
    """A straight line and then a clip are two things: the layer before takes the line, an engine's kernel the clip."""
    own = [part for part in parts if part.result in whole.nodes]
    for count in range(1, len(own)):
        first, rest = _joined(own[:count]), _joined(own[count:])
        if line(first) is not None and clip(rest) is not None:
            return [first, rest]
    return [whole]


def _joined(parts: list[_Segment]) -> _Segment:
    return _Segment(parts[0].source, [node for part in parts for node in part.nodes])


def _by_channel(constant: fx.Node) -> bool:
    return max(_size(constant), default=1) > 1


# ---------------------------------------------------------------------------------- what it is


def _points() -> Tensor:
    """Numbers of both signs from 2^-12 to 2^16, dense where activations bend."""
    powers = 2.0 ** torch.arange(-12, 17)
    dense = torch.linspace(-8, 8, 257)
    return torch.cat([-powers.flip(0), dense, torch.zeros(1), powers]).sort().values


def _tried(function: _Segment, points: Tensor) -> Tensor:
    """The function's values [P, C] on points [P]; C: 1 where all channels have the same."""
    dims = len(_size(function.result))
    channels = max((max(_size(c), default=1) for c in function.constants), default=1)
    x = points.view(-1, *[1] * (dims - 1))
    x = x.expand(-1, channels, *[1] * (dims - 2)) if dims > 1 else x
    with torch.no_grad():
        return function(x.contiguous()).double().reshape(len(points), -1)


def line(function: _Segment) -> tuple[Tensor, Tensor] | None:
    """Slope and offset [C] of a function that is a straight line; None for any other."""
    points = _points()
    values = _tried(function, points)
    low, high, zero = (int((points == at).nonzero()[0, 0]) for at in (-1, 1, 0))
    slope, offset = (values[high] - values[low]) / 2, values[zero]
    error = (points.double()[:, None] * slope + offset - values).abs()
    scale = points.double().abs()[:, None] * slope.abs() + offset.abs() + 1e-12
    return (slope, offset) if bool((error <= 3e-5 * scale).all()) else None


def clip(function: _Segment) -> tuple[Tensor, Tensor] | None:
    """The bounds [C] of a function that leaves values as they are between two bounds; None for any other."""
    points = _points()
    values = _tried(function, points)
    low, high = values.amin(0), values.amax(0)
    clipped = torch.minimum(torch.maximum(points.double()[:, None], low), high)
    if not bool(((clipped - values).abs() <= 1e-6 * (1 + values.abs())).all()):
        return None
    low = torch.where(low <= points[0], -torch.inf, low)
    return low, torch.where(high >= points[-1], torch.inf, high)


def homogeneous(function: _Segment) -> bool:
    """Whether f(s x) = s f(x) for s > 0; tried with powers of two, which floats multiply exactly."""
    points = _points()
    values = _tried(function, points)
    return all(
        torch.allclose(_tried(function, points * scale), scale * values, rtol=1e-5, atol=1e-9) for scale in (0.125, 8.0)
    )


# -------------------------------------------------------------------------------- what it becomes


def _replace(model: fx.GraphModule, segment: _Segment) -> fx.Node:
    """Put a module in the place of a function, nothing in the place of the identity; returns what now has its value."""
    straight = line(segment)
    if straight is not None and bool(((straight[0] - 1).abs() < 1e-6).all() and (straight[1] == 0).all()):
        segment.result.replace_all_uses_with(segment.source)
        return segment.source
    name = free_name(model, _name(segment))
    module = _module(model, segment, straight)
    model.add_submodule(name, module.eval().requires_grad_(False))
    with model.graph.inserting_after(segment.result):
        node = model.graph.call_module(name, (segment.source,))
    node.meta = {key: segment.result.meta[key] for key in ("size", "path", "exported") if key in segment.result.meta}
    segment.result.replace_all_uses_with(node)
    return node


def _module(model: fx.GraphModule, segment: _Segment, straight: tuple[Tensor, Tensor] | None) -> nn.Module:
    if straight is not None:
        slope, offset = (part.float().squeeze() for part in straight)
        dims = len(_size(segment.result))
        return find_batchnorm(model, segment.constants, dims, slope, offset) or ChannelAffine(slope, offset)
    bounds = clip(segment)
    if bounds is not None:
        return Clip(*(part[0].float() if bool((part == part[0]).all()) else part.float() for part in bounds))
    return Elementwise(segment.module(), _kind(segment), homogeneous(segment))


def _kind(segment: _Segment) -> str:
    """The class of the user's module where it holds nothing else, or the operators."""
    if _stands_alone(segment):
        stack = segment.result.meta["exported"].meta["nn_module_stack"]
        return list(stack.values())[-1][1].rpartition(".")[2]
    names = [node.target._schema.name.partition("::")[2] for node in segment.nodes]
    return "-".join(dict.fromkeys(names))


def _name(segment: _Segment) -> str:
    """Where the user has it, or what it computes."""
    return segment.result.meta["path"] if _stands_alone(segment) else segment.result.name


def _stands_alone(segment: _Segment) -> bool:
    """Whether the user's module that it stands in holds nothing but this function."""
    path = segment.result.meta.get("path")
    if not path or any(node.meta.get("path") != path for node in segment.nodes):
        return False
    others = (n for n in segment.result.graph.nodes if n.op != "get_attr" and n not in segment.nodes and n.users)
    return not any(f"{other.meta.get('path')}.".startswith(f"{path}.") for other in others)
