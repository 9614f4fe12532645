"""How ONNX writes the operators that activations are made of; as in onnx_forms, of one tensor and value by value."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from utils.graph.nodes import shape
from utils.graph.onnx_forms import Form, binary, unary


def _clamp(w: Any, node: fx.Node, x: Any, low: Any = None, high: Any = None) -> str | None:
    if any(isinstance(bound, fx.Node | Tensor) for bound in (low, high)):
        return None
    bounds = [
        w.number(f"{node.name}_{name}", bound) if bound is not None else ""
        for name, bound in (("low", low), ("high", high))
    ]
    return w.add("Clip", [w.operand(x, f"{node.name}_operand"), *bounds], node.name)


def _silu(w: Any, node: fx.Node, x: fx.Node) -> str:
    gate = w.add("Sigmoid", [w.name(x)], f"{node.name}_gate")
    return w.add("Mul", [w.name(x), gate], node.name)


def _hardswish(w: Any, node: fx.Node, x: fx.Node) -> str:
    gate = w.add("HardSigmoid", [w.name(x)], f"{node.name}_gate", alpha=1 / 6, beta=0.5)
    return w.add("Mul", [w.name(x), gate], node.name)


def _mish(w: Any, node: fx.Node, x: fx.Node) -> str:
    soft = w.add("Softplus", [w.name(x)], f"{node.name}_softplus")
    return w.add("Mul", [w.name(x), w.add("Tanh", [soft], f"{node.name}_tanh")], node.name)


def _gelu(w: Any, node: fx.Node, x: fx.Node, *, approximate: str = "none") -> str | None:
    """x * (1 + erf(x / sqrt 2)) / 2."""
    if approximate != "none":
        return _gelu_tanh(w, node, x)
    scaled = w.add("Mul", [w.name(x), w.number(f"{node.name}_root", math.sqrt(0.5))], f"{node.name}_scaled")
    both = w.add(
        "Add", [w.add("Erf", [scaled], f"{node.name}_erf"), w.number(f"{node.name}_one", 1.0)], f"{node.name}_both"
    )
    half = w.add("Mul", [w.name(x), w.number(f"{node.name}_half", 0.5)], f"{node.name}_halved")
    return w.add("Mul", [half, both], node.name)


def _gelu_tanh(w: Any, node: fx.Node, x: fx.Node) -> str:
    """x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))."""
    own = node.name
    square = w.add("Mul", [w.name(x), w.name(x)], f"{own}_square")
    cubic = w.add("Mul", [square, w.number(f"{own}_cubic", 0.044715)], f"{own}_curve")
    inner = w.add("Mul", [w.add("Add", [cubic, w.number(f"{own}_one", 1.0)], f"{own}_slope"), w.name(x)], f"{own}_bent")
    gate = w.add("Mul", [inner, w.number(f"{own}_factor", math.sqrt(8 / math.pi))], f"{own}_scaled")
    return w.add("Mul", [w.name(x), w.add("Sigmoid", [gate], f"{own}_gate")], own)


def _softplus(w: Any, node: fx.Node, x: fx.Node, beta: float = 1.0, threshold: float = 20.0) -> str:
    if beta == 1:
        return w.add("Softplus", [w.name(x)], node.name)
    scaled = w.add("Mul", [w.name(x), w.number(f"{node.name}_beta", beta)], f"{node.name}_scaled")
    soft = w.add("Softplus", [scaled], f"{node.name}_soft")
    return w.add("Div", [soft, w.number(f"{node.name}_divisor", beta)], node.name)


def _log_sigmoid(w: Any, node: fx.Node, x: fx.Node) -> str:
    soft = w.add("Softplus", [w.add("Neg", [w.name(x)], f"{node.name}_negative")], f"{node.name}_soft")
    return w.add("Neg", [soft], node.name)


def _threshold(w: Any, node: fx.Node, x: fx.Node, threshold: float, value: float) -> str:
    above = w.add("Greater", [w.name(x), w.number(f"{node.name}_threshold", threshold)], f"{node.name}_above")
    return w.add("Where", [above, w.name(x), w.number(f"{node.name}_value", value)], node.name)


def _rsub(w: Any, node: fx.Node, x: Any, y: Any, alpha: float = 1) -> str | None:
    return binary("Sub")(w, node, y, x) if alpha == 1 else None


def _leaky_relu(w: Any, node: fx.Node, x: fx.Node, slope: float = 0.01) -> str:
    return w.add("LeakyRelu", [w.name(x)], node.name, alpha=slope)


def _elu(
    w: Any, node: fx.Node, x: fx.Node, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> str | None:
    return w.add("Elu", [w.name(x)], node.name, alpha=alpha) if (scale, input_scale) == (1.0, 1.0) else None


def _prelu(w: Any, node: fx.Node, x: fx.Node, slope: fx.Node) -> str:
    values = w.tensor(slope)
    values = values.view(-1, *[1] * (len(shape(node)) - 2)) if len(shape(node)) > 1 else values
    return w.add("PRelu", [w.name(x), w.constant(f"{node.name}_slope", values)], node.name)


def _power(w: Any, node: fx.Node, x: fx.Node, exponent: float) -> str:
    return w.add("Pow", [w.name(x), w.number(f"{node.name}_exponent", exponent)], node.name)


def _where(w: Any, node: fx.Node, condition: fx.Node, x: Any, y: Any) -> str:
    operands = [w.operand(value, f"{node.name}_{side}") for value, side in ((x, "first"), (y, "second"))]
    return w.add("Where", [w.name(condition), *operands], node.name)


def _masked_fill(w: Any, node: fx.Node, x: fx.Node, mask: fx.Node, value: Any) -> str:
    return _where(w, node, mask, value, x)


def _unequal(w: Any, node: fx.Node, x: Any, y: Any) -> str:
    return w.add("Not", [binary("Equal")(w, _Own(f"{node.name}_equal"), x, y)], node.name)


def _logical(kind: str) -> Form:
    """Of truth values alone."""

    def form(w: Any, node: fx.Node, *operands: fx.Node) -> str | None:
        if not all(isinstance(x, fx.Node) and x.meta["tensor_meta"].dtype == torch.bool for x in operands):
            return None
        return w.add(kind, [w.name(x) for x in operands], node.name)

    return form


def _as_float(w: Any, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> str | None:
    if node.meta["tensor_meta"].dtype != torch.float32:
        return None
    return w.add("Identity", [w.operand(x, f"{node.name}_operand")], node.name)


def _addcmul(w: Any, node: fx.Node, x: Any, a: Any, b: Any, *, value: float = 1) -> str:
    product = binary("Mul")(w, _Own(f"{node.name}_product"), a, b)
    if value != 1:
        product = w.add("Mul", [product, w.number(f"{node.name}_value", value)], f"{node.name}_weighted")
    return w.add("Add", [w.operand(x, f"{node.name}_first"), product], node.name)


def _lerp(w: Any, node: fx.Node, x: fx.Node, y: fx.Node, weight: float) -> str:
    """x + weight (y - x)."""
    apart = w.add("Sub", [w.name(y), w.name(x)], f"{node.name}_apart")
    part = w.add("Mul", [apart, w.number(f"{node.name}_weight", weight)], f"{node.name}_part")
    return w.add("Add", [w.name(x), part], node.name)


def _log1p(w: Any, node: fx.Node, x: fx.Node) -> str:
    return w.add("Log", [w.add("Add", [w.name(x), w.number(f"{node.name}_one", 1.0)], f"{node.name}_sum")], node.name)


def _expm1(w: Any, node: fx.Node, x: fx.Node) -> str:
    return w.add("Sub", [w.add("Exp", [w.name(x)], f"{node.name}_exp"), w.number(f"{node.name}_one", 1.0)], node.name)


def _rsqrt(w: Any, node: fx.Node, x: fx.Node) -> str:
    return w.add("Reciprocal", [w.add("Sqrt", [w.name(x)], f"{node.name}_root")], node.name)


def _filled(value: float | None = None) -> Form:
    """One number, in the shape of a tensor where more reads it than arithmetic, which needs no shape. value: None where it
    is an argument."""

    def form(w: Any, node: fx.Node, x: fx.Node, given: float = 0.0, **_: Any) -> str:
        number = given if value is None else value
        if all(user.target in ELEMENTWISE for user in node.users):
            return w.number(node.name, number)
        size = w.add("Shape", [w.name(x)], f"{node.name}_shape")
        return w.add("Expand", [w.number(f"{node.name}_value", number), size], node.name)

    return form


@dataclass(frozen=True)
class _Own:
    """A step of a form, for forms that ask no more than its name."""

    name: str


aten = torch.ops.aten
_COMPARISONS = {"gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual", "eq": "Equal"}

ELEMENTWISE: dict[object, Form] = {
    aten.relu.default: unary("Relu"),
    aten.sigmoid.default: unary("Sigmoid"),
    aten.tanh.default: unary("Tanh"),
    aten.abs.default: unary("Abs"),
    aten.neg.default: unary("Neg"),
    aten.exp.default: unary("Exp"),
    aten.log.default: unary("Log"),
    aten.erf.default: unary("Erf"),
    aten.sqrt.default: unary("Sqrt"),
    aten.reciprocal.default: unary("Reciprocal"),
    aten.sin.default: unary("Sin"),
    aten.cos.default: unary("Cos"),
    aten.log1p.default: _log1p,
    aten.expm1.default: _expm1,
    aten.rsqrt.default: _rsqrt,
    aten.hardsigmoid.default: unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    aten.selu.default: unary("Selu"),
    aten.hardswish.default: _hardswish,
    aten.silu.default: _silu,
    aten.mish.default: _mish,
    aten.gelu.default: _gelu,
    aten.elu.default: _elu,
    aten.celu.default: lambda w, node, x, alpha=1.0: w.add("Celu", [w.name(x)], node.name, alpha=alpha),
    aten.softplus.default: _softplus,
    aten.log_sigmoid.default: _log_sigmoid,
    aten.threshold.default: _threshold,
    aten.hardshrink.default: lambda w, node, x, lambd=0.5: w.add("Shrink", [w.name(x)], node.name, lambd=lambd),
    aten.softshrink.default: lambda w, node, x, lambd=0.5: w.add(
        "Shrink", [w.name(x)], node.name, lambd=lambd, bias=lambd
    ),
    aten.rsub.Scalar: _rsub,
    aten.sign.default: unary("Sign"),
    aten.floor.default: unary("Floor"),
    aten.ceil.default: unary("Ceil"),
    aten.round.default: unary("Round"),
    aten.leaky_relu.default: _leaky_relu,
    aten.prelu.default: _prelu,
    aten.hardtanh.default: lambda w, node, x, low=-1.0, high=1.0: _clamp(w, node, x, low, high),
    aten.relu6.default: lambda w, node, x: _clamp(w, node, x, 0.0, 6.0),
    aten.clamp.default: _clamp,
    aten.clamp_min.default: lambda w, node, x, low: _clamp(w, node, x, low, None),
    aten.clamp_max.default: lambda w, node, x, high: _clamp(w, node, x, None, high),
    aten.pow.Tensor_Scalar: _power,
    aten.pow.Tensor_Tensor: binary("Pow"),
    aten.square.default: lambda w, node, x: w.add("Mul", [w.name(x), w.name(x)], node.name),
    aten.add.Tensor: binary("Add"),
    aten.sub.Tensor: binary("Sub"),
    aten.mul.Tensor: binary("Mul"),
    aten.div.Tensor: binary("Div"),
    aten.maximum.default: binary("Max"),
    aten.minimum.default: binary("Min"),
    aten.addcmul.default: _addcmul,
    aten.lerp.Scalar: _lerp,
    **{
        getattr(getattr(aten, name), overload): binary(kind)
        for name, kind in _COMPARISONS.items()
        for overload in ("Scalar", "Tensor")
    },
    aten.ne.Scalar: _unequal,
    aten.ne.Tensor: _unequal,
    **dict.fromkeys((aten.logical_not.default, aten.bitwise_not.default), _logical("Not")),
    **dict.fromkeys((aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor), _logical("And")),
    **dict.fromkeys((aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor), _logical("Or")),
    **dict.fromkeys((aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar), _where),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    **dict.fromkeys((aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.type_as.default), _as_float),
    aten.zeros_like.default: _filled(0.0),
    aten.ones_like.default: _filled(1.0),
    aten.full_like.default: _filled(),
}
