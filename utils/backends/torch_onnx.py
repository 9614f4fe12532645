"""Operators that the table has no ONNX form for, as torch.onnx writes them."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor, fx, nn

from utils.core.errors import UserError, message_of

TORCH_OPSET = 18  # the lowest that torch.onnx writes


@dataclass(frozen=True)
class Input:
    """A tensor that a part of a network reads: its name in the model, an example for two images, and the axes that grow
    with the batch."""

    name: str
    example: Tensor
    free: Sequence[int]


def part_of(model: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, list[fx.Node]]:
    """One operator as a network of its own, and the tensors that it reads; sizes are taken of these."""
    graph, made, read = fx.Graph(), {}, []

    def copy(source: fx.Node) -> fx.Node:
        if source not in made and source.op == "get_attr":
            made[source] = graph.get_attr(source.target)
        elif source not in made and "tensor_meta" not in source.meta:
            made[source] = graph.node_copy(source, copy)
        elif source not in made:
            read.append(source)
            made[source] = graph.placeholder(source.name)
        return made[source]

    graph.output(graph.node_copy(node, copy))
    return fx.GraphModule(model, graph), read


def exported_by_torch(
    module: nn.Module, inputs: Sequence[Input], opset: int, prefix: str, what: str
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], list[str]]:
    """Operators, constants and names of the outputs of a part of a network.

    prefix: goes before all new names. what: the part in words. What torch.onnx cannot write is a UserError.
    """
    examples = tuple(source.example for source in inputs)
    shapes = tuple(dict.fromkeys(source.free, torch.export.Dim.DYNAMIC) or None for source in inputs)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, examples, dynamo=True, dynamic_shapes=shapes, opset_version=opset, verbose=False
            )
        graph = _inlined(program.model_proto)
    except Exception as error:  # whatever the exporter raises
        raise UserError(
            f"{what} cannot be exported: neither this project nor torch.onnx has a form for it ({_reason(error)}); "
            "run without --export and --engine onnxruntime, or write that part of the network with other operators"
        ) from error
    names = dict(zip((value.name for value in graph.input), (source.name for source in inputs), strict=True))
    return _renamed(graph, names, prefix)


def _reason(error: BaseException) -> str:
    """The first line of the first cause, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = message_of(error, type(error).__name__)
    return re.sub(r"\x1b\[\d+m", "", line)[:160]


def _inlined(model: onnx.ModelProto) -> onnx.GraphProto:
    """The model's graph with no function left to call."""
    return (onnx.inliner.inline_local_functions(model) if model.functions else model).graph


def _renamed(
    graph: onnx.GraphProto, names: dict[str, str], prefix: str
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], list[str]]:
    def own(name: str) -> str:
        return name and names.setdefault(name, f"{prefix}_{name}")

    nodes, initializers = [], []
    for tensor in graph.initializer:
        copied = onnx.TensorProto()
        copied.CopyFrom(tensor)
        copied.name = own(tensor.name)
        initializers.append(copied)
    for node in graph.node:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        _rename(copied, own, prefix)
        nodes.append(copied)
    return nodes, initializers, [own(value.name) for value in graph.output]


def _rename(node: onnx.NodeProto, own: Callable[[str], str], prefix: str) -> None:
    """Give a node, and the nodes of the branches and loops in it, names of their own."""
    node.name = f"{prefix}_{node.name}"
    node.input[:], node.output[:] = [own(n) for n in node.input], [own(n) for n in node.output]
    for inner in (attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH):
        for value in (*inner.input, *inner.output, *inner.initializer, *inner.value_info):
            value.name = own(value.name)
        for step in inner.node:
            _rename(step, own, prefix)


@contextlib.contextmanager
def _quiet():
    """Without the exporter's own log."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
