"""Data-free quantization: the passes, in the order in which they run.

Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction (ICCV 2019,
arXiv 1906.04721), called "the paper" below. Every pass takes the traced network, edits it and notes
in the journal what it did. What passes share is an argument: the statistics that BatchNorm left
behind, the moments of every activation that follow from them, and images distilled from them.

Notation: a layer computes y = W x + b; r(W)_i is the largest |W| of a channel i.
"""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from utils.backends.lowering import fold_scales, grid_sources, keeps_grid, quantizer_before
from utils.calibration.distillation import describe_fit, statistics_fit
from utils.calibration.moments import SIGMAS, Gaussian, Moments, Statistics, Unknown, batchnorm_output, propagate
from utils.calibration.observers import (
    Fidelity,
    Watched,
    channel_extremes,
    channel_mean,
    fidelity,
    histograms,
    input_means,
    layer_means,
)
from utils.calibration.sensitivity import Sensitivity, Tensors, quietest_scales, sensitivity
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.graph.capture import (
    describe,
    insert_module,
    is_tensor,
    module_of,
    run_in_place,
    shape,
    tidy,
    trace,
    weighted_nodes,
)
from utils.graph.layers import (
    CLIPS,
    WEIGHTED,
    CappedReLU,
    channels_in,
    input_sums,
    per_channel,
    scale_inputs,
    scale_outputs,
    taps,
)
from utils.graph.regions import Link, Port, find_links, stored_nodes
from utils.passes.gptq import compensated, second_moment
from utils.passes.log import Journal
from utils.quantization import serialization as artifact
from utils.quantization.quantizer import (
    QParams,
    Quantizer,
    affine_grid,
    bias_grid,
    leave_room,
    quantize_bias,
    quantize_weight,
    weight_grid,
)
from utils.quantization.recipe import Recipe, recipes_of

LISTENERS = 16  # images on which the output's sensitivity is measured
CONTRADICTED = 3  # times as wide or as narrow as on images: so far off, a range that statistics promise is wrong
TOLERANCE = 1e-3  # by how much of its largest value an exact pass may move an output; float32 alone moves some by 1e-4


@dataclass(frozen=True)
class Quantized:
    """What quantize_data_free made.

    float: the row's own float network, after --relu and the exact passes. simulated: the quantized
    network in simulation, None without --quantize. weight_grids, bias_grids: by layer name.
    fidelity: how near the two are on distilled images, where there were any.
    """

    float: fx.GraphModule
    simulated: fx.GraphModule | None
    weight_grids: dict[str, QParams]
    bias_grids: dict[str, QParams]
    journal: Journal
    fidelity: Fidelity | None = None


def quantize_data_free(model: nn.Module, spec: InputSpec, recipe: Recipe, images: Tensor | None = None) -> Quantized:
    """Run the recipe's passes on a copy of the network; no data is used.

    images: [N, C, H, W] as utils.calibration.distillation makes them, which recipe.needs_images asks for.
    A network that cannot be traced, or lacks what a pass needs, is a UserError; so is a pass that
    should be exact and changes the output of a probe batch.
    """
    recipe.check_images(images)
    journal = Journal()
    probe = spec.probe()
    network = trace(model, spec)
    expected = outputs_of(model, probe)
    check_unchanged("tracing", expected, network, probe, model, journal)

    if images is not None:
        journal.note(describe_fit(statistics_fit(model, spec, images), len(images)))

    statistics = fold_batchnorm(network, journal)
    for node in weighted_nodes(network):
        journal.did("found layers", node.target, str(module_of(network, node)))
    check_unchanged("BatchNorm folding", expected, network, probe, model, journal)
    journal.weights["BatchNorm folded"] = weight_ranges(network)
    if not statistics:
        refuse_without_statistics(recipe)

    if recipe.relu:
        replace_relu6(network, journal)
        expected = outputs_of(network, probe)
    if recipe.clear_dead or recipe.equalize:
        clear_dead_channels(network, spec, statistics, journal)
        check_unchanged("clearing dead channels", expected, network, probe, model, journal)
        journal.weights["dead channels cleared"] = weight_ranges(network)
    if not recipe.equalize:
        return quantize(network, spec, statistics, recipe, images, journal)

    def attempt(scales_of: ScalesOf | None, through_sums: bool = False, without: Names = frozenset()) -> Quantized:
        equalized, known, log = copy.deepcopy((network, statistics, journal))
        if scales_of:
            equalize(equalized, known, scales_of, log, through_sums, without)
            check_unchanged("equalization", expected, equalized, probe, model, log)
            log.weights["equalized"] = weight_ranges(equalized)
        return quantize(equalized, spec, known, recipe, images, log)

    even = partial(even_ranges, extremes=promised_extremes(statistics, SIGMAS))
    if not recipe.distill_equalize:
        return attempt(even)
    heard = sensitivity(network, images[:LISTENERS], input_means(network, images))
    seen = channel_extremes(network, images)
    quiet = partial(least_noise, statistics=statistics, heard=heard, seen=seen, recipe=recipe)
    ways = {
        "none": partial(attempt, None),
        "even ranges": partial(attempt, even),
        "least noise": partial(attempt, quiet),
        "least noise, through sums": partial(attempt, quiet, True),
    }
    readers = {port.name for link in find_links(network)[0] for port in link.readers}
    return nearest(ways, readers)


