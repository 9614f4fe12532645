"""How ONNX writes the modules of a graph: quantizers, layers, clips, activations; functions by the module's class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from utils.backends.caps import reached_caps
from utils.core.errors import UserError
from utils.graph.layers import WEIGHTED, ChannelAffine, Clip, Elementwise, padding, per_channel
from utils.graph.nodes import module_of, shape
from utils.graph.onnx_elementwise import ELEMENTWISE
from utils.graph.onnx_forms import padding_by_axis
from utils.quantization.qparams import QParams
from utils.quantization.quantizer import Quantizer
from utils.quantization.target import in_words

if TYPE_CHECKING:
    from utils.backends.onnx_writer import _Writer

aten = torch.ops.aten


@dataclass(frozen=True)
class Value:
    """A float tensor of the model. grid: the scale and zero point that its values lie on, if any."""

    name: str
    grid: tuple[float, int] | None = None


def _quantizer(w: "_Writer", node: fx.Node, module: Quantizer) -> Value:
    _check_bits(w, module.qparams, w.target.bits_activation, f"the activations of {node.name!r}")
    source, grid = w.operand(node.args[0], node.name), (module.scale, module.zero_point)
    if module.step_min == 0 and module.rectifies:
        source = w.add("Relu", [source], f"{node.name}_relu")
    elif module.rectifies:
        low = w.number(f"{node.name}_low", module.step_min * module.scale)
        source = w.add("Max", [source, low], f"{node.name}_above")
    if (cap := reached_caps(w.model, node, module)) is not None:
        cap = per_channel(cap, len(shape(node)))[None] if cap.dim() else cap
        if w.target.caps == "integers":
            return w.quantize(source, node.name, grid, cap + module.zero_point)
        if w.target.caps == "between":  # quantized before and after, so that the layer's kernel stays one of integers
            source = w.quantize(source, f"{node.name}_uncapped", grid).name
        bounds = w.constant(f"{node.name}_cap", cap * module.scale)
        source = w.add("Min", [source, bounds], f"{node.name}_below")
    return w.quantize(source, node.name, grid)


def _check_bits(w: "_Writer", qparams: QParams, bits: tuple[int, ...], what: str) -> None:
    if qparams.bits not in bits:
        raise UserError(
            f"{what} have {qparams.bits} bits, and {w.target.title} has no kernels for them, only for {in_words(bits)}; "
            "such a network can only be simulated, or written as a program (.pt2)"
        )


def _parameters(w: "_Writer", node: fx.Node, layer: nn.Module, axis: int = 0) -> list[str]:
    weights, biases = layer.weight_qparams, layer.bias_qparams
    if weights is not None:
        _check_bits(w, weights, w.target.bits_weight, f"the weights of layer {node.target!r}")
    else:
        w.float_layers.append(node.name)
    if biases is not None:
        _check_bits(w, biases, (32,), f"the values of the bias of layer {node.target!r}")
    return [
        w.parameter(f"{node.name}_weight", layer.weight, weights, getattr(torch, w.weight_type), axis),
        w.parameter(f"{node.name}_bias", layer.bias, biases, torch.int32),
    ]


def _layer(w: "_Writer", node: fx.Node, layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return _linear(w, node, layer)
    transposed = isinstance(layer, _ConvTransposeNd)
    before, after = padding(layer)
    source = node.args[0]
    if _pads_zeros(source) and not transposed:
        low, high = padding_by_axis(source.args[1], len(shape(source)))
        before, after = (
            [a + b for a, b in zip(own, more[2:], strict=True)] for own, more in ((before, low), (after, high))
        )
        source = source.args[0]
    options = {
        "kernel_shape": layer.kernel_size,
        "strides": layer.stride,
        "dilations": layer.dilation,
        "group": layer.groups,
    }
    options |= {"output_padding": layer.output_padding} if transposed else {}
    inputs = [w.layer_input(source, layer), *_parameters(w, node, layer, axis=1 if transposed else 0)]
    kind = "ConvTranspose" if transposed else "Conv"
    return w.add(kind, inputs, node.name, pads=[*before, *after], **options)


def _pads_zeros(node: fx.Node) -> bool:
    """Whether a node pads positions with zeros, which a convolution can do by itself."""
    if node.target is not aten.pad.default or node.args[2] != "constant" or node.args[3]:
        return False
    low, high = padding_by_axis(node.args[1], len(shape(node)))
    return not any((*low[:2], *high[:2]))


def _linear(w: "_Writer", node: fx.Node, layer: nn.Linear) -> str:
    weight, bias = _parameters(w, node, layer)
    source = w.layer_input(node.args[0], layer)
    if len(shape(node)) == 2:
        return w.add("Gemm", [source, weight, bias], node.name, transB=1)
    if (size := w.full_shape(node)) is not None:
        rows = w.sizes(f"{node.name}_rows_shape", [-1, layer.in_features])
        x = w.add("Reshape", [source, rows], f"{node.name}_rows")
        product = w.add("Gemm", [x, weight, bias], node.name, [f"{node.name}_product"], transB=1)
        return w.add("Reshape", [product, w.sizes(f"{node.name}_shape", size)], f"{node.name}_reshape", [node.name])
    turned = w.add("Transpose", [weight], f"{weight}_turned", perm=[1, 0])
    product = w.add("MatMul", [source, turned], f"{node.name}_product")
    return w.add("Add", [product, bias], node.name)


def _clip(w: "_Writer", node: fx.Node, clip: Clip) -> str:
    dims, name = len(shape(node)), w.operand(node.args[0], node.name)
    low, high = (per_channel(end, dims) if end.dim() else end for end in (clip.low, clip.high))
    if clip.rectifies and not clip.capped:
        return w.add("Relu", [name], node.name)
    if low.dim() == high.dim() == 0:
        bounds = [w.number(f"{node.name}_{side}", float(end)) for side, end in (("low", low), ("high", high))]
        return w.add("Clip", [name, *bounds], node.name)
    name = w.add("Max", [name, w.constant(f"{node.name}_low", low)], f"{node.name}_above")
    return w.add("Min", [name, w.constant(f"{node.name}_high", high)], node.name)


def _affine(w: "_Writer", node: fx.Node, affine: ChannelAffine) -> str:
    dims = len(shape(node))
    scale, shift = (per_channel(part, dims) if part.dim() else part for part in (affine.scale, affine.shift))
    x = w.operand(node.args[0], node.name)
    product = w.add("Mul", [x, w.constant(f"{node.name}_scale", scale)], f"{node.name}_product")
    return w.add("Add", [product, w.constant(f"{node.name}_shift", shift)], node.name)


def _batchnorm(w: "_Writer", node: fx.Node, norm: _BatchNorm) -> str:
    ones = torch.ones_like(norm.running_mean)
    parts = (
        norm.weight if norm.affine else ones,
        norm.bias if norm.affine else 0 * ones,
        norm.running_mean,
        norm.running_var,
    )
    names = [w.constant(f"{node.name}_{i}", part) for i, part in enumerate(parts)]
    return w.add("BatchNormalization", [w.name(node.args[0]), *names], node.name, epsilon=norm.eps)


def _elementwise(w: "_Writer", node: fx.Node, function: Elementwise) -> str:
    """The activation's own operators; as torch.onnx writes it where one has no form here."""
    nodes, initializers = len(w.nodes), len(w.initializers)
    copied = _Inner(w, node)
    ShapeProp(function.inner).propagate(torch.zeros(shape(node)))  # which operators give truth values
    for inner in function.inner.graph.nodes:
        if not copied.write(inner):
            del w.nodes[nodes:], w.initializers[initializers:]
            return w.by_torch(node, function, [node.args[0]])
    if not function.level.dim():
        return copied.result
    level = w.constant(f"{node.name}_level", per_channel(function.level, len(shape(node))))
    return w.add("Mul", [copied.result, level], f"{node.name}_levelled")


