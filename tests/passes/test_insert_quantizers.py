"""Quantizers stand where an integer engine writes."""

from networks import SPEC, Branches, Residual, settle
from torch import nn

from dfq import Recipe, quantize_data_free
from utils.quantization.quantizer import Quantizer


def quantizers(result):
    return {name: module for name, module in result.simulated.named_modules() if isinstance(module, Quantizer)}


def test_quantizers_stand_where_an_integer_engine_writes():
    result = quantize_data_free(settle(Residual()), SPEC, Recipe(quantize=True))
    # input; stem; inner; outer, before the add; the sum behind its ReLU; pooling; not the last linear layer
    assert len(quantizers(result)) == 6
    assert not any(isinstance(module, nn.ReLU) for module in result.simulated.modules())


def test_inputs_of_a_concat_share_their_parameters():
    result = quantize_data_free(settle(Branches()), SPEC, Recipe(quantize=True))
    modules = quantizers(result)
    left, right = (module for name, module in modules.items() if name.startswith(("left", "right")))
    assert (left.scale, left.zero_point) == (right.scale, right.zero_point)
    assert not any("cat" in name for name in modules)