def quantize(
    network: fx.GraphModule,
    spec: InputSpec,
    statistics: Statistics,
    recipe: Recipe,
    images: Tensor | None,
    journal: Journal,
) -> Quantized:
    """The passes behind the exact ones: they change what the network computes."""
    if recipe.absorption:
        probe = spec.probe()
        expected = outputs_of(network, probe)
        absorb_high_biases(network, statistics, journal)
        journal.note(f"absorption moved the output by {deviation(expected, network, probe):.1e} of its largest value")
    if not recipe.quantize:
        return Quantized(run_in_place(network), None, {}, {}, journal)

    moments = propagate(network, spec, statistics)
    range_of = analytic_ranges(moments)
    if recipe.distill_range:
        analytic, range_of = range_of, distilled_ranges(network, spec, images, recipe)
        compare_ranges(network, range_of, analytic, journal)
    simulated = copy.deepcopy(network)
    quantizable = choose_layers(simulated, range_of, journal)
    exact = {node.target: module_of(simulated, node).weight.detach().clone() for node in quantizable}
    if recipe.clip_weight:
        clip_weights(simulated, recipe.clip_weight, journal)
    weight_grids = quantize_weights(simulated, quantizable, recipe, journal)
    journal.weights["quantized"] = weight_ranges(simulated)
    if recipe.correction and not recipe.distill_correction:
        correct_biases(simulated, quantizable, exact, moments, journal)
    insert_quantizers(simulated, range_of, recipe.bits_activation, journal)
    if recipe.distill_correction:
        round_weight = partial(round_on_images, simulated, exact, weight_grids, journal)
        means = layer_means(network, images)
        correct_biases_on_images(simulated, means, images, journal, round_weight if recipe.distill_rounding else None)
    bias_grids = quantize_biases(simulated, weight_grids, recipe.bits_bias, journal)
    near = None if images is None else fidelity(network, simulated, images)
    return Quantized(run_in_place(network), run_in_place(simulated), weight_grids, bias_grids, journal, near)


class Network(Protocol):
    """A float network with its input, its name and where its weights are from."""

    model: nn.Module
    spec: InputSpec
    name: str
    weights: str


def prepared(
    args: Namespace, task: str, build: Callable[[], Network]
) -> tuple[Network, list[Recipe], Callable[[nn.Module, InputSpec, Recipe, Tensor | None], Quantized]]:
    """The network, its recipes and what quantizes it: as the flags say, or out of a file that --save wrote."""
    if not args.load:
        recipes = recipes_of(args)
        return build(), recipes, quantize_data_free
    saved = artifact.load(args.load, task)
    strange = saved.recipe.keys() ^ {field.name for field in fields(Recipe)}
    if strange:
        raise UserError(
            f"{str(args.load)!r} is of another version (its recipe differs by {min(strange)!r}); save it again"
        )
    quantized = Quantized(saved.float, saved.simulated, saved.weight_grids, saved.bias_grids, Journal())
    quantized.journal.note(f"loaded from {args.load}")
    return saved, [Recipe(**saved.recipe)], lambda *_: quantized


# ------------------------------------------------------------------------------------ self-checks


def outputs_of(model: nn.Module, probe: Tensor) -> list[Tensor]:
    """The network's outputs on the probe, one or several."""
    with torch.no_grad():
        result = model(probe)
    return list(result) if isinstance(result, tuple | list) else [result]


def deviation(expected: list[Tensor], model: nn.Module, probe: Tensor) -> float:
    """The largest change of any value on the probe, as a share of the largest value of its output."""
    pairs = zip(expected, outputs_of(model, probe), strict=True)
    return max(float((before - after).abs().max() / before.abs().max().clamp_min(1e-30)) for before, after in pairs)


def check_unchanged(
    name: str, expected: list[Tensor], model: nn.Module, probe: Tensor, loaded: nn.Module, journal: Journal
) -> None:
    """Refuse a pass that should be exact and moved the output by more than TOLERANCE.

    Some networks amplify float32's own rounding to more than that, where statistics of no variance
    multiply it layer after layer; they are allowed ten times what the loaded network shows of it.
    """
    moved = deviation(expected, model, probe)
    if moved <= TOLERANCE:
        return
    noise = rounding_noise(loaded, probe)
    if moved <= 10 * noise:
        journal.note(
            f"{name} moved the output by {moved:.1e} of its largest value; float32's rounding alone moves it by {noise:.1e}"
        )
        return
    raise UserError(
        f"{name} should leave the network's output as it is, but moved it by {moved:.1e} of its largest value "
        f"(tolerance {TOLERANCE:.0e}): this network is not handled rightly, and nothing was recorded"
    )


def rounding_noise(model: nn.Module, probe: Tensor) -> float:
    """How far the network's output in float32 is from that in float64, as a share of its largest value."""
    exact = [output.float() for output in outputs_of(copy.deepcopy(model).double(), probe.double())]
    return deviation(exact, model, probe)


