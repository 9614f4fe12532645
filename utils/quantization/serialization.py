"""A quantized network as one file: its graphs as plain data and tensors, and its recipe.

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
from torch import fx, nn

from utils.core.errors import UserError
from utils.core.files import atomic_write
from utils.core.input_spec import InputSpec
from utils.core.unpickling import read_plain
from utils.graph.layers import ChannelAffine, Clip, Elementwise
from utils.graph.nodes import module_of, propagate_shapes, tidy
from utils.quantization.qparams import QParams
from utils.quantization.quantizer import Quantizer

FORMAT = "dfq network 2"
_OWN = {kind.__name__: kind for kind in (ChannelAffine, Clip, Elementwise, Quantizer)}
_PLAIN = (int, float, str, bool, type(None))


@dataclass(frozen=True)
class Saved:
    """What a file holds.

    model: the network before any pass; float: after the exact ones; simulated: quantized. recipe: its fields.
    task: of the script that saved it. name, weights: of the network. extras: what else the task needs to evaluate it.
    """

    model: fx.GraphModule
    float: fx.GraphModule
    simulated: fx.GraphModule
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
        "batch": saved.model.meta["batch"],
        "outputs": list(saved.model.meta.get("outputs") or ()),
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
    if file.is_dir():
        raise UserError(f"{str(file)!r} is a folder; {remedy}")
    if not file.is_file():
        raise UserError(f"there is no file {str(file)!r}; {remedy}")
    content = read_plain(file, remedy)
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(f"{str(file)!r} is no saved network (its format is {found!r}, not {FORMAT!r}); {remedy}")
    try:
        spec = InputSpec(**content["spec"])
        graphs = {
            name: propagate_shapes(_decode_graph(graph), spec, content["batch"] or 1)
            for name, graph in content["graphs"].items()
        }
        for graph in graphs.values():
            graph.meta["batch"] = content["batch"]
            graph.meta["outputs"] = tuple(content.get("outputs", ())) or None  # older files have none
        rest = {name: content[name] for name in ("recipe", "task", "name", "weights", "extras")}
        saved = Saved(**graphs, spec=spec, **rest)
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


def _decode_graph(content: Mapping[str, Any]) -> fx.GraphModule:
    root, graph, made = nn.Module(), fx.Graph(), {}
    for place, module in content["modules"].items():
        _parent(root, place).add_module(place.rpartition(".")[2], _decode_module(module))
    for place, tensor in content["tensors"].items():
        _parent(root, place).register_buffer(place.rpartition(".")[2], tensor)
    for op, name, target, args, kwargs in content["nodes"]:
        called = _function(target) if op == "call_function" else target
        args, kwargs = _decode(args, made), _decode(kwargs, made)
        made[name] = _check(graph.create_node(op, called, args, kwargs, name))
    return tidy(fx.GraphModule(root, graph).eval())


def _check(node: fx.Node) -> fx.Node:
    """Refuse a node that does more than compute with tensors. fx writes names into the Python that it runs."""
    known = node.op in ("placeholder", "output", "call_module", "get_attr")
    if node.op == "call_function":
        known = node.target is operator.getitem or is_pure(node.target)
    names = [name for name in (node.target, *node.kwargs) if isinstance(name, str)]
    if known and all(re.fullmatch(r"[\w.-]+", name) for name in names):
        return node
    raise UserError(
        f"{node.target!s}, at node {node.name!r}, is no function of torch's tensors; a saved network has no others"
    )


def is_pure(target: Any) -> bool:
    """Whether a function is one of ATen's that take a tensor and write to nothing: no file, no device, no other tensor."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or target._schema.is_mutable:
        return False
    kinds = [str(argument.type) for argument in target._schema.arguments]
    return any("Tensor" in kind for kind in kinds) and "Device" not in "".join(kinds)


def _parent(root: nn.Module, place: str) -> nn.Module:
    for name in place.split(".")[:-1]:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    return root


def _name_of(function: Any) -> str:
    """Where a function is found again: aten.NAME.OVERLOAD, or getitem."""
    return "getitem" if function is operator.getitem else str(function)


def _function(name: str) -> Any:
    if name == "getitem":
        return operator.getitem
    found = re.fullmatch(r"aten\.(\w+)\.(\w+)", name) if isinstance(name, str) else None
    overload = getattr(getattr(torch.ops.aten, found[1], None), found[2], None) if found else None
    if overload is None or not is_pure(overload):
        raise UserError(f"the file calls {name!r}, which is no function of torch's tensors; it is not loaded")
    return overload


def _encode(value: Any) -> Any:
    """An argument, or an attribute of a module, as plain data."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, QParams):
        return {"qparams": asdict(value)}
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
    if kind == "dtype":
        return torch.empty(0, dtype=getattr(torch, content)).dtype  # a TypeError for what is none
    if kind == "qparams":
        return QParams(**content)
    return {key: _decode(entry, nodes) for key, entry in content.items()}


# ---------------------------------------------------------------------------------------- modules

_INTERNAL = set(vars(nn.Module()))


def _encode_module(module: nn.Module, place: str) -> dict[str, Any]:
    """A layer's class by name, its own plain attributes, its parameters and its buffers."""
    kind = type(module).__name__
    if _OWN.get(kind, getattr(nn, kind, None)) is not type(module):
        raise UserError(f"layer {place!r} is a {kind}, which is none of torch.nn, so that --save cannot name it")
    if any(True for _ in module.children()) and not isinstance(module, Elementwise):
        raise UserError(f"layer {place!r} is a {kind}, made of further layers, which --save cannot write")
    attributes = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
    return {
        "inner": _encode_graph(module.inner) if isinstance(module, Elementwise) else None,
        "kind": kind,
        "attributes": {name: _encode(value) for name, value in attributes.items()},
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
    if content["inner"] is not None:
        module.inner = _decode_graph(content["inner"])
    for name, tensor in content["parameters"].items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    for name, tensor in content["buffers"].items():
        module.register_buffer(name, tensor, persistent=name not in content["volatile"])
    return module
