"""Hashes by which networks are told apart."""

import hashlib

from torch import nn


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names and bytes of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