def refuse_without_statistics(recipe: Recipe) -> None:
    needy = [flag for flag in ("quantize", "correction", "absorption", "clear_dead") if getattr(recipe, flag)]
    if needy:
        flags = " and ".join(f"--{flag}" for flag in needy)
        raise UserError(
            f"the network has no BatchNorm, whose statistics {flags} would need; use a network trained with BatchNorm"
        )


# ---------------------------------------------------------------------------------- fold BatchNorm


def fold_batchnorm(model: fx.GraphModule, journal: Journal) -> Statistics:
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
            journal.left("folded BatchNorm", node.target, "it keeps no running statistics")
            continue
        source = node.args[0]
        layer = module_of(model, source)
        follows = isinstance(layer, WEIGHTED) and len(source.users) == 1
        if follows and (isinstance(layer, _ConvNd) or len(shape(source)) == 2):
            name = source.target
            node.replace_all_uses_with(source)
            model.graph.erase_node(node)
            journal.did("folded BatchNorm", f"{node.target} into {name}")
        elif len(shape(node)) == 4:
            name, layer = node.target, _identity_convolution(norm.num_features)
            model.set_submodule(name, layer)
            journal.did("folded BatchNorm", f"{name} as a 1x1 depthwise convolution", "stands alone")
        else:
            journal.left("folded BatchNorm", node.target, f"reads {describe(layer, source)}")
            continue
        gain = norm.running_var.double().add(norm.eps).rsqrt()
        if norm.affine:
            gain = gain * norm.weight.double()
        shift = (layer.bias.double() - norm.running_mean.double()) * gain
        view = taps(layer)
        view.copy_(view.double() * gain.view(view.shape[0], -1, 1, 1))
        layer.bias.data.copy_(shift + (norm.bias.double() if norm.affine else 0))
        statistics[name] = batchnorm_output(norm)
    tidy(model)
    return statistics


def _identity_convolution(channels: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, channels, 1, groups=channels).requires_grad_(False)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ----------------------------------------------------------------------------------- ReLU6 -> ReLU


def replace_relu6(model: fx.GraphModule, journal: Journal) -> None:
    """Replace every ReLU6 by ReLU, as the published method does; changes the network's function."""
    for node in model.graph.nodes:
        if isinstance(module_of(model, node), nn.ReLU6):
            model.set_submodule(node.target, nn.ReLU())
            journal.did("replaced ReLU6 by ReLU", node.target)


# ---------------------------------------------------------------------------------- dead channels


def clear_dead_channels(model: fx.GraphModule, spec: InputSpec, statistics: Statistics, journal: Journal) -> None:
    """Zero the weights that read channels which are constant, keeping the output as it is.

    Training leaves channels whose weights have decayed to nothing: their output is a constant, act(b).
    A BatchNorm behind such a channel saw no variance, so folding multiplied the weights that read it by
    up to 1 / sqrt(eps), and these set the range of the whole layer. A channel that is constantly 0 can
    be cleared anywhere; another constant is moved to the reader's bias where no padding interferes.
    """
    moments = propagate(model, spec, statistics)
    nodes = {node.target: node for node in weighted_nodes(model)}
    for link in find_links(model)[0]:
        name = link.producer
        source = moments.get(nodes[name].args[0].name)
        if not isinstance(source, Moments) or not link.rectified:
            continue
        low, high = activation_bounds(model, nodes[name], source, link)
        constant = high - low <= 1e-5 * high.max().clamp_min(1e-6)
        zero = constant & (high <= 0)
        if name in statistics:  # what BatchNorm remembers of a channel that has died since is wrong
            known, bias = statistics[name], module_of(model, nodes[name]).bias
            mean = torch.where(constant & ~zero, bias, known.mean)
            statistics[name] = Gaussian(mean, known.variance.masked_fill(constant, 0))
        for port in link.readers:
            _clear(module_of(model, nodes[port.name]), port, zero, constant, (low + high) / 2, name, journal)


def activation_bounds(model: fx.GraphModule, node: fx.Node, source: Moments, link: Link) -> tuple[Tensor, Tensor]:
    """The lowest and highest value [C] that the producer's channels can take after their activation,
    whatever its inputs do within their own ranges."""
    layer = module_of(model, node)
    largest = torch.maximum(source.low.abs().max(), source.high.abs().max())  # of any channel: ranges are estimates
    reach = taps(layer).abs().sum((2, 3)).reshape(-1) * largest
    low, high = ((layer.bias + side * reach).clamp_min(0) for side in (-1, 1))
    for port in link.clips:
        cap = _caps(model.get_submodule(port.name), port, link.channels)
        low, high = torch.minimum(low, cap), torch.minimum(high, cap)
    return low, high


def _caps(clip: nn.Module, port: Port, channels: int) -> Tensor:
    """The caps [channels] that a ReLU6 or CappedReLU puts on a producer's channels."""
    if isinstance(clip, CappedReLU):
        return clip.cap[port.columns(channels)].view(channels, port.repeat)[:, 0]
    return torch.full((channels,), 6.0)


