"""Biases on the steps of the accumulator."""

import torch
from networks import SPEC, chain, made, settle

from dfq import Recipe, quantize_data_free
from utils.graph.nodes import module_of, weighted_nodes
from utils.passes.log import PassLog
from utils.passes.quantize_bias import quantize_biases
from utils.quantization.placement import quantizer_before


def simulate():
    model, graph = made(chain, settle)
    return quantize_data_free(model, SPEC, Recipe(quantize=True), captured=graph).simulated


def test_biases_lie_on_the_steps_of_the_accumulator():
    simulated = simulate()
    nodes = weighted_nodes(simulated)
    assert [node.target for node in nodes] == ["0.0", "1.0", "2.0", "3.linear"]
    for node in nodes:
        layer, source = module_of(simulated, node), quantizer_before(simulated, node.args[0])
        torch.testing.assert_close(layer.bias_qparams.scale, layer.weight_qparams.scale * source.scale, rtol=0, atol=0)
        steps = layer.bias.double() / layer.bias_qparams.scale.double()
        torch.testing.assert_close(steps, steps.round(), rtol=1e-6, atol=1e-3)


def test_a_bias_that_overflows_after_all_stays_in_float_and_is_said():
    simulated = simulate()
    layer, log = simulated.get_submodule("2.0"), PassLog()
    layer.bias_qparams, layer.bias[0] = None, 1e9
    quantize_biases(simulated, 32, log)
    assert layer.bias_qparams is None and layer.bias[0] == 1e9
    assert [(e.where, e.detail) for e in log.entries if e.skipped] == [("2.0", "its corrected bias overflows int32")]


def test_a_layer_with_float_weights_keeps_its_bias():
    simulated = simulate()
    layer, log = simulated.get_submodule("2.0"), PassLog()
    layer.weight_qparams = layer.bias_qparams = None
    quantize_biases(simulated, 32, log)
    assert layer.bias_qparams is None and "2.0" not in [entry.where for entry in log.entries]
