"""BatchNorm written out: (x - mean) / sqrt(variance + eps) * weight + bias, in any order.

Frozen BatchNorms of detectors and hand-made ones are straight lines to the graph. Their statistics are still there, among
the constants that slope and offset were computed from.
"""

import torch
from torch import Tensor, fx, nn

from utils.graph.rules import batch_norm_module

aten = torch.ops.aten
_ROOTS = {"rsqrt", "sqrt", "pow"}


def find_batchnorm(
    model: fx.GraphModule, constants: list[fx.Node], dims: int, slope: Tensor, offset: Tensor
) -> nn.Module | None:
    """The BatchNorm that y = slope x + offset [C] was computed from; None if there is none.

    constants: the get_attr nodes of its arithmetic. dims: of the activation. A variance is what stands with an eps
    under a square root; a mean is what makes the offset one of the other constants, or nothing.
    """
    if slope.dim() == 0 and offset.dim() == 0:
        return None
    leaves, roots = _lineage(model, constants)
    vectors = [leaf.reshape(-1) for leaf in leaves if leaf.numel() == max(slope.numel(), offset.numel())]
    for variance, eps in roots:
        deviation = (variance.reshape(-1).double() + eps).sqrt()
        if deviation.numel() != max(slope.numel(), offset.numel()):
            continue
        for mean in [*vectors, torch.zeros_like(deviation).float()]:
            bias = offset.double() + slope.double() * mean.double()
            known = [*vectors, torch.zeros_like(deviation)]
            size = (slope.double() * mean.double()).abs()
            if any(_equal(bias, other.double(), size) for other in known) and not _equal(
                mean.double(), variance.reshape(-1).double()
            ):
                weight = (slope.double() * deviation).float().expand_as(mean)
                return batch_norm_module(
                    max(dims - 2, 1), weight, bias.float(), mean.float(), variance.reshape(-1).float(), eps
                )
    return None


def _equal(a: Tensor, b: Tensor, size: Tensor | float = 0.0) -> bool:
    """size: of the terms that a is the sum of."""
    return bool(((a - b).abs() <= 1e-5 * (a.abs() + b.abs() + size + 1e-3)).all())


def _lineage(model: fx.GraphModule, constants: list[fx.Node]) -> tuple[list[Tensor], list[tuple[Tensor, float]]]:
    """The network's own tensors that constants were computed from, and those under a square root, with their eps."""
    values: dict[fx.Node, Tensor] = model.meta["constants"]
    todo, leaves, roots = [c.meta["origin"] for c in constants if c.meta.get("origin") is not None], [], []
    seen = set()
    for node in todo:  # grows
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            leaves.append(values[node])
            continue
        name = node.target._schema.name.partition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else ""
        if name in _ROOTS and isinstance(values.get(node.args[0]), Tensor):
            roots.append(_split_eps(values, node.args[0]))
        todo += node.all_input_nodes
    return leaves, roots


def _split_eps(values: dict[fx.Node, Tensor], node: fx.Node) -> tuple[Tensor, float]:
    """Variance and eps of their sum, whichever way round it was written."""
    if node.op == "call_function" and node.target._schema.name in ("aten::add", "aten::add_"):
        parts = [values.get(part, part) if isinstance(part, fx.Node) else part for part in node.args[:2]]
        numbers = [float(p) for p in parts if not isinstance(p, Tensor) or p.numel() == 1]
        tensors = [p for p in parts if isinstance(p, Tensor) and p.numel() > 1]
        if len(numbers) == 1 and len(tensors) == 1:
            return tensors[0], numbers[0]
    return values[node], 0.0
