"""Weight quantization, and room for biases in int32."""

import pytest
import torch
from networks import SPEC, Branches, chain, folded, made, relu_chain, settle
from torch import nn

from dfq import Recipe, quantize_data_free
from utils.calibration.moments import propagate
from utils.calibration.ranges import analytic_ranges
from utils.core.errors import UserError
from utils.graph.capture import capture
from utils.graph.layers import grouped_weight
from utils.graph.nodes import module_of, weighted_nodes
from utils.passes.insert_quantizers import insert_quantizers
from utils.passes.log import PassLog
from utils.passes.quantize_bias import quantize_biases
from utils.passes.quantize_weights import quantizable_layers, quantize_weights, weight_ranges
from utils.quantization.quantizer import Quantizer


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 12, 16])
def test_every_tensor_of_the_simulation_has_at_most_two_to_the_bits_values(bits):
    model, graph = made(Branches, settle)
    recipe = Recipe(quantize=True, bits_weight=bits, bits_activation=bits)
    result = quantize_data_free(model, SPEC, recipe, captured=graph)
    for node in weighted_nodes(result.simulated):
        assert len(module_of(result.simulated, node).weight.unique()) <= 2**bits
    seen = {}
    for name, module in result.simulated.named_modules():
        if isinstance(module, Quantizer):
            module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: len(out.unique())}))
    result.simulated(SPEC.probe(16))
    unread = "reader.2"  # by any layer: an average's, of 8 bits at least
    assert len(seen) == 5 and seen.pop(unread) <= 2 ** max(bits, 8)
    assert all(count <= 2**bits for count in seen.values())


def with_huge_bias():
    """A network with quantizers whose second layer has a bias of 1e9 times its weights in one channel."""
    traced, statistics = folded(made(relu_chain, settle)[1])
    layer = traced.get_submodule("2.0")
    grouped_weight(layer)[0, 0] *= 1e-9 / grouped_weight(layer)[0, 0].abs().max()
    layer.bias[0] = 5.0
    insert_quantizers(traced, analytic_ranges(propagate(traced, SPEC, statistics)), 8, PassLog())
    return traced


def test_a_bias_that_would_overflow_gets_room_before_the_weights_are_rounded():
    model, log = with_huge_bias(), PassLog()
    exact = grouped_weight(model.get_submodule("2.0")).clone()
    names = {node.target for node in weighted_nodes(model)}
    quantize_weights(model, names, 8, per_channel=True, symmetric=True, bits_bias=32, log=log)
    fitted = [entry.where for entry in log.entries if entry.action == "fitted biases to int32"]
    assert fitted == ["2.0"]
    layer = model.get_submodule("2.0")
    scale = layer.weight_qparams.scale
    torch.testing.assert_close(scale[1:], exact[0, 1:].abs().amax((1, 2)) / 127)
    torch.testing.assert_close(grouped_weight(layer)[0, 0], (exact[0, 0] / scale[0]).round() * scale[0])
    kept = {name: model.get_submodule(name).weight.clone() for name in names}
    quantize_biases(model, 32, log)
    assert layer.bias_qparams is not None and layer.bias[0] == pytest.approx(5.0, rel=1e-6)
    for name, weight in kept.items():  # nothing rounds weights behind the pass that rounded them
        torch.testing.assert_close(model.get_submodule(name).weight, weight, rtol=0, atol=0)


def test_biases_of_fewer_bits_need_no_room():
    model, log = with_huge_bias(), PassLog()
    names = {node.target for node in weighted_nodes(model)}
    quantize_weights(model, names, 8, per_channel=True, symmetric=True, bits_bias=16, log=log)
    assert set(log.counts()) == {"quantized weights"}


def test_a_layer_behind_something_unknown_is_skipped_and_said():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.last(torch.cumsum(self.conv(x), 2))

    traced, log = capture(Odd().eval(), SPEC), PassLog()
    known = analytic_ranges(propagate(traced, SPEC, {}))
    assert quantizable_layers(traced, known, log) == {"conv"}
    assert log.reasons("quantized weights")[0].startswith("1 nothing is known of its input")
    with pytest.raises(UserError, match="no layer of the network can be quantized"):
        quantizable_layers(traced, analytic_ranges({}), PassLog())


def test_weight_ranges_are_those_of_every_channel():
    traced = made(chain, settle)[1]
    weight = traced.get_submodule("1.0").weight.flatten(1)
    torch.testing.assert_close(weight_ranges(traced)["1.0"], torch.stack([weight.amin(1), weight.amax(1)], 1))
