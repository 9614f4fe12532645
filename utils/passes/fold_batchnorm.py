"""BatchNorm folding: every BatchNorm is multiplied into the layer before it, and its statistics are kept."""

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from utils.calibration.moments import Statistics, batchnorm_output
from utils.graph.capture import describe, module_of, shape, tidy
from utils.graph.layers import WEIGHTED, taps
from utils.passes.log import PassLog

ACTION = "folded BatchNorm"


def fold_batchnorm(model: fx.GraphModule, log: PassLog) -> Statistics:
    """Multiply every BatchNorm into the layer before it; returns what it knew of that layer's output.

    A BatchNorm that reads anything else becomes a 1x1 depthwise convolution, which every later
    pass then treats as the layer that it is in an integer engine.
    """
    statistics = {}
    for node in list(model.graph.nodes):
        norm = module_of(model, node)
        if not isinstance(norm, _BatchNorm):
            continue
        if norm.running_var is None:
            log.skipped(ACTION, node.target, "it keeps no running statistics")
            continue
        source = node.args[0]
        layer = module_of(model, source)
        follows = isinstance(layer, WEIGHTED) and len(source.users) == 1
        if follows and (isinstance(layer, _ConvNd) or len(shape(source)) == 2):
            name = source.target
            node.replace_all_uses_with(source)
            model.graph.erase_node(node)
            log.applied(ACTION, f"{node.target} into {name}")
        elif len(shape(node)) == 4:
            name, layer = node.target, _identity_convolution(norm.num_features)
            model.set_submodule(name, layer)
            log.applied(ACTION, f"{name} as a 1x1 depthwise convolution", "stands alone")
        else:
            log.skipped(ACTION, node.target, f"reads {describe(layer, source)}")
            continue
        _multiply_into(layer, norm)
        statistics[name] = batchnorm_output(norm)
    tidy(model)
    return statistics


def _multiply_into(layer: nn.Module, norm: _BatchNorm) -> None:
    """Make the layer compute what the BatchNorm made of its output; in float64."""
    gain = norm.running_var.double().add(norm.eps).rsqrt()
    if norm.affine:
        gain = gain * norm.weight.double()
    shift = (layer.bias.double() - norm.running_mean.double()) * gain
    view = taps(layer)
    view.copy_(view.double() * gain.view(view.shape[0], -1, 1, 1))
    layer.bias.data.copy_(shift + (norm.bias.double() if norm.affine else 0))


def _identity_convolution(channels: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, channels, 1, groups=channels).requires_grad_(False)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    layer.weight_qparams = layer.bias_qparams = None
    return layer
