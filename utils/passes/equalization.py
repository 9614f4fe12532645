"""Cross-layer equalization: channels are rescaled between layers, by scales that make their weight ranges equal.

Section 4.1 of the paper. Exact: positive factors pass through ReLU, pooling, padding and concats, and a ReLU6
gets bounds of its own for every channel.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from utils.calibration.moments import Gaussian, Statistics
from utils.calibration.ranges import ChannelRanges
from utils.graph.layers import WEIGHTED, Clip, Elementwise, grouped_weight, identity, scale_inputs, scale_outputs
from utils.graph.nodes import insert_module, module_of, shape, tidy
from utils.graph.ops import operator_of
from utils.graph.regions import ChannelSlice, Region, find_regions
from utils.passes.log import PassLog
from utils.passes.relu6 import channel_reach, scale_bounds

ACTION = "equalized"
GAIN = "gain"  # the kind of a function that only multiplies

# For every region, what its channels [C] are divided by.
ScalesOf = Callable[[fx.GraphModule, list[Region], PassLog], list[Tensor]]


def equalize(
    model: fx.GraphModule,
    statistics: Statistics,
    scales_of: ScalesOf,
    log: PassLog,
    through_sums: bool = False,
    without: frozenset[str] = frozenset(),
) -> Statistics:
    """Rescale channels between every layer and its sinks; returns the statistics, which scale with them.

    through_sums: scale the layers of a residual stream too, all of them by one factor for each channel; the paper
    leaves them as they are. without: layers whose input is left as it is.
    """
    _add_gains(model)
    regions, refused = find_regions(model, through_sums)
    for name, reason in refused.items():
        log.skipped(ACTION, name, reason)
    harmful = [region for region in regions if any(sink.name in without for sink in region.sinks)]
    for name in (name for region in harmful for name in region.sources):
        log.skipped(ACTION, name, "a sink loses by it on distilled images")
    regions = [region for region in regions if region not in harmful]
    for region, scale in zip(regions, scales_of(model, regions, log), strict=True):
        statistics = apply_scale(model, region, scale, statistics)
        sinks = ", ".join(sink.name for sink in (*region.sinks, *region.gains))
        factors = f"factors {float(scale.min()):.3g} to {float(scale.max()):.3g}"
        for name in region.sources:
            log.applied(ACTION, f"{name} -> {sinks}", factors + (", tied by sums" if region.tied else ""))
    _drop_unused_gains(model)
    tidy(model)
    return statistics


def _add_gains(model: fx.GraphModule) -> None:
    """Put a function that does nothing but multiply between a layer, its ReLU included, and the normalisations that read it.

    Engines compute these in float: a scale of the layer's channels can end in front of them, for one more product, so
    that its rounding need not serve channels of unlike range.
    """
    for node in list(model.graph.nodes):
        source = node.args[0] if isinstance(module_of(model, node), Clip) else node
        if not isinstance(module_of(model, source), WEIGHTED):
            continue
        others = [user for user in node.users if not _normalises(user)]
        if len(others) < len(node.users):
            gain = insert_module(model, node, f"{node.name}_gain", Elementwise(identity(), GAIN, homogeneous=False))
            for user in others:
                user.replace_input_with(gain, node)


def _normalises(node: fx.Node) -> bool:
    """Whether all that reads a value, past what only moves it, is a normalisation."""
    row = operator_of(node)
    if row is not None and row.kind == "shape":
        return bool(node.users) and all(_normalises(user) for user in node.users)
    return row is not None and row.kind == "norm"


def _drop_unused_gains(model: fx.GraphModule) -> None:
    for node in list(model.graph.nodes):
        module = module_of(model, node)
        if isinstance(module, Elementwise) and module.kind == GAIN and not module.gain.dim():
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)


def apply_scale(model: fx.GraphModule, region: Region, scale: Tensor, statistics: Statistics) -> Statistics:
    """Divide a region's channels by scale [C] where they are made, multiply by it where they are read."""
    scaled = dict(statistics)
    for name in region.sources:
        scale_outputs(model.get_submodule(name), 1 / scale)
        if name in statistics:
            known = statistics[name]
            scaled[name] = Gaussian(known.mean / scale, known.variance / scale**2)
    for sink in region.sinks:
        layer = model.get_submodule(sink.name)
        scale_inputs(layer, sink.gather(scale, elsewhere=1))
    for clip in region.clips:
        scale_bounds(model, clip, 1 / scale)
    for end in region.gains:
        function = model.get_submodule(end.name)
        function.gain = function.gain * end.gather(scale, elsewhere=1)
    return scaled


# -------------------------------------------------------------------------------------- CLE scales


def equalization_scale(r1: Tensor, r2: Tensor) -> Tensor:
    """s that gives both layers of a pair the same channel ranges; the paper, equation 11.

    r1, r2: [C] ranges of the first layer's outputs and the second's input channels. Dividing the first and
    multiplying the second by s makes both sqrt(r1 r2). A channel with no range on one side keeps s = 1.
    """
    live = (r1 > 0) & (r2 > 0)
    return torch.where(live, (r1 / torch.where(live, r2, torch.ones_like(r2))).sqrt(), torch.ones_like(r1))


