"""Hashes of what was measured: the same for the same content, others for any other."""

import copy

import torch
from networks import SPEC, chain, made, settle

from utils.core.hashing import content_hash, measured_once

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


def test_what_was_measured_of_a_like_network_and_images_is_measured_once():
    calls = []
    measure = measured_once(lambda network, images: calls.append(1) or network(images).sum())
    network, images = made(chain, settle)[1], torch.ones(SPEC.shape(1))
    first = measure(network, images)
    assert measure(copy.deepcopy(network), images.clone()) is first and len(calls) == 1
    measure(network, 2 * images)
    changed = copy.deepcopy(network)
    with torch.no_grad():
        next(changed.parameters()).mul_(2)
    assert float(measure(changed, images)) != float(first)
    rewired = copy.deepcopy(network)
    output = rewired.graph.output_node()
    output.args = (output.args[0].args[0],)  # which changes no tensor
    rewired.recompile()
    measure(rewired, images)
    assert len(calls) == 4
