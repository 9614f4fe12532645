"""Networks as graphs: the one traced copy, in canonical form.

After trace() every operation that a pass needs to recognise is a module called once (convolutions,
activations, pooling, flatten), or one of operator.add, operator.mul and torch.cat. Whatever else a network
does stays as it is: passes walk around it and say so.
"""

import copy
import math
import operator
import traceback
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.graph.layers import WEIGHTED, CappedReLU, IntegerSum, ensure_bias

_CAPS = {(0.0, 6.0): nn.ReLU6, (0.0, math.inf): nn.ReLU}


def _clip(low: float | None = None, high: float | None = None, inplace: bool = False) -> nn.Module | None:
    kind = _CAPS.get((-math.inf if low is None else low, math.inf if high is None else high))
    return kind() if kind else None


def _average(dim=None, keepdim: bool = False) -> nn.Module | None:
    spatial = tuple(sorted(d % 4 for d in dim)) == (2, 3) if isinstance(dim, tuple | list) else False
    if not spatial:
        return None
    return nn.AdaptiveAvgPool2d(1) if keepdim else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


# Functions and methods, and the module that does the same with their arguments after the tensor.
_AS_MODULE = {
    F.relu: lambda inplace=False: nn.ReLU(),
    torch.relu: nn.ReLU,
    torch.relu_: nn.ReLU,
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    F.relu6: lambda inplace=False: nn.ReLU6(),
    F.hardtanh: lambda min_val=-1.0, max_val=1.0, inplace=False: _clip(min_val, max_val),
    torch.clamp: lambda min=None, max=None: _clip(min, max),
    "clamp": lambda min=None, max=None: _clip(min, max),
    "clamp_": lambda min=None, max=None: _clip(min, max),
    F.leaky_relu: lambda negative_slope=0.01, inplace=False: nn.LeakyReLU(negative_slope),
    F.silu: lambda inplace=False: nn.SiLU(),
    F.gelu: lambda approximate="none": nn.GELU(approximate),
    F.elu: lambda alpha=1.0, inplace=False: nn.ELU(alpha),
    F.hardswish: lambda inplace=False: nn.Hardswish(),
    F.hardsigmoid: lambda inplace=False: nn.Hardsigmoid(),
    F.sigmoid: nn.Sigmoid,
    torch.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
    torch.tanh: nn.Tanh,
    F.max_pool2d: lambda *a, **k: nn.MaxPool2d(*a, **k),
    F.avg_pool2d: lambda *a, **k: nn.AvgPool2d(*a, **k),
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.adaptive_max_pool2d: nn.AdaptiveMaxPool2d,
    torch.flatten: lambda start_dim=0, end_dim=-1: nn.Flatten(start_dim, end_dim),
    "flatten": lambda start_dim=0, end_dim=-1: nn.Flatten(start_dim, end_dim),
    F.dropout: lambda *a, **k: nn.Identity(),
    F.dropout2d: lambda *a, **k: nn.Identity(),
    torch.mean: _average,
    "mean": _average,
}

_ADDS = {operator.iadd, torch.add, "add", "add_"}
_MULTIPLIES = {operator.imul, torch.mul, "mul", "mul_"}
_CONCATS = {getattr(torch, name) for name in ("cat", "concat", "concatenate")}
# Functions and methods that only move values about, or add zeros.
REARRANGING = {
    *(operator.getitem, torch.chunk, torch.split, torch.transpose, torch.permute, torch.reshape, torch.flatten),
    *(torch.unsqueeze, torch.squeeze, F.pad),
    *("chunk", "split", "transpose", "permute", "reshape", "view", "unsqueeze", "squeeze", "expand", "contiguous"),
    *("unflatten", "flatten"),
}
ASKS_SHAPE = {getattr, "size", "dim"}
_NOTHING_IN_EVAL = (nn.Identity, nn.modules.dropout._DropoutNd)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return super().is_leaf_module(module, name) or isinstance(module, CappedReLU) or _is_timm_layer(module)


def _is_timm_layer(module: nn.Module) -> bool:
    """timm's two subclasses of torch layers, told by name since timm need not be loaded."""
    return type(module).__name__ in ("Conv2dSame", "BatchNormAct2d") and type(module).__module__.startswith("timm.")


