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
    """Analytically, or on images, there with GPTQ layer by layer; what the recipe asks for.

    Real images also serve the layers of whose input no BatchNorm tells.
    """
    if recipe.distill_correction:
        means = layer_means(network, images.calibration)
        if recipe.distill_rounding:
            round_and_correct(simulated, network, means, images.calibration, log)
        else:
            empirical_bias_correction(simulated, means, images.calibration, log)
        return
    unknown: set[str] = set()
    if images is not None and images.real:
        guessed = guessed_tensors(network, statistics)
        layers = weighted_nodes(network)
        unknown = {node.target for node in layers if node.args[0].name in guessed or not statistics}
    analytical_bias_correction(simulated, network, moments, log, unknown)
    if unknown:
        means = layer_means(network, images.calibration)
        empirical_bias_correction(simulated, means, images.calibration, log, unknown)


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
        error = {"weight": layer.weight - exact.weight, "bias": torch.zeros_like(layer.bias)}
        with torch.no_grad():
            shift = torch.func.functional_call(layer, error, (known.mean.contiguous(),))
        axis = shift.dim() - 1 if isinstance(layer, nn.Linear) else 1
        shift = shift.transpose(0, axis).flatten(1).mean(1)
        layer.bias.data.sub_(shift)
        log.applied(ACTION, node.target, f"largest shift {float(shift.abs().max()):.3g}")


def empirical_bias_correction(
    model: fx.GraphModule,
    means: dict[str, Tensor],
    images: Tensor,
    log: PassLog,
    only: Collection[str] | None = None,
) -> None:
    """Take the mean shift of every layer's output on images out of its bias.

    One pass from input to output: a layer is measured behind layers that are quantized and corrected
    already, on all images at once. means: [C] of the float network's outputs, by layer. only: the layers to correct;
    None: all.
    """

    def correct(name: str, layer: nn.Module, x: Tensor) -> Tensor:
        output = layer(x)
        return output if only is not None and name not in only else correct_layer(name, layer, output, means[name], log)

    run_layers(model, images, correct)


def round_and_correct(
    model: fx.GraphModule, reference: fx.GraphModule, means: dict[str, Tensor], images: Tensor, log: PassLog
) -> None:
    """GPTQ and empirical bias correction together, layer by layer from input to output.

    Each needs what the other left in the layers before: a layer is rounded by what it reads behind layers that are
    rounded and corrected, then corrected for its own new weights. reference: the float network, before any rounding.
    """

    def round_then_correct(name: str, layer: nn.Module, x: Tensor) -> Tensor:
        gptq_round_layer(name, layer, reference.get_submodule(name).weight, x, log)
        return correct_layer(name, layer, layer(x), means[name], log)

    run_layers(model, images, round_then_correct)


def correct_layer(name: str, layer: nn.Module, output: Tensor, mean: Tensor, log: PassLog) -> Tensor:
    """Move a layer's bias so that its output's mean on the images is the given one [C]; returns the moved output."""
    shift = channel_mean(layer, output) - mean
    layer.bias.data.sub_(shift)
    log.applied(ACTION, name, f"largest shift {float(shift.abs().max()):.3g}")
    return output - along_outputs(layer, shift, output.dim())
