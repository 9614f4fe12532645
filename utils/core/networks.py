"""Networks as people have them: without what wraps them, in float32, with the output that is scored first."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from utils.core.errors import UserError, message_of
from utils.core.input_spec import InputSpec

FIXED = (2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 64)  # batches that a network's code may fix
# What authors call the output that is meant, where a network has several of its shape.
_NAMES = ("logits", "out", "output", "outputs", "pred", "preds", "prediction", "predictions", "scores", "cls", "y")


def plain(model: nn.Module) -> nn.Module:
    """A copy of the network on the CPU, in float32 and evaluation mode, without what wraps it for training or speed.

    A scripted network, or one that cannot be copied, is a UserError.
    """
    model = _unwrapped(model)
    scripted = next((name for name, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)), None)
    if scripted is not None:
        what = f"{scripted!r} in the network" if scripted else "the network"
        raise UserError(f"{what} is a scripted or traced TorchScript module; pass the nn.Module that it was made from")
    try:
        memo = _computed(model)
        copied = copy.deepcopy(model, memo)
        _bind_functions(copied, memo)
    except Exception as error:  # whatever the network's own parts raise
        raise UserError(f"the network cannot be copied: {message_of(error, type(error).__name__)}") from error
    for module in list(copied.modules()):
        module.training = False
        for name, part in module.named_children():
            module._modules[name] = _unwrapped(part)
    return copied.float().cpu().requires_grad_(False)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without DataParallel and torch.compile."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def _computed(model: nn.Module) -> dict[int, Tensor]:
    """Copies of the tensors that a network has computed and keeps, as pruning and weight_norm do; by identity, for deepcopy."""
    kept = (value for module in model.modules() for value in vars(module).values())
    return {id(value): value.detach().clone() for value in kept if isinstance(value, Tensor) and not value.is_leaf}


def _bind_functions(copied: nn.Module, memo: dict[int, Any]) -> None:
    """Let hooks, and functions that a network keeps, act on the copy: deepcopy leaves functions with what they enclose."""
    for module in copied.modules():
        for own in (vars(module), module._forward_hooks, module._forward_pre_hooks):
            for key, value in own.items():
                if isinstance(value, FunctionType) and value.__closure__:
                    own[key] = _bound(value, memo)


def _bound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """The function with copies of what it encloses, the same as memo has them."""
    cells = tuple(CellType(copy.deepcopy(cell.cell_contents, memo)) for cell in function.__closure__)
    bound = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    bound.__kwdefaults__ = function.__kwdefaults__
    return bound


def to_fast_format(model: nn.Module, device: torch.device) -> nn.Module:
    """The network on its device, its parameters in the memory format that 2d convolutions are fastest in."""
    if any(tensor.dim() == 5 for tensor in (*model.parameters(), *model.buffers())):  # of 3d ones, which have another
        return model.to(device)
    return model.to(device=device, memory_format=torch.channels_last)


def other_type(model: nn.Module) -> str | None:
    """The data type of the network's parameters where it is not float32."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return next((str(kind).removeprefix("torch.") for kind in kinds if kind != torch.float32), None)


class Scored(nn.Module):
    """A network that hands out its tensors as one, or as a tuple, the scored one first. names: of the outputs, in that order.

    flatten: hand [N, C, 1, 1] out as [N, C], and what lost its batch of one image too.
    """

    def __init__(self, network: nn.Module, names: tuple[str, ...], flatten: bool):
        super().__init__()
        self.network, self.names, self.flatten = network, names, flatten

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = dict(named_tensors(self.network(images)))
        first, *others = (outputs[name] for name in self.names)
        if self.flatten:
            first = first.reshape(images.shape[0], -1)  # len() would fix an exported batch
        return (first, *others) if others else first


class _Found(Exception):
    """Ends a run at its first convolution, with what it is."""


def input_channels(model: nn.Module, size: tuple[int, int], usual: int = 3) -> int:
    """How many channels the network's images have: the usual number, or what its first convolution to run needs instead.

    model: evaluating. size: height and width of an image. What runs before that convolution may gather pixels into channels.
    """

    def stop(layer: nn.Module, inputs: tuple) -> None:
        raise _Found(inputs[0].shape[1 - layer.weight.dim()], layer.in_channels)

    model = _unwrapped(model)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    hooks = [layer.register_forward_pre_hook(stop) for layer in layers]
    try:
        with torch.inference_mode():
            model(torch.zeros(1, usual, *size))
    except _Found as found:
        given, wanted = found.args
        return wanted if usual * wanted % given else usual * wanted // given
    except Exception:  # what comes before takes other images, and the first layer of all may tell
        return layers[0].in_channels if layers else usual
    finally:
        for hook in hooks:
            hook.remove()
    return usual


