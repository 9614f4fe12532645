"""A quantized network as one file: its graphs as plain data and tensors, with its grids and its recipe.

A file holds no code. Modules are named layers of torch.nn and of this project, functions are named
functions of tensors and arithmetic; each is looked up here, and whatever else a file names is refused. So a
network is loaded without the code that built it, and computes bit for bit what was saved.
"""

import operator
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import get_overridable_functions

from utils.core.errors import UserError
from utils.core.files import atomic_write
from utils.core.input_spec import InputSpec
from utils.graph.capture import module_of, propagate_shapes, tidy
from utils.graph.layers import CappedReLU
from utils.quantization.quantizer import QParams, Quantizer

FORMAT = "dfq network 1"
_NAMESPACES = {"torch": torch, "operator": operator, "functional": F, "torch.nn.functional": F, "torch._C._nn": F}
_OWN = {kind.__name__: kind for kind in (CappedReLU, Quantizer)}
_PLAIN = (int, float, str, bool, type(None))
# The functions that a graph may call: those of tensors, as torch lists them (torch.load is none), and arithmetic.
_CALLABLE = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.neg),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.pow, operator.matmul),
    *(getattr, operator.getitem, *(function for some in get_overridable_functions().values() for function in some)),
}
_ASKED = ("shape", "ndim", "dtype", "device")  # of a tensor, by getattr


@dataclass(frozen=True)
class Saved:
    """What a file holds.

    model: the network before any pass; float: after the exact ones; simulated: quantized. weight_grids, bias_grids:
    by layer. recipe: its fields. task: of the script that saved it. name, weights: of the network. extras: what else
    the task needs to evaluate it.
    """

    model: fx.GraphModule
    float: fx.GraphModule
    simulated: fx.GraphModule
    weight_grids: dict[str, QParams]
    bias_grids: dict[str, QParams]
    recipe: dict[str, Any]
    spec: InputSpec
    task: str
    name: str
    weights: str
    extras: dict[str, Any] = field(default_factory=dict)


def save(file: Path, saved: Saved) -> None:
    """Write the file, whole or not at all. What cannot be said as data is a UserError that names it."""
    content = {
        "format": FORMAT,
        "graphs": {name: _encode_graph(getattr(saved, name)) for name in ("model", "float", "simulated")},
        "weight_grids": {name: asdict(grid) for name, grid in saved.weight_grids.items()},
        "bias_grids": {name: asdict(grid) for name, grid in saved.bias_grids.items()},
        "recipe": saved.recipe,
        "spec": asdict(saved.spec),
        "task": saved.task,
        "name": saved.name,
        "weights": saved.weights,
        "extras": saved.extras,
    }
    with atomic_write(file) as beside:
        torch.save(content, beside)


