"""Layers that are kept in float: exact where the whole network is, and said."""

import pytest
import torch
from networks import SPEC, chain, made, settle

from dfq import Recipe, quantize_data_free
from utils.core.errors import UserError
from utils.graph.nodes import module_of, weighted_nodes
from utils.quantization.quantizer import Quantizer

LAYERS = [node.target for node in weighted_nodes(made(chain, settle)[1])]


def quantized(*names):
    model, graph = made(chain, settle)
    return model, quantize_data_free(
        model, SPEC, Recipe(quantize=True, equalize=True, float_layers=names), captured=graph
    )


def test_a_layer_in_float_has_its_own_weights_and_is_said():
    name = LAYERS[1]
    _, result = quantized(name)
    kept, rounded = result.simulated.get_submodule(name), result.simulated.get_submodule(LAYERS[0])
    assert kept.weight_qparams is None and torch.equal(kept.weight, result.float.get_submodule(name).weight)
    assert rounded.weight_qparams is not None
    assert "skipped 1: 1 kept in float, as asked for" in result.log.summary()


def test_with_all_layers_in_float_nothing_is_quantized_but_what_is_refused():
    with pytest.raises(UserError, match="no layer of the network can be quantized"):
        quantized(*LAYERS)


def test_between_two_layers_in_float_there_is_no_quantizer():
    _, result = quantized(*LAYERS[:2])
    graph = result.simulated
    second = next(node for node in weighted_nodes(graph) if node.target == LAYERS[1])
    assert not isinstance(module_of(graph, second.args[0]), Quantizer)
    third = next(node for node in weighted_nodes(graph) if node.target == LAYERS[2])
    assert isinstance(module_of(graph, third.args[0]), Quantizer)


def test_names_of_no_layer_are_refused():
    with pytest.raises(UserError, match=rf"--float_layers: the network has no layer '0.0x'; nearest are .*{LAYERS[0]}"):
        quantized("0.0x")


@pytest.mark.parametrize("name", LAYERS)
def test_the_engine_computes_it_in_float_too(name):
    from utils.backends.onnxruntime.export import build
    from utils.backends.onnxruntime.session import OnnxNetwork, find_kernels

    _, result = quantized(name)
    model = build(result, SPEC, {}, None)
    kernels = find_kernels(model, result.simulated)
    assert list(kernels.floating) == [name] and set(kernels.integer) == set(LAYERS) - {name}
    images = SPEC.probe(4)
    with torch.inference_mode():
        expected, found = result.simulated(images), OnnxNetwork(model.SerializeToString())(images)
    step = (expected.max() - expected.min()) / 255
    assert (expected - found).abs().max() < 2 * step
