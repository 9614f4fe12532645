"""Hashes of what was measured: the same for the same content, others for any other."""

import torch

from utils.core.hashing import content_hash

VALUE = {"a": [torch.arange(6.0), (1, 2.5)], "b": None}
OTHERS = {
    "a number": {"a": [torch.arange(6.0), (1, 2.0)], "b": None},
    "a tensor's value": {"a": [torch.arange(6.0).clamp(max=4), (1, 2.5)], "b": None},
    "a tensor's shape": {"a": [torch.arange(6.0).view(2, 3), (1, 2.5)], "b": None},
    "a tensor's type": {"a": [torch.arange(6.0).view(torch.int32), (1, 2.5)], "b": None},
    "a name": {"c": [torch.arange(6.0), (1, 2.5)], "b": None},
    "where a list ends": {"a": [torch.arange(6.0), (1,), 2.5], "b": None},
}


def test_content_decides_and_not_identity_or_strides():
    strided = torch.stack([torch.arange(6.0), torch.zeros(6)], 1)[:, 0]
    assert content_hash(VALUE) == content_hash({"a": [strided, (1, 2.5)], "b": None})


def test_any_other_content_has_another_hash():
    hashes = {name: content_hash(other) for name, other in OTHERS.items()}
    assert content_hash(VALUE) not in hashes.values() and len(set(hashes.values())) == len(OTHERS)