def _clear(
    layer: nn.Module, port: Port, zero: Tensor, constant: Tensor, value: Tensor, producer: str, journal: Journal
) -> None:
    """Clear one reader's columns of the channels that are constantly 0, or constant where that is exact."""
    clearable = constant if port.keeps_constants else zero
    for channel in (constant & ~clearable).nonzero().flatten().tolist():
        journal.left(
            "cleared dead channels",
            f"{producer}[{channel}] in {port.name}",
            "constant is not 0 and the reader pads with zeros",
        )
    if not clearable.any():
        return
    moved = torch.where(clearable & ~zero, value, torch.zeros_like(value))
    layer.bias.data.add_(input_sums(layer, port.across(channels_in(layer), moved, elsewhere=0)))
    scale_inputs(layer, port.across(channels_in(layer), (~clearable).float(), elsewhere=1))
    for channel in clearable.nonzero().flatten().tolist():
        journal.did(
            "cleared dead channels", f"{producer}[{channel}] in {port.name}", f"constant {float(value[channel]):.3g}"
        )


# ------------------------------------------------------------------------------------- equalize


Extremes = dict[
    str, tuple[Tensor, Tensor]
]  # the lowest and highest value [C] that a layer's channels are taken to reach
Names = frozenset[str]
ScalesOf = Callable[
    [fx.GraphModule, list[Link], Journal], list[Tensor]
]  # for every link, what its channels [C] are divided by


def equalize(
    model: fx.GraphModule,
    statistics: Statistics,
    scales_of: ScalesOf,
    journal: Journal,
    through_sums: bool = False,
    without: Names = frozenset(),
) -> None:
    """Rescale channels between every layer and its readers; section 4.1.

    Exact: positive factors pass through ReLU, pooling, padding and concats, and a ReLU6 becomes a CappedReLU.
    through_sums: scale the layers of a residual stream too, all of them by one factor for each channel; the paper leaves
    them as they are. without: layers whose input is left as it is.
    """
    links, refused = find_links(model, through_sums)
    for name, reason in refused.items():
        journal.left("equalized", name, reason)
    harmful = [link for link in links if any(port.name in without for port in link.readers)]
    for name in (name for link in harmful for name in link.producers):
        journal.left("equalized", name, "a reader loses by it on distilled images")
    links = [link for link in links if link not in harmful]
    for link, scale in zip(links, scales_of(model, links, journal), strict=True):
        apply_scale(model, link, scale, statistics)
        names = ", ".join(port.name for port in link.readers)
        factors = f"factors {float(scale.min()):.3g} to {float(scale.max()):.3g}"
        for name in link.producers:
            journal.did("equalized", f"{name} -> {names}", factors + (", tied by sums" if link.tied else ""))
    tidy(model)


def equalization_scale(r1: Tensor, r2: Tensor) -> Tensor:
    """s that gives both layers of a pair the same channel ranges; the paper, equation 11.

    r1, r2: [C] ranges of the producer's output and the readers' input channels. Dividing the first and
    multiplying the second by s makes both sqrt(r1 r2). A channel with no range on one side keeps s = 1.
    """
    live = (r1 > 0) & (r2 > 0)
    return torch.where(live, (r1 / torch.where(live, r2, torch.ones_like(r2))).sqrt(), torch.ones_like(r1))


def even_ranges(
    model: fx.GraphModule,
    links: list[Link],
    journal: Journal,
    extremes: Extremes,
    limit: float = 1e4,
    sweeps: int = 100,
) -> list[Tensor]:
    """Scales under which a layer's channels have the range of those that read them; the paper, section 4.1.

    Sweeps over the network until no factor moves by more than 0.1 %. No factor may stretch
    the range that all channels of an activation share: one of tiny weights and a common bias would, scaled
    up for its weights' sake, leave the others a few steps of the grid. Nor may one go beyond limit,
    either way. Works on the kernels' maxima; weights are not touched.
    """
    layers = {
        name: model.get_submodule(name) for link in links for name in (*link.producers, *(p.name for p in link.readers))
    }
    maxima = {name: taps(layer).abs().amax(3) for name, layer in layers.items()}  # [groups, out, in]
    totals = [torch.ones(link.channels) for link in links]
    floors = [_floor(model, link, extremes) for link in links]
    for _ in range(sweeps):
        moved = 0.0
        for link, total, floor in zip(links, totals, floors, strict=True):
            firsts = [maxima[name] for name in link.producers]
            r1 = torch.stack([first.amax(2).reshape(-1) for first in firsts]).amax(0)
            r2 = torch.stack([_input_range(maxima[port.name], port, link.channels) for port in link.readers]).amax(0)
            scale = (total * equalization_scale(r1, r2)).clamp(1 / limit, limit)
            scale = torch.maximum(scale, floor) / total
            total *= scale
            for first in firsts:
                first /= scale.view(first.shape[0], -1, 1)
            for port in link.readers:
                _scale_columns(maxima[port.name], port, scale)
            moved = max(moved, float(scale.log().abs().max()))
        if moved < 1e-3:
            break
    else:
        journal.note(f"after {sweeps} sweeps of equalization a factor still moved by {moved:.1%}")
    return totals


