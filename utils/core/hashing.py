"""Hashes by which networks, and what was measured of them, are told apart."""

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names and bytes of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def content_hash(value: Any) -> str:
    """SHA-256 over a value's content: tensors, what repr() tells whole, and mappings, lists and tuples of these."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(part, Mapping | list | tuple):
            digest.update(f"{type(part).__name__} {len(part)} ".encode())
            for item in part.items() if isinstance(part, Mapping) else part:
                add(item)
        else:
            digest.update(f"{part!r} ".encode())

    add(value)
    return digest.hexdigest()
