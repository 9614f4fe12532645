"""Weight clipping."""

import torch
from networks import chain, made, settle

from utils.graph.nodes import module_of, weighted_nodes
from utils.passes.clip_weights import clip_weights
from utils.passes.log import PassLog


def test_clipping_bounds_the_weights_and_says_how_many():
    model, log = made(chain, settle)[1], PassLog()
    before = {node.target: module_of(model, node).weight.clone() for node in weighted_nodes(model)}
    clip_weights(model, 0.2, log)
    for name, weight in before.items():
        torch.testing.assert_close(model.get_submodule(name).weight, weight.clamp(-0.2, 0.2), rtol=0, atol=0)
    said = {entry.where: entry.detail for entry in log.entries}
    assert said == {
        name: f"{int((weight.abs() > 0.2).sum())} of {weight.numel()}"
        for name, weight in before.items()
        if (weight.abs() > 0.2).any()
    }
