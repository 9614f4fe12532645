"""The operator table: all that the project knows of ATen operators, a row each.

A captured graph calls these, besides its modules. A row says what an operator is, how moments pass it, whether a positive
scale of a channel passes, whether its output lies on its input's grid, and how ONNX writes it. An operator without a row
stays in float between quantizers, and is written as in an activation, or by torch.onnx.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from utils.graph import onnx_forms as onnx

aten = torch.ops.aten


@dataclass(frozen=True)
class Operator:
    """kind: "shape" (moves values), "concat", "pad", "maximum", "average", "resize", "sum", "product", "norm" or "other".

    moments: "each" (the operator itself, on the maps of means, variances and bounds), "sum", "product", "concat",
    "extreme" (of two), "normalised", "share" (between 0 and 1), or None: nothing is known behind it.
    channels: how channels pass: "moved" (the operator itself, on a map of their indices), "kept" (a positive scale of each
    passes), or None. keeps_grid: its output holds nothing but values of its input, and zeros. onnx: writes it, or None.
    """

    kind: str
    moments: str | None
    channels: str | None
    keeps_grid: bool
    onnx: Callable | None


_MOVES = {"moments": "each", "channels": "moved", "keeps_grid": True}

OPERATORS: dict[object, Operator] = {
    aten.reshape.default: Operator("shape", **_MOVES, onnx=onnx.reshape),
    aten.permute.default: Operator("shape", **_MOVES, onnx=onnx.permute),
    aten.slice.Tensor: Operator("shape", **_MOVES, onnx=onnx.slice_),
    aten.expand.default: Operator("shape", **_MOVES, onnx=onnx.expand),
    aten.flip.default: Operator("shape", **_MOVES, onnx=onnx.flip),
    aten.repeat.default: Operator("shape", **_MOVES, onnx=onnx.repeat),
    aten.pixel_shuffle.default: Operator("shape", **_MOVES, onnx=onnx.pixel_shuffle),
    aten.pixel_unshuffle.default: Operator("shape", **_MOVES, onnx=onnx.pixel_unshuffle),
    aten.channel_shuffle.default: Operator("shape", **_MOVES, onnx=onnx.channel_shuffle),
    aten.index_select.default: Operator("shape", **_MOVES, onnx=onnx.index_select),
    aten.cat.default: Operator("concat", "concat", "moved", True, onnx.concat),
    aten.pad.default: Operator("pad", "each", "kept", True, onnx.pad),
    **{
        overload: Operator("maximum", "each", "kept", True, onnx.max_pool)
        for overload in (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
    },
    aten.max_pool2d_with_indices.default: Operator("maximum", "each", None, True, onnx.max_pool_with_indices),
    **{
        overload: Operator("maximum", "each", None, True, onnx.adaptive_maximum)
        for overload in (aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
    },
    aten.max_unpool2d.default: Operator("shape", "each", None, True, onnx.max_unpool),
    operator.getitem: Operator("shape", None, None, True, None),
    aten.amax.default: Operator("maximum", "each", "kept", True, onnx.extreme("Max")),
    aten.amin.default: Operator("maximum", "each", "kept", True, onnx.extreme("Min")),
    **{
        overload: Operator("average", "each", "kept", False, onnx.average_pool)
        for overload in (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
    },
    aten.mean.dim: Operator("average", "each", "kept", False, onnx.mean),
    **{
        overload: Operator("average", "each", "kept", False, onnx.adaptive_average)
        for overload in (
            aten.adaptive_avg_pool1d.default,
            aten.adaptive_avg_pool2d.default,
            aten._adaptive_avg_pool2d.default,
            aten.adaptive_avg_pool3d.default,
            aten._adaptive_avg_pool3d.default,
        )
    },
    **{
        overload: Operator("resize", "each", "kept", True, onnx.resize)
        for overload in (aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec)
    },
    **{
        overload: Operator("resize", "each", "kept", True, onnx.resize)
        for overload in (
            aten._upsample_nearest_exact1d.vec,
            aten._upsample_nearest_exact2d.vec,
            aten._upsample_nearest_exact3d.vec,
        )
    },
    **{
        overload: Operator("resize", "each", "kept", False, onnx.resize)
        for overload in (aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec)
    },
    aten.upsample_bicubic2d.vec: Operator("resize", "each", None, False, onnx.resize),
    aten.add.Tensor: Operator("sum", "sum", None, False, onnx.binary("Add")),
    aten.sub.Tensor: Operator("sum", "sum", None, False, onnx.binary("Sub")),
    aten.mul.Tensor: Operator("product", "product", None, False, onnx.binary("Mul")),
    aten.div.Tensor: Operator("other", None, None, False, onnx.binary("Div")),
    aten.maximum.default: Operator("other", "extreme", None, False, onnx.binary("Max")),
    aten.minimum.default: Operator("other", "extreme", None, False, onnx.binary("Min")),
    aten.var.correction: Operator("other", None, None, False, onnx.variance),
    aten.linalg_vector_norm.default: Operator("other", None, None, False, onnx.vector_norm),
    aten.log_softmax.int: Operator("other", None, None, False, onnx.log_softmax),
    aten.matmul.default: Operator("other", None, None, False, onnx.binary("MatMul")),
    aten.bmm.default: Operator("other", None, None, False, onnx.binary("MatMul")),
    aten.scaled_dot_product_attention.default: Operator("other", None, None, False, onnx.attention),
    aten.softmax.int: Operator("other", "share", None, False, onnx.softmax),
    aten._softmax.default: Operator("other", "share", None, False, onnx.softmax),
    aten.layer_norm.default: Operator("norm", "normalised", None, False, onnx.layer_norm),
    aten.group_norm.default: Operator("norm", "normalised", None, False, onnx.group_norm),
    aten.instance_norm.default: Operator("norm", "normalised", None, False, onnx.instance_norm),
}

_UNKNOWN = Operator("other", None, None, False, None)


def operator_of(node: fx.Node) -> Operator | None:
    """The row of a call of an operator; None for modules, inputs and outputs. An operator that the table lacks has an empty row."""
    if node.op != "call_function":
        return None
    row = OPERATORS.get(node.target, _UNKNOWN)
    if (
        row.kind == "pad" and node.args[2] == "constant" and node.args[3] not in (None, 0, -math.inf)
    ):  # no scale reaches it
        return Operator("pad", "each", None, False, row.onnx)
    return row


def keeps_grid(node: fx.Node) -> bool:
    """Whether the node's output lies on the grid of its input: an integer engine needs no quantizer behind it."""
    if node.target is operator.getitem:  # one of several results
        return keeps_grid(node.args[0])
    row = operator_of(node)
    return row is not None and row.keeps_grid and row.kind != "concat"


def is_size(node: fx.Node) -> bool:
    """Whether the node is a size of a tensor, not a tensor."""
    return node.target in (aten.sym_size.int, aten.sym_numel.default)