def trace(model: nn.Module, spec: InputSpec) -> fx.GraphModule:
    """A copy of the network as a graph in canonical form; the only copy that is ever made of it.

    The shapes of one image's activations are at every node, as shape() gives them. A network
    that torch.fx cannot trace, or one that calls a layer with weights twice, is a UserError.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    try:
        graph = _Tracer().trace(model)
    except UserError:
        raise
    except Exception as error:  # the network's own code runs here
        raise UserError(f"torch.fx cannot trace the network: {_first_line(error)} (at {_place(error)})") from error
    traced = fx.GraphModule(model, graph)
    _give_calls_their_own_modules(traced)
    propagate_shapes(traced, spec)
    for node in list(traced.graph.nodes):
        _canonicalise(traced, node)
    traced.graph.eliminate_dead_code()
    tidy(traced)
    for module in traced.modules():
        if isinstance(module, WEIGHTED):
            module.weight.data = module.weight.data.contiguous()
            ensure_bias(module)
            module.weight_qparams = module.bias_qparams = None
    propagate_shapes(traced, spec)
    return traced


def tidy(model: fx.GraphModule) -> fx.GraphModule:
    """Bring a graph and its modules back into agreement after an edit."""
    model.delete_all_unused_submodules()
    model.graph.lint()
    model.recompile()
    return model


def shape(node: fx.Node) -> torch.Size:
    """Shape of the node's output for a batch of one image."""
    return node.meta["tensor_meta"].shape


def is_tensor(node: fx.Node) -> bool:
    return hasattr(node.meta.get("tensor_meta"), "shape")