def cle_scales(
    model: fx.GraphModule,
    regions: Sequence[Region],
    log: PassLog,
    ranges: ChannelRanges,
    limit: float = 1e4,
    sweeps: int = 100,
) -> list[Tensor]:
    """Scales under which a layer's channels have the weight range of those that read them; section 4.1.

    Sweeps over the network until no factor moves by more than 0.1 %. No factor may stretch
    the range that all channels of an activation share: one of tiny weights and a common bias would, scaled
    up for its weights' sake, leave the others a few steps. Nor may one go beyond limit,
    either way. Works on the kernels' maxima; weights are not touched. ranges: of the layers' outputs.
    """
    names = {name for region in regions for name in (*region.sources, *(sink.name for sink in region.sinks))}
    maxima = {name: _maxima(model, name, ranges) for name in names}  # [groups, out, in]
    totals = [torch.ones(region.channels) for region in regions]
    floors = [_least_scales(model, region, ranges) for region in regions]
    for _ in range(sweeps):
        moved = 0.0
        for region, total, floor in zip(regions, totals, floors, strict=True):
            scale = (total * _pair_scale(region, maxima)).clamp(1 / limit, limit)
            scale = torch.maximum(scale, floor) / total
            total *= scale
            _scale_maxima(region, maxima, scale)
            moved = max(moved, float(scale.log().abs().max()))
        if moved < 1e-3:
            break
    else:
        log.note(f"after {sweeps} sweeps of equalization a factor still moved by {moved:.1%}")
    return totals


def _maxima(model: fx.GraphModule, name: str, ranges: ChannelRanges) -> Tensor:
    """The kernels' maxima of a layer; of a function without weights, how far its channels reach in their place."""
    module = model.get_submodule(name)
    if isinstance(module, WEIGHTED):
        return grouped_weight(module).abs().amax(3)
    known = function_range(model, name, ranges)
    channels = next(shape(node)[1] for node in model.graph.nodes if node.target == name)
    return torch.ones(1, channels, 1) if known is None else torch.maximum(-known[0], known[1]).view(1, -1, 1)


def function_range(model: fx.GraphModule, name: str, ranges: ChannelRanges) -> tuple[Tensor, Tensor] | None:
    """The smallest and largest value [C] of a function of a layer's output, where the layer's range is known."""
    node = next(node for node in model.graph.nodes if node.target == name)
    source = ranges.get(node.args[0].target)
    if source is None:
        return None
    low, high = (end.view(1, -1, *[1] * (len(shape(node)) - 2)) for end in source)
    shares = torch.linspace(0, 1, 65).view(-1, *[1] * (low.dim() - 1))
    values = model.get_submodule(name)(low + shares * (high - low))
    return values.amin(0).flatten(), values.amax(0).flatten()


def _least_scales(model: fx.GraphModule, region: Region, ranges: ChannelRanges) -> Tensor:
    """The least scales [C] that leave a region's activations within their present range, 0 where it is not known."""
    reach = activation_reach(model, region, ranges)
    if reach is None:
        return torch.zeros(region.channels)
    return (reach / reach.amax(1, keepdim=True).clamp_min(1e-30)).amax(0)


def _pair_scale(region: Region, maxima: dict[str, Tensor]) -> Tensor:
    """The scale that makes a region's present ranges equal, over all layers that make and that read its channels."""
    r1 = torch.stack([maxima[name].amax(2).reshape(-1) for name in region.sources]).amax(0)
    if not region.sinks:  # only functions read it, which multiply exactly: all channels get the largest one's range
        return torch.where(r1 > 0, r1 / r1.max().clamp_min(1e-30), torch.ones_like(r1))
    r2 = torch.stack([_input_range(maxima[sink.name], sink, region.channels) for sink in region.sinks]).amax(0)
    return equalization_scale(r1, r2)


def _input_range(maxima: Tensor, sink: ChannelSlice, channels: int) -> Tensor:
    """r(W)_i over the columns that read each of a layer's channels."""
    return sink.reduce(maxima.amax(1).reshape(-1), channels)


def _scale_maxima(region: Region, maxima: dict[str, Tensor], scale: Tensor) -> None:
    """Do to the kernels' maxima [groups, out, in] what a scale does to the kernels."""
    for name in region.sources:
        maxima[name] /= scale.view(maxima[name].shape[0], -1, 1)
    for sink in region.sinks:
        groups = len(maxima[sink.name])
        maxima[sink.name] *= sink.gather(scale, elsewhere=1).view(groups, 1, -1)


def activation_reach(model: fx.GraphModule, region: Region, ranges: ChannelRanges) -> Tensor | None:
    """The largest absolute value [tensors, C] of each channel of a region's activations, where it is known: behind
    the activation of each layer that makes them, and of their sum where adds tie several."""
    known = [
        ranges.get(name) if isinstance(model.get_submodule(name), WEIGHTED) else function_range(model, name, ranges)
        for name in region.sources
    ]
    if any(range_ is None for range_ in known):
        return None
    reaches = []
    for low, high in known:
        reaches.append(high.clamp_min(0) if region.rectified else torch.maximum(low.abs(), high.abs()))
    together = torch.stack(reaches)
    if region.tied:  # as of independent terms
        together = torch.cat([together, together.square().sum(0, keepdim=True).sqrt()])
    for clip in region.clips:
        together = torch.minimum(together, channel_reach(model, clip, region.channels))
    return together
