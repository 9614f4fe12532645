"""Activations that overwrite their input, where it is a fresh tensor that nobody else reads."""

import copy

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.graph.layers import WEIGHTED
from utils.graph.nodes import module_of
from utils.graph.ops import operator_of

_FRESH = ("sum", "product", "concat", "average")


def run_in_place(model: fx.GraphModule) -> fx.GraphModule:
    """Save memory, and nothing else: no value that is read again is overwritten."""
    for node in model.graph.nodes:
        module = module_of(model, node)
        if hasattr(module, "inplace"):
            source = node.all_input_nodes[0]
            module.inplace = len(source.users) == 1 and _is_fresh(module_of(model, source), source)
    return model


def _is_fresh(module: nn.Module | None, node: fx.Node) -> bool:
    """Whether a node makes a tensor of its own, or overwrites one that was nobody else's."""
    if module is None:
        row = operator_of(node)
        return row is not None and row.kind in _FRESH
    writes = hasattr(module, "inplace") or getattr(module, "makes_new_tensor", False)
    return writes or isinstance(module, (*WEIGHTED, _BatchNorm))


def without_overwriting(model: fx.GraphModule) -> fx.GraphModule:
    """A copy in which no module writes over its input."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return model