class _Inner:
    """Writes the operators of an activation with names of their own; the last has the activation's."""

    def __init__(self, w: "_Writer", outer: fx.Node):
        self.w, self.outer, self.result = w, outer, ""

    def write(self, inner: fx.Node) -> bool:
        """Whether the operator has a form."""
        if inner.op == "placeholder":
            self.w.values[inner] = self._input()
        elif inner.op == "get_attr":
            self.w.values[inner] = Value(self.w.constant(f"{self.outer.name}_{inner.name}", self.w.tensor(inner)))
        elif inner.op == "output":
            self.result = self.w.name(inner.args[0])
        else:
            form = ELEMENTWISE.get(inner.target)
            named = _Named(self.w, self.outer)
            result = form(named, inner, *inner.args, **inner.kwargs) if form else None
            if result is None:
                return False
            self.w.values[inner] = Value(result)
        return True

    def _input(self) -> Value:
        """What the activation reads, times its gain."""
        value = Value(self.w.operand(self.outer.args[0], self.outer.name))
        function = module_of(self.w.model, self.outer)
        if not function.gain.dim():
            return value
        gain = self.w.constant(f"{self.outer.name}_gain", per_channel(function.gain, len(shape(self.outer))))
        return Value(self.w.add("Mul", [value.name, gain], f"{self.outer.name}_scaled"))


class _Named:
    """A writer that puts an activation's name before those of its operators."""

    def __init__(self, w: "_Writer", outer: fx.Node):
        self.w, self.prefix = w, f"{outer.name}_"

    def _own(self, name: str) -> str:
        return f"{self.prefix}{name}"

    def add(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        return self.w.add(kind, inputs, self._own(name), **attributes)

    def constant(self, name: str, value: Tensor) -> str:
        return self.w.constant(self._own(name), value)

    def number(self, name: str, value: float) -> str:
        return self.w.number(self._own(name), value)

    def operand(self, argument: Any, name: str) -> str:
        return self.w.operand(argument, self._own(name))

    def name(self, node: fx.Node) -> str:
        return self.w.name(node)

    def tensor(self, node: fx.Node) -> Tensor:
        return self.w.tensor(node)


MODULES = {
    Quantizer: _quantizer,
    WEIGHTED: _layer,
    Clip: _clip,
    ChannelAffine: _affine,
    _BatchNorm: _batchnorm,
    Elementwise: _elementwise,
}
