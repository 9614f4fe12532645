"""torch.export's graph in canonical form: one way of writing each operation.

The translator walks the exported graph once. What does not depend on the image is computed and becomes a constant.
What does is written by the operator's rule (utils/graph/rules.py), or as it is. Sizes that depend on the batch become -1.
"""

import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from utils.core.errors import UserError
from utils.graph.nodes import free_name

_TRANSPOSES = {
    torch.ops.aten.t.default,
    torch.ops.aten.numpy_T.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.permute.default,
}
Size = tuple[int | torch.SymInt, ...]  # of a value; symbolic, or a BatchSize, where it depends on the batch


TRIALS = (2, 3)  # batches, for which what follows from sizes alone is computed


class BatchSize(int):
    """A size that follows from the batch, in a program that was exported for one batch."""


def is_free(side: int | torch.SymInt) -> bool:
    return isinstance(side, torch.SymInt | BatchSize)


def translate(
    program: ExportedProgram, rules: dict[str, Any], wrapper: str = "", batch: int | None = None
) -> fx.GraphModule:
    """The program's graph in canonical form, with layers as modules.

    rules: by the operator's name. wrapper: what stands before the names of the user's own modules. batch: that the program
    was exported for, if it is to be free again.
    """
    translator = Translator(program, rules, wrapper, batch)
    for node in program.graph.nodes:
        translator.visit(node)
    model = fx.GraphModule(translator.root, translator.graph)
    model.meta["constants"] = translator.values  # what constants were computed from
    model.graph.eliminate_dead_code()
    return model.eval()


def size_of(node: fx.Node | Tensor) -> Size:
    return tuple(node.shape if isinstance(node, Tensor) else node.meta["size"])


def is_constant(value: Any) -> bool:
    """Whether nothing in a value depends on the image."""
    if isinstance(value, tuple | list):
        return all(map(is_constant, value))
    return not isinstance(value, fx.Node)


