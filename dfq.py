"""Data-free quantization: the passes, in the order in which they run.

Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction (ICCV 2019,
arXiv 1906.04721), called "the paper" below. Every pass is a file of utils/passes: it takes the captured network, edits
it and writes to the log what it did. What passes share is an argument: the statistics that BatchNorm left
behind, the moments of every activation that follow from them, and images distilled from them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache, partial
from operator import attrgetter

import torch
from torch import Tensor, fx, nn

from utils.calibration.distillation import (
    Distillation,
    describe_fit,
    distill,
    distill_few,
    for_few_bits,
    for_search,
    leaves_to_judge,
    search_images,
    statistics_fit,
)
from utils.calibration.fidelity import fidelity
from utils.calibration.images import Images, halves, held_out, whose
from utils.calibration.moments import Statistics, propagate
from utils.calibration.observers import layer_extremes
from utils.calibration.ranges import batchnorm_ranges
from utils.calibration.sums import measure_sums
from utils.core.cache import cache_folder
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.networks import plain
from utils.core.predictions import Predictions
from utils.graph.capture import capture
from utils.graph.in_place import run_in_place
from utils.graph.nodes import module_of, weighted_nodes
from utils.graph.regions import find_regions
from utils.passes.activation_ranges import activation_ranges, guess_ranges
from utils.passes.adaround import learn_rounding
from utils.passes.advice import check_statistics, fidelity_warnings
from utils.passes.bias_absorption import absorb_high_biases
from utils.passes.bias_correction import correct_biases
from utils.passes.bit_widths import FULL, bits_of_activations, bits_of_weights
from utils.passes.block_learning import Reconstruction
from utils.passes.clip_weights import clip_weights
from utils.passes.dead_channels import clear_dead_channels
from utils.passes.equalization import ScalesOf, cle_scales, equalize
from utils.passes.exactness import Reference, check_capture, check_unchanged, note_change, probed_outputs
from utils.passes.fold_batchnorm import fold_batchnorm
from utils.passes.insert_quantizers import insert_quantizers
from utils.passes.log import PassLog
from utils.passes.noise_equalization import QuantScheme, choose_nearest, noise_optimal_scales, observe_on_images
from utils.passes.quantize_bias import quantize_biases
from utils.passes.quantize_weights import keep_in_float, quantizable_layers, quantize_weights, weight_ranges
from utils.passes.relu6 import drop_idle_caps, replace_relu6
from utils.passes.result import Quantized
from utils.quantization.recipe import Recipe, Value
from utils.quantization.target import DEFAULT
from utils.search.auto import check_near, find_recipe, unseen
from utils.search.candidates import OUTER_BITS, check_settings, outer_bits, start
from utils.search.search import Found


def quantize_data_free(
    model: nn.Module,
    spec: InputSpec,
    recipe: Recipe,
    images: Tensor | None = None,
    captured: fx.GraphModule | None = None,
    judging: Tensor | None = None,
    real: bool = False,
    device: torch.device | None = None,
) -> Quantized:
    """Run the recipe's passes on a copy of the network; no data is used, unless images are real.

    images: [N, C, H, W] as utils.calibration.distillation makes them, or the user's own, which recipe.needs_images asks
    for. captured: capture(model, spec), where it is at hand. judging: other images, on which results are compared with
    the float network; None: the same. real: the images are pictures, which then tell of all that no BatchNorm tells of.
    device: where rounding is learned; None: on the CPU.
    A network that cannot be captured, or lacks what a pass needs, is a UserError; so is a pass that
    should be exact and changes the output of a probe batch.
    """
    recipe.check_images(images)
    own = None if images is None else Images(images, images if judging is None else judging, real)
    start = _exact_passes(plain(model), spec, recipe, captured, own)

    # Cross-layer equalization, section 4.1; by distilled images whichever scales come nearest, ours.
    if recipe.distill_equalize:
        result = _quantize_nearest(start)
    else:
        result = _quantize_equalized(start, _cle(start) if recipe.equalize else None)

    # Rounding learned block by block, from what GPTQ gives. Not in the paper.
    if recipe.learns_rounding:
        result = _learned(result, spec, recipe, own, device)
    for warning in fidelity_warnings(result.fidelity, recipe, len(own.judging), own.real) if result.fidelity else ():
        result.log.warn(warning)
    return result


def _learned(
    result: Quantized, spec: InputSpec, recipe: Recipe, images: Images, device: torch.device | None
) -> Quantized:
    """With rounding learned, which dead leaves judge too where no picture does. With few bits of activations images of
    another kind than those learned from say nothing of it: their outputs are noise before and after."""
    settings = Reconstruction().with_activations_of(recipe.bits_activation)
    learn = partial(
        learn_rounding,
        bits_bias=recipe.steps_of_biases,
        settings=settings,
        device=device,
        folder=cache_folder() / "rounding",
        others=None if images.real else leaves_to_judge(spec, len(images.judging)),
    )
    if recipe.bits_activation >= FULL or images.real:
        return learn(result, images)
    own = held_out(images)
    learned = learn(replace(result, fidelity=fidelity(result.float, result.simulated, own.judging)), own)
    return replace(learned, fidelity=fidelity(learned.float, learned.simulated, images.judging))


def _exact_passes(
    model: nn.Module, spec: InputSpec, recipe: Recipe, captured: fx.GraphModule | None, images: Images | None
) -> _Start:
    """The passes before equalization, which leave what the network computes as it is, but for --relu.

    model: as plain() gives it, in float32 and evaluating.
    """
    log = PassLog()
    if recipe.quantize and recipe.target != DEFAULT:
        log.note(str(recipe.engine))
    captured = capture(model, spec) if captured is None else captured
    network = capture(captured, spec)
    probe = spec.probe(network.meta["batch"] or 2)
    reference = check_capture(model, network, spec, probe, log)
    if images and len(fit := statistics_fit(network, spec, images.calibration)) > 1:
        log.note(describe_fit(fit, len(images.calibration), f"of {whose(True)}" if images.real else "images"))

    # Fold BatchNorm, and keep what it knew of every layer's output.
    statistics = fold_batchnorm(network, log)
    measure_sums(network, spec)
    keep_in_float(network, recipe.float_layers)
    for node in weighted_nodes(network):
        log.applied("found layers", node.target, str(module_of(network, node)))
    check_unchanged("BatchNorm folding", network, reference, log)
    log.weights["BatchNorm folded"] = weight_ranges(network)
    if not statistics and images is None:
        check_statistics(recipe)

    # Layers in a row that no BatchNorm tells of: their ranges come from images, a few distilled ones if there are none to consult.
    guessed = guess_ranges(network, statistics, recipe, images is not None and images.real, log)
    few = distill_few(captured, spec) if guessed and statistics and _consulted(recipe, images) is None else None

    # ReLU6 -> ReLU, section 5.1.1: changes the function. Without it equalization keeps ReLU6 exact.
    if recipe.relu:
        replace_relu6(network, log)
        reference = replace(reference, outputs=probed_outputs(network, probe))

    # Dead channels: weights that read constants do not set a layer's range. Ours.
    if recipe.clear_dead or recipe.equalize:
        network, statistics, log = _cleared(network, spec, statistics, reference, log)
    return _Start(network, spec, statistics, recipe, images, few, log, reference)


def _cleared(
    network: fx.GraphModule, spec: InputSpec, statistics: Statistics, reference: Reference, log: PassLog
) -> tuple[fx.GraphModule, Statistics, PassLog]:
    """The network without its dead channels; as it is, which is said, where one of them is alive on the probe."""
    cleared, done = copy.deepcopy(network), copy.deepcopy(log)
    corrected = clear_dead_channels(cleared, spec, statistics, done)
    try:
        check_unchanged("clearing dead channels", cleared, reference, done)
    except UserError:
        log.warn(
            "no dead channels are cleared: activations reach further than BatchNorm says, and some are alive there"
        )
        return network, statistics, log
    done.weights["dead channels cleared"] = weight_ranges(cleared)
    return cleared, corrected, done


def _consulted(recipe: Recipe, images: Images | None) -> Images | None:
    """The images that a network may follow from. Distilled ones that no pass asks for judge it alone."""
    return images if images is not None and (recipe.needs_images or images.real) else None


def quantize(
    network: fx.GraphModule,
    spec: InputSpec,
    statistics: Statistics,
    recipe: Recipe,
    images: Images | None,
    log: PassLog,
    few: Tensor | None = None,
) -> Quantized:
    """The passes behind equalization: they change what the network computes.

    few: images for the ranges of tensors that no BatchNorm tells of, where no others are consulted.
    """
    if recipe.absorption:
        statistics = _absorbed(network, spec, statistics, log)
    if not recipe.quantize:
        return Quantized(run_in_place(network), None, log)

    # Activation ranges from BatchNorm statistics, section 5, or from distilled images.
    moments = propagate(network, spec, statistics)
    at_hand = images if few is None else Images(few, few)
    range_of = activation_ranges(network, spec, statistics, moments, recipe, at_hand, log)
    simulated = copy.deepcopy(network)
    layers = quantizable_layers(simulated, range_of, log)
    other_bits = bits_of_activations(network, recipe)
    consulted = _consulted(recipe, images)
    on_images = consulted and cache(partial(layer_extremes, network, consulted.calibration))
    drop_idle_caps(simulated, statistics, range_of, recipe.bits_activation, recipe.engine.signed, on_images, log)
    insert_quantizers(simulated, range_of, recipe.bits_activation, log, recipe.engine, other_bits)

    # Weights: clipped, section 5.1.2, and rounded to the nearest steps.
    if recipe.clip_weight:
        clip_weights(simulated, recipe.clip_weight, log)
    grid = recipe.bits_weight, recipe.channel_scales, not recipe.asymmetric, recipe.steps_of_biases
    quantize_weights(simulated, layers, *grid, log, recipe.engine.bits_first, bits_of_weights(network, recipe))
    log.weights["quantized"] = weight_ranges(simulated)

    # Bias correction, section 4.2.
    if recipe.correction:
        correct_biases(simulated, network, statistics, moments, recipe, images, log)

    # Biases: to the steps of the int32 accumulator.
    quantize_biases(simulated, recipe.steps_of_biases, log)
    near = None if images is None else fidelity(network, simulated, images.judging)
    return Quantized(run_in_place(network), run_in_place(simulated), log, near)


def _absorbed(network: fx.GraphModule, spec: InputSpec, statistics: Statistics, log: PassLog) -> Statistics:
    """High-bias absorption, section 4.1.3; not exact."""
    expected = probed_outputs(network, spec.probe())
    statistics = absorb_high_biases(network, statistics, log)
    note_change("absorption", expected, network, spec.probe(), log)
    return statistics


# ----------------------------------------------------------------------------------- equalizations


@dataclass(frozen=True)
class _Start:
    """What every way to equalize starts from; each works on a copy of the network and the log."""

    network: fx.GraphModule
    spec: InputSpec
    statistics: Statistics
    recipe: Recipe
    images: Images | None
    few: Tensor | None
    log: PassLog
    reference: Reference


def _cle(start: _Start) -> ScalesOf:
    """The scales of the paper. Real images tell how far the channels reach of which no BatchNorm tells."""
    real = start.images is not None and start.images.real
    observed = layer_extremes(start.network, start.images.calibration) if real else {}
    return partial(cle_scales, ranges=observed | batchnorm_ranges(start.statistics))


def _quantize_equalized(
    start: _Start, scales_of: ScalesOf | None, through_sums: bool = False, without: frozenset[str] = frozenset()
) -> Quantized:
    """Quantize after one equalization, or after none."""
    network, log, statistics = copy.deepcopy(start.network), copy.deepcopy(start.log), start.statistics
    if scales_of:
        statistics = equalize(network, statistics, scales_of, log, through_sums, without)
        check_unchanged("equalization", network, start.reference, log)
        log.weights["equalized"] = weight_ranges(network)
    return quantize(network, start.spec, statistics, start.recipe, start.images, log, start.few)


def _quantize_nearest(start: _Start) -> Quantized:
    """Quantize after each of several equalizations, and keep what is nearest on distilled images."""
    recipe, network = start.recipe, start.network
    noise_optimal = partial(
        noise_optimal_scales,
        statistics=start.statistics,
        observed=observe_on_images(network, start.images.calibration),
        scheme=QuantScheme(
            recipe.bits_weight,
            recipe.bits_activation,
            recipe.channel_scales,
            not recipe.asymmetric,
            recipe.engine.signed,
            bits_of_weights(network, recipe),
            bits_of_activations(network, recipe),
        ),
    )
    ways = {
        "none": partial(_quantize_equalized, start, None),
        "CLE scales": partial(_quantize_equalized, start, _cle(start)),
        "noise-optimal scales": partial(_quantize_equalized, start, noise_optimal),
        "noise-optimal scales, through sums": partial(_quantize_equalized, start, noise_optimal, True),
    }
    sinks = {sink.name for region in find_regions(network)[0] for sink in region.sinks}
    chosen, why = choose_nearest(ways, attrgetter("fidelity"), sinks)
    chosen.log.note(why)
    return chosen


# ------------------------------------------------------------------------------------------- auto


def quantize_auto(
    model: nn.Module,
    spec: InputSpec,
    images: Tensor | None = None,
    max_noise: float | None = None,
    predictions: Predictions | None = None,
    force: bool = False,
    **settings: Value,
) -> Found:
    """The recipe whose network is nearest to float, of all that can differ on this one, with the network that it makes.

    images: [N, C, H, W] of your own, 8 or more, half of which are to judge by; None: distilled ones. max_noise: the dB that
    the output must be over its noise; the noisiest layers stay in float until it is. predictions: class indices of the
    outputs, to compare. force: take it though it is far from float, which is a UserError otherwise. settings: of Recipe, that
    every candidate has: bits and the target. Fewer than 8 bits of weights leave the first and the last layer 8, where the
    target's first layer takes these, unless bits_first_last says otherwise.
    """
    check_settings(settings)
    first = start(settings)
    if few_bits := first.bits_weight < OUTER_BITS:
        first = start({"bits_first_last": outer_bits(first.bits_weight, first.target)} | settings)
    captured = capture(model, spec)
    if images is None:
        kind = for_few_bits(captured, spec, Distillation(), True) if few_bits else Distillation()
        made = (distill(captured, spec, one, torch.device("cpu")) for one in for_search(kind))
        shown = search_images(*made)
    else:
        shown = Images(*halves(images), real=True)
    quantize = partial(quantize_data_free, model, spec, captured=captured)
    shown, judging = unseen(shown)
    found, _ = find_recipe(captured, shown, judging, quantize, first, predictions, max_noise)
    if not force:
        check_near(found, shown)
    return found