def _floor(model: fx.GraphModule, link: Link, extremes: Extremes) -> Tensor:
    """The least scales [C] that leave a link's activations within their present range, 0 where it is not known."""
    reach = activation_reaches(model, link, extremes)
    if reach is None:
        return torch.zeros(link.channels)
    return (reach / reach.amax(1, keepdim=True).clamp_min(1e-30)).amax(0)


def least_noise(
    model: fx.GraphModule,
    links: list[Link],
    journal: Journal,
    statistics: Statistics,
    heard: Sensitivity,
    seen: Extremes,
    recipe: Recipe,
) -> list[Tensor]:
    """Scales under which rounding weights and activations adds least to the output; see utils.calibration.sensitivity.

    Channels reach as far as they do on images, or as BatchNorm statistics promise, if further: one that no image wakes
    must not be stretched. But not where statistics promise what is nowhere near what images show: they are wrong.
    seen: by node, what its channels reach on images.
    """
    promised = promised_extremes(statistics, SIGMAS)
    reaches = {}
    for link in links:
        known = activation_reaches(model, link, promised)
        for name, producer in stored_nodes(model, link).items():
            low, high = (side.clamp_min(0) for side in (-seen[name][0], seen[name][1]))
            reach = None if known is None or not producer else known[link.producers.index(producer)]
            if reach is not None and reach.max() < CONTRADICTED * torch.maximum(low, high).max():
                low, high = low if link.rectified else torch.maximum(low, reach), torch.maximum(high, reach)
            reaches[name] = low, high
    largest = {node.target: taps(module_of(model, node)).abs().amax(3) for node in weighted_nodes(model)}
    bits = recipe.bits_weight, recipe.bits_activation
    scales, (before, after) = quietest_scales(model, links, Tensors(largest, reaches), heard, bits, recipe.per_channel)
    journal.note(f"equalization for least noise: foretold at the output {after - before:+.1f} dB")
    return scales


def promised_extremes(statistics: Statistics, sigmas: float) -> Extremes:
    """What BatchNorm statistics promise of the outputs of their layers, to so many deviations."""
    reach = {name: sigmas * known.variance.sqrt() for name, known in statistics.items()}
    return {name: (known.mean - reach[name], known.mean + reach[name]) for name, known in statistics.items()}


def activation_reaches(model: fx.GraphModule, link: Link, extremes: Extremes) -> Tensor | None:
    """The largest absolute value [tensors, C] of each channel of a link's activations, where it is known: behind
    each producer's activation, and of their sum where adds tie several."""
    if any(name not in extremes for name in link.producers):
        return None
    reaches = []
    for name in link.producers:
        low, high = extremes[name]
        reaches.append(high.clamp_min(0) if link.rectified else torch.maximum(low.abs(), high.abs()))
    together = torch.stack(reaches)
    if link.tied:  # as of independent terms
        together = torch.cat([together, together.square().sum(0, keepdim=True).sqrt()])
    for port in link.clips:
        together = torch.minimum(together, _caps(model.get_submodule(port.name), port, link.channels))
    return together


def nearest(ways: dict[str, Callable[..., Quantized]], readers: set[str], rounds: int = 6) -> Quantized:
    """Of several equalizations the one whose quantized output on distilled images is nearest to the float one's.

    ways: by description, what quantizes after one, given the layers to leave out; the first is without any. The
    best of them is tried again without the layer that it harms most, as long as that helps: one reader of
    unlike branches can lose what all other layers win.
    """
    tried = {name: way() for name, way in ways.items()}
    none, *others = ways
    best = max(others, key=lambda name: tried[name].fidelity.output)
    before, current, without = tried[none].fidelity.layers, tried[best].fidelity, frozenset()
    for _ in range(min(rounds, len(readers))):
        harmed = min(readers - without, key=lambda name: current.layers[name] - before[name])
        without |= {harmed}
        name = f"{best}, without {', '.join(sorted(without))}"
        tried[name] = ways[best](without=without)
        if tried[name].fidelity.output <= current.output:
            break
        current = tried[name].fidelity
    chosen = max(tried, key=lambda name: tried[name].fidelity.output)
    shown = ", ".join(f"{name} {quantized.fidelity.output:.2f} dB" for name, quantized in tried.items())
    tried[chosen].journal.note(f"equalization: {chosen}, the nearest on distilled images ({shown})")
    return tried[chosen]


def apply_scale(model: fx.GraphModule, link: Link, scale: Tensor, statistics: Statistics) -> None:
    """Divide the producer's channels by scale [C], multiply the readers' columns, scale what lies between."""
    for name in link.producers:
        scale_outputs(model.get_submodule(name), 1 / scale)
        known = statistics.get(name)
        if known is not None:
            statistics[name] = Gaussian(known.mean / scale, known.variance / scale**2)
    for port in link.readers:
        layer = model.get_submodule(port.name)
        scale_inputs(layer, port.across(channels_in(layer), scale, elsewhere=1))
    for port in link.clips:
        _scale_caps(model, port, 1 / scale)