def module_of(model: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return model.get_submodule(node.target) if node.op == "call_module" else None


def weighted_nodes(model: fx.GraphModule) -> list[fx.Node]:
    """The convolutions and linear layers, in the order in which they run."""
    return [node for node in model.graph.nodes if isinstance(module_of(model, node), WEIGHTED)]


def describe(module: nn.Module | None, node: fx.Node) -> str:
    """A node in words: what it does, and its name."""
    if node.op == "output":
        return "the network's output"
    if module is not None:
        return f"{type(module).__name__} {node.target!r}"
    return f"{getattr(node.target, '__name__', node.target)} {node.name!r}"


def insert_module(model: fx.GraphModule, after: fx.Node, name: str, module: nn.Module) -> fx.Node:
    """Call the module on the node's output, and give every reader of that output the result."""
    target = _free_name(model, name)
    model.add_submodule(target, module)
    with model.graph.inserting_after(after):
        node = model.graph.call_module(target, (after,))
    node.meta = dict(after.meta)
    after.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    return node


def run_in_place(model: fx.GraphModule) -> fx.GraphModule:
    """Let activations overwrite their input where it is a fresh tensor that nobody else reads."""
    for node in model.graph.nodes:
        module = module_of(model, node)
        if hasattr(module, "inplace"):
            source = node.all_input_nodes[0]
            writer = module_of(model, source)
            fresh = source.target in (operator.add, operator.mul, torch.cat) or isinstance(
                writer, (*WEIGHTED, _BatchNorm, IntegerSum)
            )
            module.inplace = (fresh or hasattr(writer, "inplace")) and len(source.users) == 1
    return model


def _give_calls_their_own_modules(model: fx.GraphModule) -> None:
    calls = defaultdict(list)
    for node in model.graph.nodes:
        if node.op == "call_module":
            calls[node.target].append(node)
    for target, nodes in calls.items():
        module = model.get_submodule(target)
        if len(nodes) > 1 and any(True for _ in module.parameters()):
            raise UserError(
                f"layer {target!r} is used {len(nodes)} times in the network: its weights cannot be transformed for "
                "each use; give every use a layer of its own"
            )
        for node in nodes[1:]:
            node.target = _free_name(model, target)
            model.add_submodule(node.target, copy.deepcopy(module))


def _free_name(model: nn.Module, name: str) -> str:
    taken = {key for key, _ in model.named_modules()}
    candidate, count = name, 1
    while candidate in taken:
        candidate, count = f"{name}_{count}", count + 1
    return candidate


def propagate_shapes(model: fx.GraphModule, spec: InputSpec) -> fx.GraphModule:
    """Note at every node the shape of its output for one image."""
    try:
        with torch.no_grad():
            ShapeProp(model).propagate(spec.probe(batch=1))
    except Exception as error:
        reason = _first_line(error.__cause__ or error)
        raise UserError(
            f"the network fails on an input of shape {spec.shape()}: {reason}; check --image_size"
        ) from error
    return model


def _canonicalise(model: fx.GraphModule, node: fx.Node) -> None:
    """Rewrite one node as the module, or the one function, that passes know it by."""
    module = module_of(model, node)
    if isinstance(module, _NOTHING_IN_EVAL) or getattr(node.target, "__name__", "") == "stochastic_depth":
        node.replace_all_uses_with(node.args[0])
        model.graph.erase_node(node)
    elif node.target is torch._assert:
        model.graph.erase_node(node)
    elif type(module).__name__ == "Conv2dSame":
        _split_same_padding(model, node, module)
    elif type(module).__name__ == "BatchNormAct2d":
        _split_norm_and_activation(model, node, module)
    elif node.op in ("call_function", "call_method"):
        _canonicalise_function(model, node)


def _canonicalise_function(model: fx.GraphModule, node: fx.Node) -> None:
    tensors = [a for a in node.args if isinstance(a, fx.Node) and is_tensor(a)]
    if (
        node.target in _ADDS | _MULTIPLIES
        and "alpha" not in node.kwargs
        and "out" not in node.kwargs
        and len(node.args) == 2
    ):
        node.op, node.target = "call_function", operator.add if node.target in _ADDS else operator.mul
    elif node.target in _CONCATS:
        node.target = torch.cat
        if isinstance(node.args[0], fx.Node):
            node.update_arg(0, _members(model, node, node.args[0]))
    elif len(tensors) == 1 and node.args[0] is tensors[0] and node.target in _AS_MODULE:
        rest = [*node.args[1:], *node.kwargs.values()]
        if any(isinstance(value, fx.Node) for value in rest):
            return
        try:
            replacement = _AS_MODULE[node.target](*node.args[1:], **node.kwargs)
        except TypeError:  # arguments that no module takes
            return
        if replacement is not None:
            _replace(model, node, list(replacement) if isinstance(replacement, nn.Sequential) else [replacement])
    elif node.target in ("view", "reshape", torch.reshape) and tensors and _flattens(shape(tensors[0]), shape(node)):
        _replace(model, node, [nn.Flatten()])


def _members(model: fx.GraphModule, reader: fx.Node, sequence: fx.Node) -> list[fx.Node]:
    """The tensors of a node that is a sequence of them, such as chunks, each a node of its own."""
    members = []
    with model.graph.inserting_before(reader):
        for index, tensor_meta in enumerate(sequence.meta["tensor_meta"]):
            members.append(model.graph.call_function(operator.getitem, (sequence, index)))
            members[-1].meta["tensor_meta"] = tensor_meta
    return members


def _flattens(before: torch.Size, after: torch.Size) -> bool:
    return len(after) == 2 and len(before) > 2 and before[0] == after[0]


def _replace(model: fx.GraphModule, node: fx.Node, modules: list[nn.Module]) -> None:
    """Put a chain of modules in the place of a node."""
    last = node.args[0]
    with model.graph.inserting_before(node):
        for module in modules:
            if isinstance(module, nn.Identity):
                continue
            target = _free_name(model, node.name)
            model.add_submodule(target, module)
            last = model.graph.call_module(target, (last,))
    last.meta = dict(node.meta)
    node.replace_all_uses_with(last)
    model.graph.erase_node(node)


def _split_same_padding(model: fx.GraphModule, node: fx.Node, conv: nn.Conv2d) -> None:
    """TensorFlow's 'same' padding, which depends on the image's size, as zeros for the size at hand."""
    before = []
    for size, kernel, stride, dilation in zip(
        shape(node.args[0])[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True
    ):
        total = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        before.append((total // 2, total - total // 2))
    (top, bottom), (left, right) = before
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        0,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
    ).requires_grad_(False)
    plain.load_state_dict(conv.state_dict())
    model.set_submodule(node.target, plain)
    if (top, left) == (bottom, right):
        plain.padding = (top, left)
    else:
        padding = insert_module(model, node.args[0], f"{node.name}_pad", nn.ZeroPad2d((left, right, top, bottom)))
        for user in list(padding.users):
            if user is not node:
                user.replace_input_with(padding, padding.args[0])


def _split_norm_and_activation(model: fx.GraphModule, node: fx.Node, norm: nn.BatchNorm2d) -> None:
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    plain = plain.eval().requires_grad_(False)
    plain.load_state_dict({key: value for key, value in norm.state_dict().items() if key in plain.state_dict()})
    model.set_submodule(node.target, plain)
    if not isinstance(norm.act, nn.Identity):
        insert_module(model, node, f"{node.name}_act", norm.act)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _place(error: BaseException) -> str:
    """The innermost line of the network's own code, past torch.fx."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename and f.filename != __file__
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}, {frames[-1].name}" if frames else "its forward"


def classes_of(model: fx.GraphModule) -> int:
    """How many classes a traced network tells apart: channels of its output, last axis of a detector's logits."""
    result = next(node for node in model.graph.nodes if node.op == "output").args[0]
    return shape(result[0])[-1] if isinstance(result, tuple | list) else shape(result)[1]
