"""Blocks: every layer once, parts that compute what the whole does, with and without quantizers."""

import copy

import pytest
import torch
from networks import SPEC, Branches, Residual, chain, conv_bn, made, settle
from test_bit_widths import Heads
from torch import nn

from dfq import Recipe, quantize_data_free
from utils.graph.nodes import outputs_of, weighted_nodes
from utils.passes.blocks import find_blocks, most_handed_on, parts_of, value_name


class Unet(nn.Module):
    """A skip past everything, into a concat, and a residual block inside."""

    def __init__(self):
        super().__init__()
        self.stem, self.down, self.inner = conv_bn(3, 6), conv_bn(6, 8, padding=1, stride=2), conv_bn(8, 8, padding=1)
        self.outer, self.last = conv_bn(8, 8, padding=1, activation=None), nn.Conv2d(14, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.down(x)
        y = torch.relu(y + self.outer(self.inner(y)))
        return self.last(torch.cat([x, nn.functional.interpolate(y, scale_factor=2)], 1))


class Batchwise(nn.Module):
    """A reshape that moves positions into the batch: no place to end a block."""

    def __init__(self):
        super().__init__()
        self.before, self.inside, self.behind = nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.before(x)
        n, _, height, width = x.shape
        y = self.inside(x.permute(0, 2, 3, 1).reshape(n * height, width, 4))
        return self.behind(y.reshape(n, height, width, 4).permute(0, 3, 1, 2))


NETWORKS = [chain, Residual, Branches, Heads, Unet, Batchwise]


def run_parts(parts, x):
    values = {parts[0].inputs[0]: x}
    for part in parts:
        values |= dict(zip(part.outputs, part.graph(*(values[name] for name in part.inputs)), strict=True))
    return values


@pytest.mark.parametrize("most", [1, 2, 3, 4])
@pytest.mark.parametrize("network", NETWORKS)
def test_blocks_hold_every_layer_once_in_order_and_compute_what_the_network_does(network, most):
    graph = made(network, settle)[1]
    blocks = find_blocks(graph, most)
    assert [name for block in blocks for name in block] == [node.target for node in weighted_nodes(graph)]
    assert network is Batchwise or max(map(len, blocks)) <= most
    x = SPEC.probe(5)
    values = run_parts(parts_of(graph, blocks), x)
    results = graph.graph.output_node().args[0]
    results = results if isinstance(results, tuple | list) else [results]
    for node, expected in zip(results, outputs_of(graph(x)), strict=True):
        torch.testing.assert_close(values[node.name], expected, rtol=0, atol=0)


@pytest.mark.parametrize("network", [chain, Residual, Branches, Heads, Unet])
def test_parts_of_the_simulation_take_and_give_the_same_values(network):
    model, graph = made(network, settle)
    result = quantize_data_free(model, SPEC, Recipe(quantize=True), captured=graph)
    exact, simulated = result.float, copy.deepcopy(result.simulated)
    names = {node.name for node in exact.graph.nodes}
    for most in (1, 3):
        blocks = find_blocks(exact, most)
        of_exact, of_simulated = parts_of(exact, blocks, names), parts_of(simulated, blocks, names)
        for one, other in zip(of_exact, of_simulated, strict=True):
            assert set(one.inputs) == set(other.inputs)
            assert set(one.outputs) == set(other.outputs) - {"images"}  # which the first part rounds
        x = SPEC.probe(4)
        values = run_parts(of_simulated, x)
        results = simulated.graph.output_node().args[0]
        results = results if isinstance(results, tuple | list) else [results]
        for node, expected in zip(results, outputs_of(simulated(x)), strict=True):
            torch.testing.assert_close(values[value_name(simulated, node, names)], expected)


def test_blocks_end_between_residual_joins():
    assert find_blocks(made(Residual, settle)[1], 3) == [["stem.0", "inner.0", "outer.0"], ["head.linear"]]


def test_a_block_goes_on_where_a_tensor_mixes_images():
    assert find_blocks(made(Batchwise)[1], 1) == [["before", "inside"], ["behind"]]


def test_what_is_handed_on_at_most():
    graph = made(Unet, settle)[1]
    blocks = [[node.target] for node in weighted_nodes(graph)]
    assert most_handed_on(graph, blocks) == 14 * 22 * 22  # before the last layer, the concat
    # Behind `inner`: the skip of 6 maps of 22 x 22, what the join adds, and its own output, 8 maps of 11 x 11 each.
    assert most_handed_on(graph, [*blocks[:3], [name for block in blocks[3:] for name in block]]) == 2904 + 2 * 968
