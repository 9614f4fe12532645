"""Hashes by which networks, and what was measured of them, are told apart."""

import hashlib
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor, fx, nn

T = TypeVar("T")


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names and bytes of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def content_hash(value: Any) -> str:
    """SHA-256 over a value's content: tensors, captured networks, what repr() tells whole, and mappings, lists and tuples of these."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(part, fx.GraphModule):
            add((part.state_dict(), f"{part}"))
        elif isinstance(part, Mapping | list | tuple):
            digest.update(f"{type(part).__name__} {len(part)} ".encode())
            for item in part.items() if isinstance(part, Mapping) else part:
                add(item)
        else:
            digest.update(f"{part!r} ".encode())

    add(value)
    return digest.hexdigest()


def measured_once(measure: Callable[[fx.GraphModule, Tensor], T]) -> Callable[[fx.GraphModule, Tensor], T]:
    """What is measured of a float network on images, once for all that are alike: recipes share much of what they look at.

    What it returns is not to be changed.
    """
    known: dict[str, T] = {}

    @wraps(measure)
    def once(network: fx.GraphModule, images: Tensor) -> T:
        key = content_hash((network, images))
        if key not in known:
            known[key] = measure(network, images)
        return known[key]

    return once
