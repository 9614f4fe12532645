"""What every pass asks of a graph: a node's module, its shape, its name in words; and how to edit one."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from utils.core.errors import UserError, message_of
from utils.core.input_spec import InputSpec
from utils.graph.layers import WEIGHTED


def module_of(model: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return model.get_submodule(node.target) if node.op == "call_module" else None


def weighted_nodes(model: fx.GraphModule) -> list[fx.Node]:
    """The convolutions and linear layers, in the order in which they run."""
    return [node for node in model.graph.nodes if isinstance(module_of(model, node), WEIGHTED)]


def shape(node: fx.Node) -> torch.Size:
    """Shape of the node's output for a batch of one image."""
    return node.meta["tensor_meta"].shape


def is_tensor(node: fx.Node) -> bool:
    return hasattr(node.meta.get("tensor_meta"), "shape")


def describe(module: nn.Module | None, node: fx.Node) -> str:
    """A node in words: what it does, and its name."""
    if node.op == "output":
        return "the network's output"
    if module is not None:
        return f"{type(module).__name__} {node.target!r}"
    packet = getattr(node.target, "overloadpacket", node.target)
    return f"{getattr(packet, '__name__', packet)} {node.name!r}"


def argument(node: fx.Node, index: int, name: str, default: object = None) -> object:
    """An argument of a function, wherever it stands."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def tidy(model: fx.GraphModule) -> fx.GraphModule:
    """Bring a graph and its modules back into agreement after an edit."""
    model.delete_all_unused_submodules()
    model.graph.lint()
    model.recompile()
    return model


def insert_module(model: fx.GraphModule, after: fx.Node, name: str, module: nn.Module) -> fx.Node:
    """Call the module on the node's output, and give every reader of that output the result."""
    target = free_name(model, name)
    model.add_submodule(target, module)
    with model.graph.inserting_after(after):
        node = model.graph.call_module(target, (after,))
    node.meta = dict(after.meta)
    after.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    return node


def free_name(model: nn.Module, name: str) -> str:
    """The name, or the first of name_1, name_2, ... that no module or attribute of the network has.

    What stands in a layer by its name, as the activation of a BatchNorm that has one, stands beside it.
    """
    parent, parts = model, name.split(".")
    for i, part in enumerate(parts[:-1], start=1):
        parent = getattr(parent, part, None)
        if parent is None:
            break
        if not isinstance(parent, nn.Module) or next(parent.parameters(recurse=False), None) is not None:
            name = ".".join(parts[:i]) + "_" + "_".join(parts[i:])
            break
    candidate, count = name, 0
    while _taken(model, candidate):
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _taken(model: nn.Module, name: str) -> bool:
    parent, _, last = name.rpartition(".")
    try:
        return hasattr(model.get_submodule(parent), last)
    except AttributeError:
        return False


def propagate_shapes(model: fx.GraphModule, spec: InputSpec, batch: int = 1) -> fx.GraphModule:
    """Note at every node the shape of its output for one image, or for the batch that the network is fixed to."""
    try:
        with torch.no_grad():
            ShapeProp(model).propagate(spec.probe(batch))
    except Exception as error:
        raise UserError(f"the network fails on images of shape {spec.shape(batch)}: {first_line(error)}") from error
    for node in model.graph.nodes:
        if is_tensor(node) and node.meta["tensor_meta"].dtype.is_complex:
            raise UserError(
                f"the network computes with complex numbers (at {describe(None, node)}), which no INT8 engine has"
            )
    return model


def first_line(error: BaseException) -> str:
    """What an error says, in a line; of one that torch.fx wraps, the cause."""
    error = error.__cause__ or error
    return message_of(error, type(error).__name__)


def outputs_of(result: Tensor | tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    """A network's outputs, one or several, as a list."""
    return list(result) if isinstance(result, tuple | list) else [result]


def returned_nodes(model: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose values a network hands out, in the order of outputs_of()."""
    return outputs_of(next(node for node in model.graph.nodes if node.op == "output").args[0])


def as_returned(outputs: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """A list of a network's outputs as an engine hands them out: one alone, several as a tuple."""
    return tuple(outputs) if len(outputs) > 1 else outputs[0]