def _input_range(maxima: Tensor, port: Port, channels: int) -> Tensor:
    """r(W)_i over the columns that read each of a producer's channels."""
    return maxima.amax(1).reshape(-1)[port.columns(channels)].view(channels, port.repeat).amax(1)


def _scale_columns(maxima: Tensor, port: Port, scale: Tensor) -> None:
    factors = port.across(maxima.shape[0] * maxima.shape[2], scale, elsewhere=1)
    maxima *= factors.view(maxima.shape[0], 1, -1)


def _scale_caps(model: fx.GraphModule, port: Port, factor: Tensor) -> None:
    """Scale a clip's caps of one producer's channels; a ReLU6 first becomes a CappedReLU."""
    clip = model.get_submodule(port.name)
    if isinstance(clip, nn.ReLU6):
        node = next(n for n in model.graph.nodes if n.target == port.name)
        clip = CappedReLU(torch.full((shape(node)[1],), 6.0))
        model.set_submodule(port.name, clip)
    clip.cap[port.columns(len(factor))] *= port.spread(factor)


# --------------------------------------------------------------------------------- absorb high biases


def absorb_high_biases(model: fx.GraphModule, statistics: Statistics, journal: Journal) -> None:
    """Move what a channel almost never falls below from its bias to its readers'; section 4.1.3.

    c = max(0, mean - 3 std): relu(x - c) = relu(x) - c for all but 0.1 % of x. Only where every reader
    sees the constant at every tap: zero padding would make the border wrong.
    """
    links, _ = find_links(model)
    for link in links:
        known = statistics.get(link.producer)
        if known is None:
            journal.left("absorbed high biases", link.producer, "no BatchNorm statistics")
        elif not link.rectified:
            journal.left("absorbed high biases", link.producer, "no ReLU on the way to its readers")
        elif not all(port.keeps_constants for port in link.readers):
            journal.left("absorbed high biases", link.producer, "a reader sees zero padding")
        else:
            excess = (known.mean - 3 * known.variance.sqrt()).clamp_min(0)
            for port in link.clips:  # a cap must stay above what was absorbed
                excess = torch.minimum(excess, 0.5 * _caps(model.get_submodule(port.name), port, link.channels))
            if not (excess > 0).any():
                journal.left("absorbed high biases", link.producer, "no channel has a mean above 3 deviations")
                continue
            _move_bias(model, link, excess)
            statistics[link.producer] = Gaussian(known.mean - excess, known.variance)
            journal.did(
                "absorbed high biases",
                link.producer,
                f"{int((excess > 0).sum())} channels, up to {float(excess.max()):.3g}",
            )
    tidy(model)


def _move_bias(model: fx.GraphModule, link: Link, excess: Tensor) -> None:
    model.get_submodule(link.producer).bias.data.sub_(excess)
    for port in link.readers:
        layer = model.get_submodule(port.name)
        layer.bias.data.add_(input_sums(layer, port.across(channels_in(layer), excess, elsewhere=0)))
    for port in link.clips:
        _scale_caps(model, port, torch.ones_like(excess))
        model.get_submodule(port.name).cap[port.columns(link.channels)] -= port.spread(excess)


# ------------------------------------------------------------------------------------- weights


def choose_layers(model: fx.GraphModule, range_of: RangeOf, journal: Journal) -> list[fx.Node]:
    """The layers that an integer engine could run: those whose input can be given a range."""
    chosen = []
    for node in weighted_nodes(model):
        known = range_of(node.args[0])
        if isinstance(known, Unknown):
            journal.left("quantized weights", node.target, f"nothing is known of its input {known.reason}")
        else:
            chosen.append(node)
    if not chosen:
        raise UserError("no layer of the network can be quantized: see the reasons above with --verbose")
    return chosen


def weight_ranges(model: fx.GraphModule) -> dict[str, Tensor]:
    """The lowest and highest weight [C_out, 2] of every channel, by layer."""
    views = {node.target: taps(module_of(model, node)) for node in weighted_nodes(model)}
    return {name: torch.stack([view.amin((2, 3)), view.amax((2, 3))], -1).flatten(0, 1) for name, view in views.items()}


def clip_weights(model: fx.GraphModule, limit: float, journal: Journal) -> None:
    """Cut weights of convolutions and linear layers to [-limit, limit]; changes the network's function."""
    for node in weighted_nodes(model):
        weight = module_of(model, node).weight.data
        beyond = int((weight.abs() > limit).sum())
        if beyond:
            weight.clamp_(-limit, limit)
            journal.did("clipped weights", node.target, f"{beyond} of {weight.numel()}")


def quantize_weights(
    model: fx.GraphModule, nodes: list[fx.Node], recipe: Recipe, journal: Journal
) -> dict[str, QParams]:
    """Round every layer's weights to their grid; returns the grids."""
    grids = {}
    for node in nodes:
        layer = module_of(model, node)
        grids[node.target] = grid = weight_grid(layer, recipe.bits_weight, recipe.per_channel, not recipe.asymmetric)
        quantize_weight(layer, grid)
        journal.did("quantized weights", node.target, f"largest step {float(grid.scale.max()):.3g}")
    return grids


