"""Activation ranges: between what values every tensor is quantized, from BatchNorm statistics (section 5) and from images."""

from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from utils.calibration.images import Images, whose
from utils.calibration.moments import Moments, Statistics, Unknown
from utils.calibration.range_rules import (
    Fitted,
    clip_bounds,
    describe_fitted,
    describe_guesses,
    extreme_ranges,
    fit_ranges,
    fitted_ranges,
    guessed_tensors,
    guesses_replaced,
    image_extremes,
    measuring_images,
    starting_ranges,
    weight_noise,
)
from utils.calibration.ranges import RangeOf, analytic_ranges, describe_contradictions, observed_ranges, width_ratios
from utils.core.hashing import content_hash
from utils.core.input_spec import InputSpec
from utils.passes.advice import other_ranges
from utils.passes.bit_widths import bits_of_activations
from utils.passes.insert_quantizers import averaged_into_output, quantized_tensors
from utils.passes.log import PassLog
from utils.quantization.recipe import Recipe


def guess_ranges(network: fx.GraphModule, statistics: Statistics, recipe: Recipe, real: bool, log: PassLog) -> bool:
    """Whether tensors are to be quantized that no BatchNorm tells of, whose ranges then come from images; said in the log."""
    guesses = guessed_tensors(network, statistics)
    written = quantized_tensors(network, recipe.engine)
    names = {node.name: guesses[node.name] for node in written if node.name in guesses}
    if not (recipe.quantize and names):
        return False
    (log.note if real else log.warn)(describe_guesses(names, whose(real)) + ("" if real else "; try --images DIR"))
    return True


def activation_ranges(
    network: fx.GraphModule,
    spec: InputSpec,
    statistics: Statistics,
    moments: dict[str, Moments | Unknown],
    recipe: Recipe,
    images: Images | None,
    log: PassLog,
) -> RangeOf:
    """What every node's output is taken to lie in: from BatchNorm, and from images where these may be used.

    Without --distill_range images only tell of tensors that no BatchNorm tells of.
    """
    analytic = analytic_ranges(moments)
    guessed = guessed_tensors(network, statistics)
    written = quantized_tensors(network, recipe.engine)
    told = [node for node in written if node.name not in guessed]
    if images is None or not (recipe.distill_range or images.real or len(told) < len(written)):
        return analytic
    by_method = recipe.distill_range and recipe.range_method != "minmax"
    extremes = {} if by_method else image_extremes(network, images.calibration)
    if by_method:
        grid = recipe.range_method, recipe.bits_activation, recipe.engine.signed
        observed = observed_ranges(network, spec, images.calibration, *grid)
    else:
        observed = extreme_ranges(spec, extremes)
    if contradictions := describe_contradictions(told, observed, analytic, whose(images.real)):
        cut = any(ratio > 1 for ratio in width_ratios(told, observed, analytic).values())
        (log.warn if cut else log.note)(contradictions + (other_ranges(recipe, images.real) if cut else ""))
    if not recipe.distill_range:
        return guesses_replaced(analytic, observed, guessed, clip_bounds(network))
    if by_method:
        return observed
    ranges = starting_ranges(written, analytic, observed, guessed, recipe.relu)
    return _fitted(
        network, written, ranges, observed, recipe, measuring_images(images.calibration, extremes, ranges), log
    )


def _fitted(
    network: fx.GraphModule,
    written: list[fx.Node],
    ranges: Mapping[str, Sequence[tuple[float, float]]],
    observed: RangeOf,
    recipe: Recipe,
    some: Tensor,
    log: PassLog,
) -> RangeOf:
    """Of every tensor the noise-optimal range. some: images [N, C, H, W] on which that is measured."""
    other_bits = bits_of_activations(network, recipe)
    weights = recipe.bits_weight, recipe.channel_scales, not recipe.asymmetric
    bits, signed = recipe.bits_activation, recipe.engine.signed
    key = content_hash((network, ranges, some, weights, bits, signed, other_bits))
    if key not in _FITTED:
        last = {node.name for node in written if averaged_into_output(network, node)}
        allowed = weight_noise(network, some, *weights)
        _FITTED[key] = fit_ranges(network, ranges, some, bits, allowed, last, signed, other_bits)
    log.note(describe_fitted(_FITTED[key]))
    return fitted_ranges(_FITTED[key], observed)


# What was measured, by the hash of all that it depends on: recipes that differ in their corrections alone share it.
_FITTED: dict[str, dict[str, Fitted]] = {}
