"""The first and last layers: which they are, and that their weights and inputs have the bits of their own."""

import pytest
import torch
from networks import SPEC, Branches, Residual, chain, conv_bn, made, settle
from torch import nn

from dfq import Recipe, quantize_data_free
from utils.graph.nodes import module_of, weighted_nodes
from utils.passes.bit_widths import bits_of_activations, bits_of_weights, first_and_last_layers
from utils.quantization.placement import quantizer_before
from utils.quantization.quantizer import Quantizer


class Heads(nn.Module):
    """A trunk with two outputs, one of them behind a concat."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = conv_bn(3, 8), conv_bn(8, 6), conv_bn(8, 4)
        self.near, self.far = nn.Conv2d(8, 2, 1), nn.Conv2d(10, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.near(x), self.far(torch.cat([self.left(x), self.right(x)], 1))


ENDS = {
    chain: {"0.0", "3.linear"},
    Residual: {"stem.0", "head.linear"},
    Branches: {"left.0", "right.0", "head.linear"},
    Heads: {"stem.0", "near", "far"},
}


@pytest.mark.parametrize("network", ENDS)
def test_the_layers_at_either_end(network):
    assert {node.target for node in first_and_last_layers(made(network, settle)[1])} == ENDS[network]


@pytest.mark.parametrize("network", ENDS)
def test_their_weights_and_what_they_read_have_those_bits_and_no_other_layers_have(network):
    model, graph = made(network, settle)
    recipe = Recipe(quantize=True, bits_weight=3, bits_activation=4, bits_first_last=8)
    simulated = quantize_data_free(model, SPEC, recipe, captured=graph).simulated
    shared = {"left.0", "right.0"} if network is Heads else set()  # they read what `near` reads
    for node in weighted_nodes(simulated):
        layer, source = module_of(simulated, node), quantizer_before(simulated, node.args[0])
        ends = node.target in ENDS[network]
        assert layer.weight_qparams.bits == (8 if ends else 3)
        if node.target == "far":  # its concat's parts
            assert all(module_of(simulated, part).qparams.bits == 8 for part in node.args[0].args[0])
        elif source is not None:
            assert source.qparams.bits == (8 if ends or node.target in shared else 4)


@pytest.mark.parametrize("per_channel", [False, True])
def test_with_a_scale_for_every_channel_8_bits_have_no_zero_points(per_channel):
    """Engines are slow with those; of fewer bits files count from zero, and of one zero point kernels know."""
    model, graph = made(Residual, settle)
    recipe = Recipe(quantize=True, bits_weight=4, bits_first_last=8, per_channel=per_channel, asymmetric=True)
    simulated = quantize_data_free(model, SPEC, recipe, captured=graph).simulated
    for node in weighted_nodes(simulated):
        qparams = module_of(simulated, node).weight_qparams
        ends = node.target in ENDS[Residual]
        assert bool((qparams.zero_point != 0).any()) == (not (per_channel and ends))


class Reread(nn.Module):
    """Sums of two layers' outputs, of which one layer reads the first as it is; an average reads the last."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = conv_bn(3, 8), conv_bn(8, 8, 1), conv_bn(8, 8, 1)
        self.middle, self.head = conv_bn(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        left = self.left(x)
        total = left + self.right(x)
        total = total + self.middle(left)
        return self.head(total.mean((2, 3)))


@pytest.mark.parametrize("bits", [4, 8, 12])
def test_few_bits_are_for_what_layers_read(bits):
    model, graph = made(Reread, settle)
    simulated = quantize_data_free(model, SPEC, Recipe(quantize=True, bits_activation=bits), captured=graph).simulated
    found = {
        node.name: module_of(simulated, node).qparams.bits
        for node in simulated.graph.nodes
        if isinstance(module_of(simulated, node), Quantizer)
    }
    read = ("images_quantizer", "stem_2", "left_2", "mean_dim_quantizer")
    others = ("right_2", "middle_2", "add_tensor_quantizer", "add_tensor_1_quantizer")
    assert found == dict.fromkeys(read, bits) | dict.fromkeys(others, max(bits, 8))


class Joined(nn.Module):
    """A layer reads a concat, one of whose parts a sum reads too; a second concat's parts are read by nothing else."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = conv_bn(3, 8), conv_bn(8, 8, 1), conv_bn(8, 8, 1)
        self.middle, self.near, self.far = conv_bn(16, 8, 1), conv_bn(8, 8, 1), conv_bn(8, 8, 1)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        left, right = self.left(x), self.right(x)
        x = self.middle(torch.cat([left, right], 1)) + left
        return self.head(torch.cat([self.near(x), self.far(x)], 1))


def bits_of(network, **settings):
    """By name the bits of all quantizers."""
    model, graph = made(network, settle)
    recipe = Recipe(quantize=True, bits_activation=4, **settings)
    simulated = quantize_data_free(model, SPEC, recipe, captured=graph).simulated
    modules = {node.name: module_of(simulated, node) for node in simulated.graph.nodes}
    return {name: module.qparams.bits for name, module in modules.items() if isinstance(module, Quantizer)}


def test_of_a_concat_either_its_parts_have_few_bits_or_it_alone():
    found = bits_of(Joined)
    assert found["cat_default_quantizer"] == 4 and found["left_2"] == found["right_2"] == found["middle_2"] == 8
    assert found["near_2"] == found["far_2"] == 4 and "cat_default_1_quantizer" not in found


def test_what_a_layer_in_float_reads_has_no_few_bits():
    assert bits_of(Reread)["mean_dim_quantizer"] == 4
    assert bits_of(Reread, float_layers=("head",)).get("mean_dim_quantizer", 8) == 8


def test_without_the_setting_there_are_none():
    graph = made(chain, settle)[1]
    assert bits_of_weights(graph, Recipe()) == bits_of_activations(graph, Recipe()) == {}