# ------------------------------------------------------------------------------- bias correction


def correct_biases(
    model: fx.GraphModule,
    nodes: list[fx.Node],
    exact: dict[str, Tensor],
    moments: dict[str, Moments | Unknown],
    journal: Journal,
) -> None:
    """Take the mean shift that changed weights cause out of the biases; section 4.2, equation 16.

    E[(W + e) x] - E[W x] = e * E[x], with the mean of x at every position, so that taps over zero padding
    count as zeros at the border. exact: the weights before clipping and rounding, by layer.
    """
    for node in nodes:
        layer = module_of(model, node)
        error = {"weight": layer.weight - exact[node.target], "bias": torch.zeros_like(layer.bias)}
        mean = moments[node.args[0].name].mean.contiguous()
        with torch.no_grad():
            shift = torch.func.functional_call(layer, error, (mean,))
        axis = shift.dim() - 1 if isinstance(layer, nn.Linear) else 1
        shift = shift.transpose(0, axis).flatten(1).mean(1)
        layer.bias.data.sub_(shift)
        journal.did("corrected biases", node.target, f"largest shift {float(shift.abs().max()):.3g}")


def correct_biases_on_images(
    model: fx.GraphModule,
    means: dict[str, Tensor],
    images: Tensor,
    journal: Journal,
    first: Callable[[fx.Node, Tensor], None] | None = None,
) -> None:
    """Take the mean shift of every layer's output on images out of its bias; section 4.2.

    One pass from input to output: a layer is measured behind layers that are quantized and corrected
    already, on all images at once. means: [C] of the float network's outputs, by layer. first: done to a layer
    before it is measured, given what it reads.
    """

    def correct(node: fx.Node, value: Tensor) -> Tensor | None:
        layer = module_of(model, node)
        if not isinstance(layer, WEIGHTED):
            return None
        shift = channel_mean(layer, value) - means[node.target]
        layer.bias.data.sub_(shift)
        journal.did("corrected biases", node.target, f"largest shift {float(shift.abs().max()):.3g}")
        return value - (shift if isinstance(layer, nn.Linear) else per_channel(shift, value.dim()))

    with torch.no_grad():
        Watched(model, correct, first).run(images)


def round_on_images(
    model: fx.GraphModule,
    exact: dict[str, Tensor],
    grids: dict[str, QParams],
    journal: Journal,
    node: fx.Node,
    reads: Tensor,
) -> None:
    """Round one layer's weights again, as what it reads on images lets their errors make up for each other.

    exact: weights before rounding, by layer.
    """
    layer, grid = module_of(model, node), grids.get(node.target)
    if grid is None or not isinstance(layer, nn.Conv2d | nn.Linear):
        journal.left("rounded together", node.target, f"no way for {type(layer).__name__}" if grid else "no grid")
        return
    before, wanted = taps(layer), taps(layer, exact[node.target]).double()
    spread = second_moment(layer, reads)
    rounded = compensated(wanted, spread, grid).view(before.shape)
    errors = [
        ((weights - wanted).flatten(2) @ spread * (weights - wanted).flatten(2)).sum() for weights in (before, rounded)
    ]
    gain = 10 * float((errors[0] / errors[1].clamp_min(1e-30)).clamp_min(1e-30).log10())
    before.copy_(rounded)
    journal.did("rounded together", node.target, f"{gain:.1f} dB less noise than the nearest steps")


def quantize_biases(
    model: fx.GraphModule, weight_grids: dict[str, QParams], bits: int, journal: Journal
) -> dict[str, QParams]:
    """Round the biases: at 32 bits to the grid of the accumulator, weight scale times input scale.

    Where a bias would overflow it, the grid of its weights is made coarser first.
    """
    grids = {}
    for node in weighted_nodes(model):
        if node.target not in weight_grids:
            continue
        layer, source = module_of(model, node), quantizer_before(model, node.args[0])
        if source is None:
            journal.left("quantized biases", node.target, "its input has no quantizer")
            continue
        roomy = leave_room(weight_grids[node.target], layer.bias, source.scale)
        if bits == 32 and not torch.equal(roomy.scale, weight_grids[node.target].scale):
            weight_grids[node.target] = roomy
            quantize_weight(layer, roomy)
            journal.did("made room for biases", node.target, "their weights' grid is coarser")
        grid = bias_grid(layer.bias, bits, weight_grids[node.target].scale * source.scale)
        layer.bias.data.copy_(quantize_bias(layer.bias, grid))
        grids[node.target] = grid
        journal.did("quantized biases", node.target)
    return grids


# ----------------------------------------------------------------------------------- activations

RangeOf = Callable[[fx.Node], tuple[float, float] | Unknown]  # what a node's output is taken to lie in


def analytic_ranges(moments: dict[str, Moments | Unknown]) -> RangeOf:
    """Ranges that follow from BatchNorm statistics."""

    def range_of(node: fx.Node) -> tuple[float, float] | Unknown:
        known = moments.get(node.name, Unknown("here"))
        return known if isinstance(known, Unknown) else known.range()

    return range_of


