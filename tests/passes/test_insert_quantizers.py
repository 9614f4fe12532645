"""Quantizers stand where an integer engine writes."""

import pytest
import torch
from networks import SPEC, Branches, Head, Residual, chain, conv_bn, made, modules_in, settle
from torch import nn

from dfq import Recipe, quantize_data_free
from utils.graph.layers import Clip
from utils.graph.nodes import module_of, weighted_nodes
from utils.quantization.quantizer import Quantizer


class TwoWays(nn.Module):
    """A block whose shortcut is a layer too."""

    def __init__(self):
        super().__init__()
        self.left, self.right = conv_bn(3, 8, activation=None), conv_bn(3, 8, activation=None)
        self.head = Head(8)

    def forward(self, x):
        return self.head(torch.relu(self.left(x) + self.right(x)))


def quantized(network, **settings):
    model, graph = made(network, settle)
    return quantize_data_free(model, SPEC, Recipe(quantize=True, **settings), captured=graph)


def quantizers(result):
    return {name: module for name, module in result.simulated.named_modules() if isinstance(module, Quantizer)}


def test_quantizers_stand_where_an_integer_engine_writes():
    result = quantized(Residual)
    # input; stem; inner; outer, before the add; the sum behind its ReLU; pooling; not the last linear layer
    assert len(quantizers(result)) == 6
    assert modules_in(result.simulated, Clip) == []


@pytest.mark.parametrize("network", [chain, Residual, Branches])
def test_activations_for_tensorrt_are_symmetric_and_keep_their_clips(network):
    result = quantized(network, target="tensorrt")
    for module in quantizers(result).values():
        assert (module.zero_point, module.qparams.quant_min, module.qparams.quant_max) == (0, -128, 127)
    rectified = [module for module in quantizers(result).values() if module.rectifies]
    assert rectified and all(module.step_min == 0 for module in rectified)
    assert modules_in(result.simulated, Clip) == []
    ours = {name: module for name, module in quantizers(quantized(network)).items() if module.zero_point == 0}
    for name, module in ours.items():  # the same range in half of the steps
        assert quantizers(result)[name].scale == pytest.approx(module.scale * 255 / 127)


def test_a_layer_that_openvino_adds_in_its_own_kernel_is_not_quantized():
    result, ours = quantized(Residual, target="openvino"), quantized(Residual)
    assert quantizers(ours).keys() - quantizers(result).keys() == {"outer_0_quantizer"}


def test_of_two_layers_that_feed_a_sum_openvino_adds_the_later_in_float():
    result, ours = quantized(TwoWays, target="openvino"), quantized(TwoWays)
    assert quantizers(ours).keys() - quantizers(result).keys() == {"right_0_quantizer"}


def test_biases_stay_in_float_where_the_engine_has_no_others():
    result = quantized(Residual, target="tensorrt")
    layers = [module_of(result.simulated, node) for node in weighted_nodes(result.simulated)]
    assert all(layer.bias_qparams is None and layer.weight_qparams.per_channel for layer in layers)
    assert any("biases stay in float" in note for note in result.log.notes)


def test_what_reads_the_input_has_weights_of_7_bits_for_openvino():
    result = quantized(Residual, target="openvino")
    bits = {
        node.target: module_of(result.simulated, node).weight_qparams.bits for node in weighted_nodes(result.simulated)
    }
    assert bits == {"stem.0": 7, "inner.0": 8, "outer.0": 8, "head.linear": 8}


def test_inputs_of_a_concat_share_their_parameters():
    result = quantized(Branches)
    modules = quantizers(result)
    left, right = (module for name, module in modules.items() if name.startswith(("left", "right")))
    assert (left.scale, left.zero_point) == (right.scale, right.zero_point)
    assert not any("cat" in name for name in modules)


class FloatConcat(nn.Module):
    """Powers of a layer's output side by side, which a sum reads that engines compute in float; and an integer concat."""

    def __init__(self):
        super().__init__()
        self.stem, self.other, self.head = conv_bn(3, 6), conv_bn(3, 6), nn.Sequential(conv_bn(12, 8, 1), Head(8))

    def forward(self, x):
        a, b = self.stem(x), self.other(x)
        powers = torch.cat([a.unsqueeze(1), (a * a).unsqueeze(1), (a**3).unsqueeze(1)], 1)
        return self.head(torch.cat([powers.softmax(1)[:, 2], b], 1))


def test_a_concat_of_what_is_computed_in_float_for_a_float_function_is_not_quantized():
    result = quantized(FloatConcat)
    concats = [node for node in result.float.graph.nodes if node.target is torch.ops.aten.cat.default]
    behind = [f"{node.name}_quantizer" in quantizers(result) for node in concats]
    assert behind == [False, True]


class SoftPooling(nn.Module):
    """Averages weighted by exponentials, over their own average: SoftPool (Stergiou et al., ICCV 2021)."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = conv_bn(3, 6, activation=None), nn.Sequential(conv_bn(6, 8), Head(8))

    def forward(self, x):
        x = 4 * self.stem(x)
        weight = torch.exp(x).sum(1, keepdim=True)
        total = 4 * nn.functional.avg_pool2d(weight, 2)
        return self.head(4 * nn.functional.avg_pool2d(x * weight, 2) / total)


def test_what_is_divided_by_is_not_rounded_to_0():
    model, graph = made(SoftPooling, settle)
    images = SPEC.probe(4)
    recipe = Recipe(quantize=True, distill_range=True)
    result = quantize_data_free(model, SPEC, recipe, images=images, captured=graph, real=True)
    assert bool(result.simulated(images).isfinite().all())
    assert result.fidelity.output > 10
