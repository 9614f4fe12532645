"""BatchNorm folding: every BatchNorm is multiplied into the layer before it, and its statistics are kept."""

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from utils.calibration.moments import Gaussian, Statistics, batchnorm_output
from utils.core.errors import UserError
from utils.graph.layers import WEIGHTED, ChannelAffine, channels_out, grouped_weight, make_layer
from utils.graph.nodes import module_of, shape, tidy
from utils.passes.log import PassLog

ACTION = "folded BatchNorm"


def fold_batchnorm(model: fx.GraphModule, log: PassLog) -> Statistics:
    """Multiply every BatchNorm into the layer before it; returns what it knew of that layer's output.

    A BatchNorm that reads anything else becomes a 1x1 depthwise convolution, which every later
    pass then treats as the layer that it is in an integer engine. Other straight lines of channels are folded too.
    """
    statistics: Statistics = {}
    for node in list(model.graph.nodes):
        norm = module_of(model, node)
        if isinstance(norm, ChannelAffine):
            _fold_affine(model, node, norm, statistics, log)
        elif isinstance(norm, _BatchNorm):
            _fold(model, node, norm, statistics, log)
    tidy(model)
    return statistics


def _fold(model: fx.GraphModule, node: fx.Node, norm: _BatchNorm, statistics: Statistics, log: PassLog) -> None:
    if not bool((norm.running_var >= 0).all()):
        raise UserError(
            f"BatchNorm {node.target!r} has a running variance that is negative or no number; is the checkpoint sound?"
        )
    gain = norm.running_var.double().add(norm.eps).rsqrt() * (norm.weight.double() if norm.affine else 1.0)
    mean, bias = norm.running_mean.double(), norm.bias.double() if norm.affine else torch.zeros_like(gain)
    layer = _layer_before(model, node)
    if layer is not None:
        name = node.args[0].target
        _erase(model, node)
        log.applied(ACTION, f"{node.target} into {name}")
    elif len(shape(node)) in (3, 4, 5):
        name, layer = node.target, _identity_convolution(norm.num_features, len(shape(node)) - 2)
        model.set_submodule(name, layer)
        log.applied(ACTION, f"{name} as a depthwise convolution of one weight", "stands alone")
    else:
        name = node.target
        model.set_submodule(name, ChannelAffine(gain.float(), (bias - mean * gain).float()))
        log.applied(ACTION, f"{name} as a product and a sum", "stands alone")
    if layer is not None:
        _multiply_into(layer, mean, gain, bias)
    statistics[name] = batchnorm_output(norm)


def _fold_affine(
    model: fx.GraphModule, node: fx.Node, affine: ChannelAffine, statistics: Statistics, log: PassLog
) -> None:
    layer = _layer_before(model, node)
    if layer is None or (affine.scale == 0).any():
        return
    name = node.args[0].target
    _erase(model, node)
    channels = channels_out(layer)
    scale, shift = (part.double().expand(channels) for part in (affine.scale, affine.shift))
    _multiply_into(layer, torch.zeros_like(scale), scale, shift)
    if name in statistics:
        known = statistics[name]
        mean = (known.mean.double() * scale + shift).float()
        statistics[name] = Gaussian(mean, (known.variance.double() * scale**2).float())
    log.applied("folded products and sums", f"{node.target} into {name}")


def _layer_before(model: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The layer whose output this node alone reads, channel by channel."""
    source = node.args[0]
    layer = module_of(model, source)
    if not isinstance(layer, WEIGHTED) or len(source.users) > 1:
        return None
    return layer if isinstance(layer, _ConvNd) or len(shape(source)) == 2 else None


def _erase(model: fx.GraphModule, node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])
    model.graph.erase_node(node)


def _multiply_into(layer: nn.Module, mean: Tensor, gain: Tensor, bias: Tensor) -> None:
    """Make the layer compute (its output - mean) * gain + bias, [C] each; in float64."""
    view = grouped_weight(layer)
    view.copy_(view.double() * gain.view(view.shape[0], -1, 1, 1))
    layer.bias.data.copy_((layer.bias.double() - mean) * gain + bias)


def _identity_convolution(channels: int, dims: int) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": channels}
    return make_layer(kind, torch.ones(channels, 1, *[1] * dims), None, **options)
