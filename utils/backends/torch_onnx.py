"""Operators that the table has no ONNX form for, as torch.onnx writes them."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Sequence
from typing import Any

import onnx
import torch
from torch import nn

from utils.core.errors import UserError

TORCH_OPSET = 18  # the lowest that torch.onnx writes


def exported_by_torch(
    module: nn.Module, inputs: Sequence[tuple[str, Any]], opset: int, prefix: str, what: str
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], list[str]]:
    """Operators, constants and names of the outputs of a part of a network.

    inputs: the name of each input in the model, and its shape and data type (for one image). prefix: goes before all new
    names. what: the part in words. What torch.onnx cannot write is a UserError.
    """
    examples = tuple(torch.zeros(2, *meta.shape[1:], dtype=meta.dtype) for _, meta in inputs)
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in examples)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, examples, dynamo=True, dynamic_shapes=shapes, opset_version=opset, verbose=False
            )
        graph = _inlined(program.model_proto)
    except Exception as error:  # whatever the exporter raises
        reason = re.sub(r"\x1b\[\d*m", "", (str(error).strip().splitlines() or [type(error).__name__])[0])
        raise UserError(
            f"{what} cannot be exported: neither this project nor torch.onnx has a form for it ({reason[:160]}); "
            "run without --export and --engine onnxruntime, or write that part of the network with other operators"
        ) from error
    names = dict(zip((value.name for value in graph.input), (name for name, _ in inputs), strict=True))
    return _renamed(graph, names, prefix)


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
        copied.name = f"{prefix}_{node.name}"
        copied.input[:], copied.output[:] = [own(n) for n in node.input], [own(n) for n in node.output]
        nodes.append(copied)
    return nodes, initializers, [own(value.name) for value in graph.output]


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
