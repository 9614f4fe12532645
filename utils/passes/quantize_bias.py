"""Bias quantization: to the steps of an integer engine's accumulator; what would overflow them stays in float, and is said."""

from torch import fx

from utils.graph.nodes import module_of, weighted_nodes
from utils.passes.log import PassLog
from utils.quantization.placement import quantizer_before
from utils.quantization.qparams import choose_bias_qparams, overflows, round_bias

ACTION = "quantized biases"


def quantize_biases(model: fx.GraphModule, bits: int | None, log: PassLog) -> None:
    """Round the biases of layers with quantized weights and input; at fewer than 32 bits over their own range.

    bits: None where the target's engine adds them in float.
    """
    if bits is None:
        log.note("biases stay in float, as the target's engine adds them")
        return
    for node in weighted_nodes(model):
        layer, source = module_of(model, node), quantizer_before(model, node.args[0])
        if layer.weight_qparams is None:
            continue
        if source is None:
            log.skipped(ACTION, node.target, "its input has no quantizer")
            continue
        qparams = choose_bias_qparams(layer.bias, bits, layer.weight_qparams.scale * source.scale)
        if overflows(layer.bias, qparams):  # quantize_weights left room for all but a huge correction
            log.skipped(ACTION, node.target, "its corrected bias overflows int32")
            continue
        layer.bias_qparams = qparams
        layer.bias.data.copy_(round_bias(layer.bias, qparams))
        log.applied(ACTION, node.target)