def distilled_ranges(network: fx.GraphModule, spec: InputSpec, images: Tensor, recipe: Recipe) -> RangeOf:
    """Ranges of what the float network does on images, by the recipe's method; the input's are its pixels'."""
    seen = histograms(network, images)

    @cache
    def range_of(node: fx.Node) -> tuple[float, float] | Unknown:
        if node.op == "placeholder":
            return spec.range()
        if node.name not in seen:
            return Unknown("here")
        return seen[node.name].range(recipe.range_method, recipe.bits_activation)

    return range_of


def compare_ranges(
    model: fx.GraphModule, seen: RangeOf, promised: RangeOf, journal: Journal, factor: float = CONTRADICTED
) -> None:
    """Note which tensors do on images something else than BatchNorm statistics say: one of the two is wrong."""
    strange = {}
    for node in filter(partial(_writes_tensor, model), model.graph.nodes):
        pair = seen(node), promised(node)
        if any(isinstance(known, Unknown) for known in pair):
            continue
        ratio = (pair[0][1] - pair[0][0]) / max(pair[1][1] - pair[1][0], 1e-30)
        if not 1 / factor < ratio < factor:
            strange[node.name] = ratio
    if strange:
        worst = sorted(strange.items(), key=lambda item: -abs(math.log(max(item[1], 1e-30))))[:3]
        named = ", ".join(f"{name} {ratio:.2g} times" for name, ratio in worst)
        journal.note(
            f"on distilled images {len(strange)} ranges are over {factor:g} times as wide as statistics promise, or as narrow: {named}"
        )


def insert_quantizers(model: fx.GraphModule, range_of: RangeOf, bits: int, journal: Journal) -> None:
    """Put a quantizer wherever an integer engine writes a tensor.

    That is: the network's input, a layer's output behind its ReLU or ReLU6, sums, products and other
    functions, average pooling and interpolation. What only moves values keeps its input's grid. The
    inputs of a concat share one grid if nothing else reads them; otherwise its output is quantized. The
    network's output is left as it is where that costs an engine nothing: linear layers, interpolation.
    """
    ranges = {}
    for node in model.graph.nodes:
        if not _writes_tensor(model, node):
            continue
        known = range_of(node)
        if isinstance(known, Unknown):
            journal.left("inserted quantizers", node.name, f"nothing is known {known.reason}")
        else:
            ranges[node] = known
    for node in model.graph.nodes:
        if node.target is torch.cat and not isinstance(together := range_of(node), Unknown):
            sources = {source for part in node.args[0] for source in grid_sources(model, part)}
            if all(source in ranges and _feeds_only(model, source, node) for source in sources):
                ranges.update(dict.fromkeys(sources, together))
            else:
                ranges[node] = together
    for node, (low, high) in ranges.items():
        quantizer = Quantizer(affine_grid(torch.tensor(low), torch.tensor(high), bits))
        activation = module_of(model, node)
        if isinstance(activation, CLIPS) and quantizer.lowest == 0:
            cap = getattr(activation, "cap", None)
            quantizer = Quantizer(quantizer.grid, None if cap is None or bool((cap >= high).all()) else cap)
            model.set_submodule(node.target, quantizer)
        else:
            insert_module(model, node, f"{node.name}_quantizer", quantizer)
        journal.did("inserted quantizers", node.name, quantizer.extra_repr())
    tidy(model)


def _writes_tensor(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an integer engine writes this node's output on a grid of its own."""
    module = module_of(model, node)
    if node.op in ("output", "get_attr") or not is_tensor(node) or not shape(node) or not node.users:
        return False
    if keeps_grid(model, node) or node.target is torch.cat:
        return False
    readers = [module_of(model, user) for user in node.users]
    if len(readers) == 1 and isinstance(readers[0], CLIPS):
        return False  # one kernel with its activation
    only_output = all(user.op == "output" for user in node.users)
    if only_output and isinstance(module, nn.Linear):
        return False  # an integer engine hands out its accumulator, scaled
    interpolates = isinstance(module, nn.Upsample | nn.UpsamplingBilinear2d) or node.target is F.interpolate
    return not (interpolates and only_output)  # nothing computes with it any more


def _feeds_only(model: fx.GraphModule, node: fx.Node, concat: fx.Node) -> bool:
    """Whether every reader of a value, past whatever only moves it, is this concat."""
    return all(user is concat or (keeps_grid(model, user) and _feeds_only(model, user, concat)) for user in node.users)


# ------------------------------------------------------------------------------------ simulation


def to_evaluate(loaded: nn.Module, quantized: Quantized, recipe: Recipe) -> dict[str, nn.Module]:
    """The networks of a row, the loaded one first, by the names of Recipe.labels; in the form that runs fastest."""
    networks = {"fp32_original": loaded}
    if recipe.changes_float or quantized.simulated is None:
        networks["fp32"] = quantized.float
    if quantized.simulated is not None:
        networks["quantized"] = fold_scales(quantized.simulated, quantized.weight_grids, quantized.bias_grids)
    return networks
