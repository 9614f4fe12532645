"""Bias correction: the mean shift that quantization causes is taken out of the biases (section 4.2)."""

from collections.abc import Collection

import torch
from torch import Tensor, fx, nn

from utils.calibration.images import Images
from utils.calibration.moments import Moments, Statistics, Unknown
from utils.calibration.observers import channel_mean, layer_means, run_layers
from utils.calibration.range_rules import guessed_tensors
from utils.graph.layers import along_outputs
from utils.graph.nodes import module_of, weighted_nodes
from utils.passes.gptq import gptq_round_layer
from utils.passes.log import PassLog
from utils.quantization.recipe import Recipe

ACTION = "corrected biases"


def correct_biases(
    simulated: fx.GraphModule,
    network: fx.GraphModule,
    statistics: Statistics,
    moments: dict[str, Moments | Unknown],
    recipe: Recipe,
    images: Images | None,
    log: PassLog,
) -> None:
    """Analytically, or on images, and with GPTQ layer by layer; what the recipe asks for.

    Images serve the layers of whose input no BatchNorm tells, if they are real or GPTQ rounds by them.
    """
    layers = weighted_nodes(network)
    by_images: set[str] = set()
    if recipe.distill_correction:
        by_images = {node.target for node in layers}
    elif images is not None and (images.real or recipe.distill_rounding):
        guessed = guessed_tensors(network, statistics) if images.real else ()
        unknown = {name for name, known in moments.items() if isinstance(known, Unknown)}
        by_images = {node.target for node in layers if node.args[0].name in unknown.union(guessed) or not statistics}
    means = layer_means(network, images.calibration) if by_images else {}
    means = {name: mean for name, mean in means.items() if name in by_images}
    if recipe.distill_rounding:
        round_and_correct(simulated, network, means, moments, images.calibration, log)
        return
    if not recipe.distill_correction:
        analytical_bias_correction(simulated, network, moments, log, means)
    if means:
        empirical_bias_correction(simulated, means, images.calibration, log)


def analytical_bias_correction(
    model: fx.GraphModule,
    reference: fx.GraphModule,
    moments: dict[str, Moments | Unknown],
    log: PassLog,
    without: Collection[str] = (),
) -> None:
    """Take the mean shift that follows from BatchNorm statistics out of the biases; equation 16.

    E[(W + e) x] - E[W x] = e * E[x], with the mean of x at every position, so that grouped_weight over zero padding
    count as zeros at the border. reference: the float network, before clipping and rounding; moments: of its nodes.
    without: layers that are left as they are.
    """
    for node in weighted_nodes(reference):
        layer, exact = model.get_submodule(node.target), module_of(reference, node)
        if layer.weight_qparams is None or node.target in without:
            continue
        known = moments[node.args[0].name]
        if isinstance(known, Unknown):
            log.skipped(ACTION, node.target, f"nothing is known of its input's mean {known.reason}")
            continue
        _move_bias(node.target, layer, _expected_shift(layer, exact, known), log)


def _expected_shift(layer: nn.Module, exact: nn.Module, known: Moments) -> Tensor:
    """[C] by which rounded weights move the mean of a layer's output. known: of its input."""
    error = {"weight": layer.weight - exact.weight, "bias": torch.zeros_like(layer.bias)}
    with torch.no_grad():
        return channel_mean(layer, torch.func.functional_call(layer, error, (known.mean.contiguous(),)))


def _move_bias(name: str, layer: nn.Module, shift: Tensor, log: PassLog) -> None:
    layer.bias.data.sub_(shift)
    log.applied(ACTION, name, f"largest shift {float(shift.abs().max()):.3g}")


def empirical_bias_correction(model: fx.GraphModule, means: dict[str, Tensor], images: Tensor, log: PassLog) -> None:
    """Take the mean shift of layers' outputs on images out of their biases.

    One pass from input to output: a layer is measured behind layers that are quantized and corrected
    already, on all images at once. means: [C] of the float network's outputs, by layer; of the layers to correct.
    """

    def correct(name: str, layer: nn.Module, x: Tensor) -> Tensor:
        output = layer(x)
        return correct_layer(name, layer, output, means[name], log) if name in means else output

    run_layers(model, images, correct)


def round_and_correct(
    model: fx.GraphModule,
    reference: fx.GraphModule,
    means: dict[str, Tensor],
    moments: dict[str, Moments | Unknown],
    images: Tensor,
    log: PassLog,
) -> None:
    """GPTQ and bias correction together, layer by layer from input to output.

    Each needs what the other left in the layers before: a layer is rounded by what it reads behind layers that are
    rounded and corrected, then corrected for its own new weights. reference: the float network, before any rounding.
    means: as empirical_bias_correction takes them. moments: of the float network's nodes, by which other layers are corrected.
    """
    sources = {node.target: node.args[0].name for node in weighted_nodes(reference)}

    def round_then_correct(name: str, layer: nn.Module, x: Tensor) -> Tensor:
        exact = reference.get_submodule(name)
        gptq_round_layer(name, layer, exact.weight, x, log)
        if name in means:
            return correct_layer(name, layer, layer(x), means[name], log)
        if layer.weight_qparams is not None:
            _move_bias(name, layer, _expected_shift(layer, exact, moments[sources[name]]), log)
        return layer(x)

    run_layers(model, images, round_then_correct)


def correct_layer(name: str, layer: nn.Module, output: Tensor, mean: Tensor, log: PassLog) -> Tensor:
    """Move a layer's bias so that its output's mean on the images is the given one [C]; returns the moved output."""
    shift = channel_mean(layer, output) - mean
    _move_bias(name, layer, shift, log)
    return output - along_outputs(layer, shift, output.dim())