class Translator:
    """The canonical graph as far as it is written. Rules call emit(), layer(), attribute() and reshape().

    values: by exported node, what it became: a node, a constant, or a tuple of these.
    """

    def __init__(self, program: ExportedProgram, rules: dict[str, Any], wrapper: str, batch: int | None):
        self.graph, self.root, self.rules, self.wrapper = fx.Graph(), nn.Module(), rules, wrapper
        self.batch = batch
        self.values: dict[fx.Node, Any] = {}
        self.origins: dict[int, fx.Node] = {}  # of constant tensors, by identity
        self.fqns: dict[int, str] = {}  # of parameters and buffers, by identity
        self.tensors = _lifted(program)
        self.current: fx.Node | None = None
        self.trials: dict[
            fx.Node, tuple[Any, Any]
        ] = {}  # of what follows from sizes alone, its values for TRIALS images

    # ------------------------------------------------------------------------------- the walk

    def visit(self, node: fx.Node) -> None:
        self.current = node
        if node.op == "placeholder":
            self.values[node] = self._placeholder(node)
        elif node.op == "output":
            self._output(fx.map_arg(node.args[0], self.values.__getitem__))
        elif node.op == "call_function":
            args, kwargs = (fx.map_arg(part, self.values.__getitem__) for part in (node.args, node.kwargs))
            self.values[node] = self._call(node, args, kwargs)
        else:
            self.values[node] = None  # guards

    def _placeholder(self, node: fx.Node) -> Any:
        if node.name in self.tensors:
            fqn, tensor = self.tensors[node.name]
            self.origins[id(tensor)] = node
            self.fqns[id(tensor)] = fqn.removeprefix(self.wrapper)
            return tensor
        if not isinstance(node.meta.get("val"), Tensor):
            return node.meta.get("val")  # a keyword's default
        made = self.graph.placeholder(node.name)
        made.meta["size"] = self.sizes(node.meta["val"])
        return made

    def _output(self, results: Any) -> None:
        leaves = [leaf for leaf in results if isinstance(leaf, fx.Node | Tensor)]
        if not any(isinstance(leaf, fx.Node) for leaf in leaves):
            raise UserError("the network returns nothing that depends on its images, so there is nothing to score")
        nodes = [leaf if isinstance(leaf, fx.Node) else self.attribute(leaf, "output") for leaf in leaves]
        self.graph.output(nodes[0] if len(nodes) == 1 else tuple(nodes))

    def _call(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        value = node.meta.get("val")
        if node.target is operator.getitem and isinstance(args[0], tuple | list):
            return args[0][args[1]]
        if isinstance(value, int | float | bool):  # a size that does not depend on the batch
            return value
        if is_constant(args) and is_constant(list(kwargs.values())):
            _check_drawn(node)
            return self._constant(node, args, kwargs)
        if (made := self._of_sizes(node)) is not None:
            return made
        name = node.target._schema.name.partition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else ""
        if name == "_assert_tensor_metadata":  # torch.export's own check of a conversion
            return None
        rule = self.rules.get(name)
        result = rule(self, node, *args, **kwargs) if rule else None
        if result is None:
            _check_drawn(node)
            return self.emit(node.target, args, kwargs)
        return result

    def _constant(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        with torch.no_grad():
            value = node.target(*args, **kwargs)
        if isinstance(value, Tensor):
            self.origins[id(value)] = node
        return value

    def _of_sizes(self, node: fx.Node) -> Any:
        """A tensor that depends on the batch's size alone: a constant, or one row of it for all images; None for others."""
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and len(value.node.expr.free_symbols) == 1:
            self.trials[node] = tuple(
                int(value.node.expr.subs(dict.fromkeys(value.node.expr.free_symbols, n))) for n in TRIALS
            )
            return None
        sources = node.all_input_nodes
        known = all(source in self.trials or is_constant(self.values[source]) for source in sources)
        if not isinstance(value, Tensor) or not known or not isinstance(node.target, torch._ops.OpOverload):
            return None
        _check_drawn(node)
        first, second = self.trials[node] = tuple(self._tried(node, i) for i in range(2))
        if first.shape == second.shape:
            return first if torch.equal(first, second) else None
        row = first[:1]
        if [len(first), len(second)] != list(TRIALS) or not all(
            torch.equal(row.expand_as(t), t) for t in (first, second)
        ):
            return None
        return self._for_every_image(row)

    def _for_every_image(self, row: Tensor) -> fx.Node:
        """A constant [1, ...] as often as there are images."""
        sides = [self.image_count(), *[-1] * (row.dim() - 1)]
        return self.emit(
            torch.ops.aten.expand.default, (self.attribute(row), sides), size=(self.free(), *row.shape[1:])
        )

    def _tried(self, node: fx.Node, trial: int) -> Any:
        """An exported node's value for one of TRIALS."""

        def value(source: fx.Node) -> Any:
            return self.trials[source][trial] if source in self.trials else self.values[source]

        args, kwargs = (fx.map_arg(part, value) for part in (node.args, node.kwargs))
        with torch.no_grad():
            return node.target(*args, **kwargs)

    # --------------------------------------------------------------------------- what rules call

    def emit(self, target: Any, args: Sequence, kwargs: dict | None = None, size: Sequence | None = None) -> fx.Node:
        """Write a call of the current node's, or of a step towards it, whose size is then given."""
        args, kwargs = (self._as_nodes(part) for part in (tuple(args), kwargs or {}))
        node = self.graph.call_function(target, args, kwargs)
        return self._note(node, size)

    def layer(self, module: nn.Module, source: fx.Node, name: str, size: Sequence | None = None) -> fx.Node:
        """Write a call of a module of its own."""
        name = free_name(self.root, name)
        parent = self.root
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name.rpartition(".")[2], module.eval().requires_grad_(False))
        return self._note(self.graph.call_module(name, (source,)), size)

    def attribute(self, tensor: Tensor, name: str | None = None) -> fx.Node:
        """A constant tensor as a node."""
        name = free_name(self.root, (name or f"{self.current.name}_constant").replace(".", "_"))
        self.root.register_buffer(name, tensor.detach())
        node = self.graph.get_attr(name)
        node.meta["size"], node.meta["origin"] = tuple(tensor.shape), self.origins.get(id(tensor))
        return node

    def reshape(self, source: fx.Node, size: Sequence) -> fx.Node | None:
        """Another shape of the same values in the same order; None where two sizes depend on the batch."""
        if tuple(size) == size_of(source):
            return source
        target = [-1 if is_free(side) else side for side in size]
        if target.count(-1) > 1:
            return None
        if _is_call(source, torch.ops.aten.reshape.default):  # two in a row are one
            return self.reshape(source.args[0], size)
        return self.emit(torch.ops.aten.reshape.default, (source, target), size=size)

    def free(self) -> int | torch.SymInt:
        """The batch, as the sizes of values have it."""
        return size_of(next(iter(self.graph.nodes)))[0]

    def image_count(self) -> fx.Node:
        """The batch, as a node."""
        return self.graph.call_function(torch.ops.aten.sym_size.int, (next(iter(self.graph.nodes)), 0))

    def slice(self, source: fx.Node, axis: int, start: int, stop: int, step: int = 1) -> fx.Node:
        size = list(size_of(source))
        if (start, stop, step) == (0, size[axis], 1):
            return source
        if step == 1 and _is_call(source, torch.ops.aten.cat.default) and source.args[1] == axis:
            parts = self._parts_between(source, axis, start, stop)
            if parts:
                size[axis] = stop - start
                return parts[0] if len(parts) == 1 else self.emit(torch.ops.aten.cat.default, (parts, axis), size=size)
        size[axis] = len(range(start, stop, step))
        return self.emit(torch.ops.aten.slice.Tensor, (source, axis, start, stop, step), size=size)

    def _parts_between(self, concat: fx.Node, axis: int, start: int, stop: int) -> list[fx.Node]:
        """The whole parts of a concat that a slice of it consists of; none where it cuts one."""
        parts, place = [], 0
        for part in concat.args[0]:
            side = size_of(part)[axis]
            if is_free(side):
                return []
            if start < place + side and place < stop:
                if place < start or place + side > stop:
                    return []
                parts.append(part)
            place += side
        return parts

    def sizes(self, value: Tensor) -> Size:
        """Of a value of the exported program. Of one batch, the first side that is a multiple of it is free."""
        sides = list(value.shape)
        if self.batch:
            free = (i for i, side in enumerate(sides) if isinstance(side, int) and side and side % self.batch == 0)
            if (axis := next(free, None)) is not None:
                sides[axis] = BatchSize(sides[axis])
        return tuple(sides)

    def size(self) -> Size:
        """Of the value that is being written."""
        return self.sizes(self.current.meta["val"])

    def path(self) -> str:
        """The user's module in which the current node stands, '' for the network's own forward."""
        stack = self.current.meta.get("nn_module_stack") or {}
        path = re.sub(r"[^\w.]+", "_", list(stack.values())[-1][0]) if stack else ""  # of layers[:-1], say
        return f"{path}.".removeprefix(self.wrapper).removesuffix(".")

    def layer_name(self, weight: Tensor) -> str:
        """What users call a layer: where its weight is, transposed or not, or the module that runs it."""
        origin = self.origins.get(id(weight))
        while origin is not None and origin.op == "call_function" and origin.target in _TRANSPOSES:
            origin = origin.args[0]
        fqn = self.fqns.get(id(self.values[origin])) if origin is not None else None
        if fqn is None:
            return self._place(self.path(), self.current.name)
        owner, _, own = fqn.rpartition(".")
        return self._place(owner, own.removesuffix("weight").removesuffix("_") or self.current.name) if owner else fqn

    def _place(self, owner: str, own: str) -> str:
        """A user's module for the layer in it; of one that holds layers besides, such as attention, a name in it."""
        inside = [fqn.removeprefix(f"{owner}.") for fqn in self.fqns.values() if fqn.startswith(f"{owner}.")]
        alone = not any("." in name and not name.startswith("parametrizations.") for name in inside)
        return owner if owner and alone else f"{owner}.{own}".removeprefix(".")

    def _note(self, node: fx.Node, size: Sequence | None) -> fx.Node:
        value = self.current.meta.get("val")
        if size is not None:
            node.meta["size"] = tuple(size)
        elif isinstance(value, Tensor):
            node.meta["size"] = self.sizes(value)
        node.meta["path"], node.meta["exported"] = self.path(), self.current
        return node

    def _as_nodes(self, value: Any) -> Any:
        """Arguments with constant tensors as nodes."""
        if isinstance(value, Tensor):
            if self.batch and value.dim() and len(value) == self.batch and bool((value == value[:1]).all()):
                return self._for_every_image(value[:1])
            return self.attribute(value, self.fqns.get(id(value)))
        if isinstance(value, tuple | list):
            return type(value)(map(self._as_nodes, value))
        if isinstance(value, dict):
            return {key: self._as_nodes(entry) for key, entry in value.items()}
        return value


def _check_drawn(node: fx.Node) -> None:
    """Refuse a network that draws random numbers: no two runs of it agree."""
    if not _draws(node):
        return
    name = node.target._schema.name.partition("::")[2]
    stack = node.meta.get("nn_module_stack") or {}
    where = list(stack.values())[-1][0].partition(".")[2] if stack else ""
    raise UserError(
        f"the network draws random numbers in evaluation too ({name}{f' in {where!r}' if where else ''}), so that no two "
        "runs of it agree; do that while self.training alone, as with F.dropout(x, p, self.training)"
    )


def _draws(node: fx.Node) -> bool:
    """Whether an operator draws random numbers; attention and recurrent layers do for their dropout alone."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    for i, argument in enumerate(node.target._schema.arguments):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        if argument.name in ("dropout_p", "dropout", "p") and value == 0:
            return False
        if argument.name in ("train", "training") and value is False:
            return False
    return True


def _is_call(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def _lifted(program: ExportedProgram) -> dict[str, tuple[str, Tensor]]:
    """Parameters, buffers and constants by the name of their placeholder: where they are in the network, and the tensor."""
    found = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in program.state_dict:
            found[spec.arg.name] = spec.target, program.state_dict[spec.target].detach()
        elif spec.kind is not InputKind.USER_INPUT and spec.target in program.constants:
            found[spec.arg.name] = spec.target, program.constants[spec.target]
    return found