@contextmanager
def failing_in_a_line(images: Tensor) -> Iterator[None]:
    """Whatever a user's network raises on images, as a UserError."""
    try:
        yield
    except Exception as error:  # the user's network may raise anything
        raise UserError(
            f"the network fails on images of shape {tuple(images.shape)}: {type(error).__name__}: {message_of(error)}; check --image_size"
        ) from error


def scored(model: nn.Module, spec: InputSpec, dims: int) -> nn.Module:
    """The network as it is where it returns one tensor of that many dimensions; else wrapped so that it comes first.

    dims: 2 for logits [N, C], for which [N, C, 1, 1] will do, or 4 for maps [N, C, H, W]. A network that fails on an
    image of its input, or returns nothing of that kind, is a UserError; which of several outputs is scored is said.
    """
    images = spec.probe(2)
    with torch.inference_mode():
        alone = _alone(model, spec)
        result = _several(model, images, alone)
    if isinstance(result, Tensor) and result.dim() == dims and getattr(alone, "ndim", None) == dims:
        _say_smaller(result, spec)
        return model
    outputs = dict(named_tensors(result))
    fitting = [name for name, value in outputs.items() if _fits(value, dims)]
    if not fitting:
        found = described(result)
        wanted = "logits [N, classes]" if dims == 2 else "maps of logits [N, classes, H, W]"
        raise UserError(
            f"the network returns {found}, and nothing to score; it must return {wanted}, alone or among others"
        )
    known = [name for name in fitting if name.rpartition(".")[2].lower() in _NAMES]
    first = (known or fitting)[0]
    names = (first, *(name for name in outputs if name != first))
    if len(names) > 1:
        print(f"outputs {', '.join(outputs)}: {first} is scored, all are exported")
    _say_smaller(outputs[first], spec)
    return Scored(model, names, flatten=dims == 2)


def _alone(model: nn.Module, spec: InputSpec) -> Any:
    """What the network returns for one image; that it takes another number of them alone is a UserError."""
    images = spec.probe(1)
    try:
        return model(images)
    except Exception:
        if (count := next((n for n in FIXED if _runs(model, spec.probe(n))), None)) is not None:
            raise UserError(
                f"the network takes {count} images at a time, and fails on one; write x.shape[0], or -1, where its code says {count}"
            ) from None
        with failing_in_a_line(images):
            raise


def _runs(model: nn.Module, images: Tensor) -> bool:
    try:
        model(images)
    except Exception:  # what it raises is of no interest
        return False
    return True


def _several(model: nn.Module, images: Tensor, alone: Any) -> Any:
    """What the network returns for several images; for a network that takes one at a time, what it returned for that."""
    try:
        return model(images)
    except Exception:  # what it raises is of no interest: it works on one image
        return alone


def _say_smaller(maps: Tensor, spec: InputSpec) -> None:
    """Say where maps [N, C, H, W] are smaller than the image."""
    size = tuple(maps.shape[2:])
    if maps.dim() == 4 and size not in (spec.size, (1, 1)) and all(map(int.__le__, size, spec.size)):
        (rows, columns), (height, width) = size, spec.size
        print(f"maps of {rows}x{columns} are upsampled to {height}x{width} bilinearly, outside the quantized network")


def _fits(value: Tensor, dims: int) -> bool:
    if not value.is_floating_point():
        return False
    return value.dim() == dims or (dims == 2 and value.dim() == 4 and value.shape[2:] == (1, 1))


def described(result: Any) -> str:
    """What a network returns, for a message: its tensors' names and shapes."""
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in named_tensors(result)) or type(result).__name__


def named_tensors(result: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of whatever a network returns, with their names: keys, fields or numbers, joined by points."""
    if isinstance(result, Tensor):
        yield name or "output", result
    elif isinstance(result, Mapping):
        for key, value in result.items():
            yield from named_tensors(value, f"{name}.{key}".strip("."))
    elif isinstance(result, tuple | list):
        keys = getattr(result, "_fields", [f"output_{i}" for i in range(len(result))])
        for key, value in zip(keys, result, strict=True):
            yield from named_tensors(value, f"{name}.{key}".strip("."))
    elif hasattr(result, "__dataclass_fields__"):
        yield from named_tensors(vars(result), name)
