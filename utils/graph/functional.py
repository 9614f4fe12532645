"""In-place operators as what they mean: values, not memory.

`x.relu_()` gives a new value, and whoever reads x after it reads that value. Where no view shares x's memory, the
graph says so by itself: the operator becomes its functional form, and later readers are given its result. Where
views do, torch.export's own functionalization does the work; it is as exact, and several seconds slower.
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


def functionalize(program: ExportedProgram) -> ExportedProgram:
    """The program without a single operator that writes to its inputs; it computes what it did."""
    writers = [node for node in program.graph.nodes if _writes(node)]
    if not all(functional_form(node.target) and _unshared(node) for node in writers):
        return program.run_decompositions({})
    for node in writers:
        _rewrite(program.graph, node)
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
