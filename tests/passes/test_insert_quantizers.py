"""Quantizers stand where an integer engine writes."""

from networks import SPEC, Branches, Residual, made, modules_in, settle

from dfq import Recipe, quantize_data_free
from utils.graph.layers import Clip
from utils.quantization.quantizer import Quantizer


def quantized(network):
    model, graph = made(network, settle)
    return quantize_data_free(model, SPEC, Recipe(quantize=True), captured=graph)


def quantizers(result):
    return {name: module for name, module in result.simulated.named_modules() if isinstance(module, Quantizer)}


def test_quantizers_stand_where_an_integer_engine_writes():
    result = quantized(Residual)
    # input; stem; inner; outer, before the add; the sum behind its ReLU; pooling; not the last linear layer
    assert len(quantizers(result)) == 6
    assert modules_in(result.simulated, Clip) == []


def test_inputs_of_a_concat_share_their_parameters():
    result = quantized(Branches)
    modules = quantizers(result)
    left, right = (module for name, module in modules.items() if name.startswith(("left", "right")))
    assert (left.scale, left.zero_point) == (right.scale, right.zero_point)
    assert not any("cat" in name for name in modules)
