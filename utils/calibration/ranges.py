"""Ranges to quantize activations to: from BatchNorm statistics, or from what the network does on images."""

import math
from collections.abc import Callable, Iterable
from functools import cache

from torch import Tensor, fx

from utils.calibration.moments import SIGMAS, Moments, Statistics, Unknown
from utils.calibration.observers import histograms
from utils.core.input_spec import InputSpec

CONTRADICTED = 3  # times as wide or as narrow as on images: so far off, a range from BatchNorm is wrong

RangeOf = Callable[[fx.Node], tuple[float, float] | Unknown]  # what a node's output is taken to lie in
ChannelRanges = dict[str, tuple[Tensor, Tensor]]  # by layer or node, the smallest and largest value [C] of its channels


def analytic_ranges(moments: dict[str, Moments | Unknown]) -> RangeOf:
    """Ranges that follow from BatchNorm statistics. moments: by node."""

    def range_of(node: fx.Node) -> tuple[float, float] | Unknown:
        known = moments.get(node.name, Unknown("here"))
        return known if isinstance(known, Unknown) else known.range()

    return range_of


def observed_ranges(
    network: fx.GraphModule, spec: InputSpec, images: Tensor, method: str, bits: int, signed: bool = False
) -> RangeOf:
    """Ranges of what the float network does on images [N, C, H, W]; the input's are its pixels'.

    method: one of utils.calibration.observers.METHODS. bits: of the activations. signed: on a symmetric grid.
    """
    observed = histograms(network, images)

    @cache
    def range_of(node: fx.Node) -> tuple[float, float] | Unknown:
        if node.op == "placeholder":
            return spec.range()
        if node.name not in observed:
            return Unknown("here")
        return observed[node.name].range(method, bits, signed)

    return range_of


def batchnorm_ranges(statistics: Statistics, sigmas: float = SIGMAS) -> ChannelRanges:
    """The ranges from BatchNorm of its layers' output channels, to so many standard deviations; by layer."""
    reach = {name: sigmas * known.variance.sqrt() for name, known in statistics.items()}
    return {name: (known.mean - reach[name], known.mean + reach[name]) for name, known in statistics.items()}


def describe_contradictions(
    nodes: Iterable[fx.Node],
    observed: RangeOf,
    analytic: RangeOf,
    source: str = "distilled images",
    factor: float = CONTRADICTED,
) -> str | None:
    """A line on the nodes whose range on images is far from that from BatchNorm; None without. One of the two is wrong.

    source: what the images are called.
    """
    ratios = width_ratios(nodes, observed, analytic, factor)
    if not ratios:
        return None
    worst = sorted(ratios.items(), key=lambda item: -abs(math.log(max(item[1], 1e-30))))[:3]
    named = ", ".join(f"{name} {ratio:.2g}" for name, ratio in worst)
    count = "1 range differs" if len(ratios) == 1 else f"{len(ratios)} ranges differ"
    return f"{count} by more than {factor:g} times between {source} and BatchNorm (width on {source} / from BatchNorm: {named})"


def width_ratios(
    nodes: Iterable[fx.Node], observed: RangeOf, analytic: RangeOf, factor: float = CONTRADICTED
) -> dict[str, float]:
    """By node, how many times as wide its range is on images as from BatchNorm; where by over factor, or under 1 / factor."""
    ratios = {}
    for node in nodes:
        pair = observed(node), analytic(node)
        if any(isinstance(known, Unknown) for known in pair):
            continue
        ratio = (pair[0][1] - pair[0][0]) / max(pair[1][1] - pair[1][0], 1e-30)
        if not 1 / factor < ratio < factor:
            ratios[node.name] = ratio
    return ratios