def load(file: Path, task: str) -> Saved:
    """Read a file that save() wrote for that task; anything else is a UserError."""
    remedy = "pass --load with a file that --save wrote"
    if not file.is_file():
        raise UserError(f"there is no file {str(file)!r}; {remedy}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling raises on damaged or foreign bytes
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot read {str(file)!r} ({reason}); {remedy}") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(f"{str(file)!r} is no saved network (its format is {found!r}, not {FORMAT!r}); {remedy}")
    try:
        spec = InputSpec(**content["spec"])
        graphs = {name: _decode_graph(graph, spec) for name, graph in content["graphs"].items()}
        grids = {
            kind: {name: QParams(**grid) for name, grid in content[kind].items()}
            for kind in ("weight_grids", "bias_grids")
        }
        rest = {name: content[name] for name in ("recipe", "task", "name", "weights", "extras")}
        saved = Saved(**graphs, **grids, spec=spec, **rest)
    except UserError:
        raise
    except Exception as error:  # whatever data of another shape leads to
        raise UserError(f"{str(file)!r} is damaged ({type(error).__name__}: {error}); {remedy}") from None
    if saved.task != task:
        raise UserError(f"{str(file)!r} holds a network for {saved.task}, not {task}; load it with that task's script")
    return saved


# ----------------------------------------------------------------------------------------- graphs


def _encode_graph(model: fx.GraphModule) -> dict[str, Any]:
    nodes, modules, tensors = [], {}, {}
    for node in model.graph.nodes:
        _check(node)
        target = node.target if isinstance(node.target, str) else _name_of(node.target)
        nodes.append((node.op, node.name, target, _encode(node.args), _encode(node.kwargs)))
        if node.op == "call_module":
            modules[node.target] = _encode_module(module_of(model, node), node.target)
        elif node.op == "get_attr":
            module, _, name = node.target.rpartition(".")
            tensors[node.target] = getattr(model.get_submodule(module), name)
    return {"nodes": nodes, "modules": modules, "tensors": tensors}


def _decode_graph(content: Mapping[str, Any], spec: InputSpec) -> fx.GraphModule:
    root, graph, made = nn.Module(), fx.Graph(), {}
    for place, module in content["modules"].items():
        _parent(root, place).add_module(place.rpartition(".")[2], _decode_module(module))
    for place, tensor in content["tensors"].items():
        _parent(root, place).register_buffer(place.rpartition(".")[2], tensor)
    for op, name, target, args, kwargs in content["nodes"]:
        called = _function(target) if op == "call_function" else target
        args, kwargs = _decode(args, made), _decode(kwargs, made)
        made[name] = _check(graph.create_node(op, called, args, kwargs, name))
    return propagate_shapes(tidy(fx.GraphModule(root, graph).eval()), spec)


def _check(node: fx.Node) -> fx.Node:
    """Refuse a node that does more than compute with tensors. fx writes names into the Python that it runs."""
    if node.op == "call_function":
        known = node.target in _CALLABLE and (node.target is not getattr or node.args[1] in _ASKED)
    elif node.op == "call_method":
        known = not node.target.startswith("_") and node.target in dir(Tensor)
    else:
        known = True
    names = [name for name in (node.target, *node.kwargs) if isinstance(name, str)]
    if known and all(re.fullmatch(r"[\w.-]+", name) for name in names):
        return node
    called = getattr(node.target, "__name__", node.target)
    raise UserError(
        f"{called!r}, at node {node.name!r}, is no function of torch's tensors; a saved network has no others"
    )


def _parent(root: nn.Module, place: str) -> nn.Module:
    for name in place.split(".")[:-1]:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    return root


def _name_of(function: Any) -> str:
    """Where a function is found again."""
    for space, module in _NAMESPACES.items():
        if getattr(module, function.__name__, None) is function:
            return f"{space}.{function.__name__}"
    if function is getattr:
        return "getattr"
    raise UserError(f"{function.__name__} is no function of torch, so that --save cannot name it")


def _function(name: str) -> Any:
    space, _, function = name.rpartition(".")
    if name == "getattr":
        return getattr
    if space not in _NAMESPACES:
        raise UserError(f"the file calls {name!r}, which is no function of torch; it is not loaded")
    return getattr(_NAMESPACES[space], function)


def _encode(value: Any) -> Any:
    """An argument as plain data."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, slice):
        return {"slice": [_encode(end) for end in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, Mapping):
        return {"mapping": {key: _encode(entry) for key, entry in value.items()}}
    if isinstance(value, list | tuple):
        return [type(value) is list, *map(_encode, value)]
    if isinstance(value, _PLAIN):
        return value
    raise UserError(f"--save cannot write {value!r}, an argument in the network's graph")


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        is_list, *entries = value
        return (list if is_list else tuple)(_decode(entry, nodes) for entry in entries)
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "slice":
        return slice(*(_decode(end, nodes) for end in content))
    if kind == "dtype":
        return torch.empty(0, dtype=getattr(torch, content)).dtype  # a TypeError for what is none
    if kind == "ellipsis":
        return Ellipsis
    return {key: _decode(entry, nodes) for key, entry in content.items()}


# ---------------------------------------------------------------------------------------- modules

_INTERNAL = set(vars(nn.Module()))


def _encode_module(module: nn.Module, place: str) -> dict[str, Any]:
    """A layer's class by name, its own plain attributes, its parameters and its buffers."""
    kind = type(module).__name__
    if _OWN.get(kind, getattr(nn, kind, None)) is not type(module):
        raise UserError(f"layer {place!r} is a {kind}, which is none of torch.nn, so that --save cannot name it")
    if any(True for _ in module.children()):
        raise UserError(f"layer {place!r} is a {kind}, made of further layers, which --save cannot write")
    attributes = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
    grid = attributes.pop("grid", None)
    return {
        "kind": kind,
        "attributes": {name: _encode(value) for name, value in attributes.items()},
        "grid": grid and asdict(grid),
        "parameters": dict(module.named_parameters(recurse=False)),
        "buffers": dict(module._buffers),
        "volatile": sorted(module._non_persistent_buffers_set),
    }


def _decode_module(content: Mapping[str, Any]) -> nn.Module:
    kind = _OWN.get(content["kind"]) or getattr(nn, content["kind"], None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(f"the file holds a {content['kind']!r}, which is no layer of torch.nn; it is not loaded")
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in content["attributes"].items():
        setattr(module, name, _decode(value, {}))
    if content["grid"]:
        module.grid = QParams(**content["grid"])
    for name, tensor in content["parameters"].items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    for name, tensor in content["buffers"].items():
        module.register_buffer(name, tensor, persistent=name not in content["volatile"])
    return module
