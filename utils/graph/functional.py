"""In-place operators as what they mean: values, not memory.

`x.relu_()` gives a new value, and whoever reads x after it reads that value. Where no view shares x's memory, the
graph says so by itself: the operator becomes its functional form, and later readers are given its result. Where a slice is
written that nobody else reads, they are given the whole with that slice in it. Where other views share memory,
torch.export's own functionalization does the work; it is as exact, and several seconds slower.
"""

import torch
from torch import fx
from torch.export import ExportedProgram

# Composite operators that make a new tensor. Others may return their input, as dropout and reshape do.
_FRESH = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "matmul"}
_FRESH |= {
    "batch_norm",
    "layer_norm",
    "group_norm",
    "instance_norm",
    "max_pool2d",
    "adaptive_avg_pool2d",
    "embedding",
    "hardswish",
}


_SCATTERS = {
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_scatter.default,
    torch.ops.aten.select.int: torch.ops.aten.select_scatter.default,
}


def functionalize(program: ExportedProgram) -> ExportedProgram:
    """The program without a single operator that writes to its inputs; it computes what it did."""
    for node in [node for node in program.graph.nodes if _writes(node)]:
        if functional_form(node.target) and _unshared(node):
            _rewrite(program.graph, node)
        elif functional_form(node.target) and _alone_in_slice(node):
            _scatter(program.graph, node)
        else:
            program.graph_module.recompile()
            return program.run_decompositions({})
    program.graph.lint()
    return program


def inline_contexts(program: ExportedProgram) -> None:
    """Put what ran under torch.no_grad or torch.autocast in its place; in float32, as all the rest."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target not in (
            torch.ops.higher_order.wrap_with_autocast,
            torch.ops.higher_order.wrap_with_set_grad_enabled,
        ):
            continue
        place = next(i for i, value in enumerate(node.args) if isinstance(value, fx.Node) and value.op == "get_attr")
        inner = getattr(program.graph_module, node.args[place].target).graph
        sources = [other for other in inner.nodes if other.op == "placeholder"]
        with graph.inserting_before(node):
            made = dict(zip(sources, node.args[place + 1 :], strict=True))
            results = graph.graph_copy(inner, made)
        for reader in list(node.users):  # getitem of a tuple of results
            reader.replace_all_uses_with(results[reader.args[1]])
            graph.erase_node(reader)
        graph.erase_node(node)


def functional_form(overload: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """relu for relu_: the same overload without the underscore, where there is one."""
    namespace, _, name = overload._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    same = getattr(packet, overload._overloadname, None)
    return same if name.endswith("_") and same is not None and not same._schema.is_mutable else None


def _writes(node: fx.Node) -> bool:
    """Whether an operator changes values. detach_, which torch.tensor(...) leaves, and dropout in evaluation change none."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return False
    name = node.target._schema.name.partition("::")[2]
    return name != "detach_" and not (name.endswith("dropout_") and node.args[2] is False)


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that an in-place operator writes to."""
    written = []
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            written += [value] if isinstance(value, fx.Node) else list(value or ())
    return written


def _unshared(node: fx.Node) -> bool:
    """Whether no view shares memory with what an operator writes to, up to the last time that it is written to."""
    written = _written(node)
    if len(written) != 1:
        return False
    same = written  # the tensor, under all the names that in-place operators gave it
    for value in same:  # grows
        others = [user for user in value.users if _writes(user) and value in _written(user)]
        others += _written(value) if _writes(value) else []
        same += [other for other in others if other not in same]
    order = {other: i for i, other in enumerate(node.graph.nodes)}
    last = max(order[value] for value in same if _writes(value))
    readers = {user for value in same for user in value.users if order[user] < last}
    return not any(_may_alias(value) for value in (*same, *readers) if not _writes(value))


def _may_alias(node: fx.Node) -> bool:
    """Whether a node's value may be memory of its input."""
    if node.op != "call_function" or isinstance(node.meta.get("val"), int | torch.SymInt):
        return False
    if not isinstance(node.target, torch._ops.OpOverload):  # getitem of a tuple
        return any(_may_alias(source) for source in node.all_input_nodes)
    if any(result.alias_info is not None for result in node.target._schema.returns):
        return True
    composite = node.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    fresh = torch.Tag.pointwise in node.target.tags or node.target._schema.name.partition("::")[2] in _FRESH
    return composite and not fresh


def _rewrite(graph: fx.Graph, node: fx.Node) -> None:
    """Let an in-place operator give a new value, which those read who read the old one after it."""
    source = _written(node)[0]
    node.target = functional_form(node.target)
    order = {other: i for i, other in enumerate(graph.nodes)}
    for reader in [user for user in source.users if order[user] > order[node]]:
        reader.replace_input_with(source, node)


def _slices(node: fx.Node) -> list[fx.Node]:
    """The slices, each of the one before it, to the last of which alone an operator writes; none where it writes to others.

    Nothing but the next slice reads each, and the operator the last.
    """
    slices: list[fx.Node] = []
    reader, value = node, next(iter(_written(node)), node)
    while value.target in _SCATTERS and list(value.users) == [reader] and not value.kwargs:
        slices.insert(0, value)
        reader, value = value, value.args[0]
    return slices


def _alone_in_slice(node: fx.Node) -> bool:
    """Whether an operator writes to a slice of a tensor whose memory only such slices share, while it is written to."""
    if len(_written(node)) != 1 or not (slices := _slices(node)):
        return False
    whole = slices[0].args[0]
    if whole.op != "call_function" or _may_alias(whole):
        return False
    order = {other: i for i, other in enumerate(node.graph.nodes)}
    writers = [
        other for other in node.graph.nodes if _writes(other) and (into := _slices(other)) and into[0].args[0] is whole
    ]
    firsts = {_slices(writer)[0] for writer in writers}
    last = max(order[writer] for writer in writers)
    if any(_shares(user, whole) and order[user] < last for user in whole.users if user not in firsts):
        return False
    later = min((order[writer] for writer in writers if order[writer] > order[node]), default=len(order))
    return not any(_shares(user, node) or order[user] > later for user in node.users)


def _shares(user: fx.Node, value: fx.Node) -> bool:
    """Whether what reads a value may be memory of it; what writes it elsewhere is not."""
    return _may_alias(user) and not (_writes(user) and value not in _written(user))


def _scatter(graph: fx.Graph, node: fx.Node) -> None:
    """Let an operator that writes to a slice give a new value, and those who read the whole after it read one with it."""
    slices = _slices(node)
    whole = slices[0].args[0]
    order = {other: i for i, other in enumerate(graph.nodes)}
    readers = [user for user in whole.users if order[user] > order[node]]
    node.target = functional_form(node.target)
    value = node
    for part in reversed(slices):
        with graph.inserting_after(value):
            value = graph.call_function(_SCATTERS[part.target], (part.args[0], value, *part.args[1:]))
        value.meta = node.meta | {"val": part.args[0].meta["val"]}
    for reader in readers:
        reader.replace_input_with(whole, value)
