"""A network as one graph: captured once by torch.export, functional, in canonical form.

After capture() every convolution, linear layer and BatchNorm is a module called once, under the user's own name; every
elementwise function of one tensor is one module (Clip, ChannelAffine, Elementwise); everything else is a call of an ATen
operator that utils/graph/ops.py describes. Nothing is written in place, and the batch is free.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils._pytree import tree_leaves

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.networks import Scored, plain
from utils.graph.activations import find_activations, is_elementwise
from utils.graph.constants import KnownConstants
from utils.graph.functional import functionalize, inline_contexts
from utils.graph.nodes import first_line, propagate_shapes, tidy
from utils.graph.ops import OPERATORS
from utils.graph.rules import RULES
from utils.graph.translate import translate


def capture(model: nn.Module, spec: InputSpec) -> fx.GraphModule:
    """A copy of the network as a graph in canonical form; the network itself is left as it is. Of a captured one, a copy.

    The shapes of one image's activations are at every node, as nodes.shape() gives them. meta["batch"] is the batch size
    that the network fixes, None where any will do; meta["outputs"] are the outputs' names, None where they have none.
    A network that fails on its input, or whose control flow depends on its values, is a UserError that says where.
    """
    if isinstance(model, fx.GraphModule) and "batch" in getattr(model, "meta", {}):
        return copy.deepcopy(model)  # it is one already
    model = _OfImages(plain(model))
    with _quiet(), torch.no_grad():
        captured = _captured(model, spec)
    return captured


BATCH = 31  # for networks that make a number of their batch; no usual size of anything else


def _captured(model: _OfImages, spec: InputSpec) -> fx.GraphModule:
    """With a free batch where there is a way; else for one image at a time."""
    try:
        program = _export(model, spec.probe(2), Dim.AUTO)
        images = next(node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
        batch = images.meta["val"].shape[0]
        if isinstance(batch, torch.SymInt) and batch.node.maybe_as_int() is None:
            if _answers_all_at_once(program):
                return _as_graph(model, _export(model, spec.probe(1), None), spec, 1)
            return _as_graph(model, program, spec, None)
        free = None
    except Exception as error:
        _check_forward(model, spec.probe(2))
        free = error
    with contextlib.suppress(Exception):  # len(x) and int(x.shape[0]) are numbers to torch.export: free them afterwards
        freed = _as_graph(model, _export(model, spec.probe(BATCH), None), spec, None, BATCH)
        if all(_equal(model, freed, spec.probe(batch, seed=batch)) for batch in (1, 2, 3)):
            return freed
    try:
        return _as_graph(model, _export(model, spec.probe(1), None), spec, 1)
    except UserError:
        raise
    except Exception as error:
        raise _refused(free or error) from None


def _answers_all_at_once(program: ExportedProgram) -> bool:
    """Whether outputs are as large for any number of images, which x.reshape(1, C, -1) takes for one."""
    values = [node.meta.get("val") for node in program.graph.output_node().args[0] if isinstance(node, fx.Node)]
    shapes = [value.shape for value in values if isinstance(value, Tensor)]
    return bool(shapes) and not any(isinstance(size, torch.SymInt) for shape in shapes for size in shape)


def _equal(model: nn.Module, captured: fx.GraphModule, images: Tensor) -> bool:
    pairs = zip(tree_leaves(model(images)), tree_leaves(captured(images)), strict=True)
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max())) for a, b in pairs
    )


def _as_graph(
    model: _OfImages, program: ExportedProgram, spec: InputSpec, batch: int | None, exported_for: int | None = None
) -> fx.GraphModule:
    """An exported program as a graph in canonical form. batch: that it keeps; exported_for: that it is freed of."""
    inline_contexts(program)
    if any(_needs_decomposition(node) for node in program.graph.nodes):
        program = program.run_decompositions({})
    names = model.network.names if isinstance(model.network, Scored) else None
    captured = translate(functionalize(program), RULES, "network." * (2 if names else 1), exported_for)
    find_activations(captured)
    captured.meta = {"batch": batch, "outputs": names}
    for node in captured.graph.nodes:
        for key in ("exported", "origin", "val"):
            node.meta.pop(key, None)
    return propagate_shapes(tidy(captured), spec, batch or 1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.export prints, logs and notes of its own parts: an error is told in a line of ours."""
    disabled, untraced = logging.root.manager.disable, fx.config.do_not_emit_stack_traces
    logging.disable(logging.CRITICAL)
    fx.config.do_not_emit_stack_traces = True  # of every operation, which take time and are not read
    nowhere = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        fx.config.do_not_emit_stack_traces = untraced
        logging.disable(disabled)


class _OfImages(nn.Module):
    """The network with images as its only input, whatever else its forward takes."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.tensors: dict[str, Tensor] | None = (
            None  # parameters and buffers with values, while torch.export takes theirs
        )

    def forward(self, images: Tensor) -> Any:
        with KnownConstants(self.network, self.tensors) if self.tensors is not None else contextlib.nullcontext():
            return self.network(images)


def _export(model: _OfImages, images: Tensor, batch: Any) -> ExportedProgram:
    shapes = ({0: batch},) if batch is not None else None
    named = (*model.network.named_parameters(), *model.network.named_buffers())
    model.tensors = {name: tensor.detach() for name, tensor in named}
    try:
        with _use_lazy_graph_module(True):  # what torch compiles anew after each of its own passes is never run
            return torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
    finally:
        model.tensors = None


def _check_forward(model: nn.Module, images: Tensor) -> None:
    """Refuse a network that fails on images, in its own words."""
    try:
        with torch.no_grad():
            model(images)
    except Exception as error:  # the network's own code runs here
        try:
            with torch.no_grad():
                model(images[:1])
        except Exception:
            raise UserError(
                f"the network fails on images of shape {tuple(images.shape)}: {type(error).__name__}: {first_line(error)} (at {place(error)})"
            ) from error


def _refused(error: Exception) -> UserError:
    text = re.sub(r" \((unhinted|Size-like)[^)]*\)+\.?", "", first_line(error)).strip()
    if re.search(r"data-dependent|GuardOnData|\.item\(\)|unbacked", str(error), re.IGNORECASE):
        return UserError(
            f"the network's control flow depends on its values (at {place(error)}): {text[:160]}; "
            "write that choice with torch.where, or take it out of the network"
        )
    return UserError(f"torch.export cannot capture the network: {text[:240]} (at {place(error)})")


def place(error: BaseException) -> str:
    """The innermost line of the network's own code, past torch's."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in f.filename and "/utils/graph/" not in f.filename
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}, {frames[-1].name}" if frames else "its forward"


def _needs_decomposition(node: fx.Node) -> bool:
    """Whether an operator is made of others, and has neither a row nor a rule of its own."""
    if not isinstance(node.target, torch._ops.OpOverload) or is_elementwise(node):
        return False
    if node.target in OPERATORS:
        return False
    name = node.target._schema.name.partition("::")[2]
    composite = node.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return composite and name.removesuffix("_") not in RULES and name not in _KEPT


# Composite operators without a row in the table that torch.onnx writes as they are.
_KEPT = {"rms_norm", "sym_size", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"}
_KEPT |= {"_upsample_nearest_exact2d", "_upsample_bilinear2d_aa"}
