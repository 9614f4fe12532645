"""Which range a tensor gets, where BatchNorm statistics and images both say something, or neither says enough.

A range from statistics knows nothing of heavy tails; one from a few images is narrower than that from all data; and in
some networks a few positions reach many times further than all others, while the output does not depend on how far. No
width serves all of these, so that the width is measured: a tensor's range is the one whose noise at the network's
output is smallest, or a wider one whose noise does not matter there.
"""

import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from utils.calibration.moments import Unknown
from utils.calibration.observers import channel_mean, joined, layer_means, observe, run_layers
from utils.calibration.ranges import RangeOf
from utils.core.hashing import measured_once
from utils.core.input_spec import InputSpec
from utils.graph.in_place import without_overwriting
from utils.graph.layers import WEIGHTED, Clip, along_outputs
from utils.graph.nodes import is_tensor, module_of, outputs_of
from utils.graph.ops import operator_of
from utils.quantization.qparams import activation_qparams, choose_weight_qparams, round_weight
from utils.quantization.quantizer import Quantizer

Range = tuple[float, float]

MARGIN = math.sqrt(2)  # how much further than a few images all data may reach
FACTORS = (MARGIN, 1.0, 0.5**0.5, 0.5, 0.5**1.5, 0.25)  # of the width of the range that holds all
SLACK = 0.05  # of an even share of the noise that all tensors may have: what a wider range may cost
MEASURED = 4  # images on which widths are measured: there are two runs of half the network for every tensor
PIXELS = MEASURED * 224 * 224  # of them, where images are large
OPEN = 2.0  # the factor of a tensor that only an average stands between and the network's output


# --------------------------------------------------------------------------------------- arithmetic


def combine(first: Range | Unknown, second: Range | Unknown) -> Range | Unknown:
    """The range that holds both, or the one that is known."""
    if isinstance(first, Unknown) or isinstance(second, Unknown):
        return second if isinstance(first, Unknown) else first
    return min(first[0], second[0]), max(first[1], second[1])


def widen(known: Range, factor: float) -> Range:
    """Both ends multiplied, so that 0 stays where it is between them."""
    return known[0] * factor, known[1] * factor


def within(known: Range, bounds: Range | None) -> Range:
    """A range cut to what its values cannot exceed."""
    return known if bounds is None else (max(known[0], bounds[0]), min(known[1], bounds[1]))


def candidates(known: Sequence[Range], bounds: Range | None) -> list[Range]:
    """The ranges that a tensor may get, the widest first: the first of those known, by every factor, and the others."""
    ranges = {within(one, bounds) for one in (*(widen(known[0], factor) for factor in FACTORS), *known[1:])}
    return sorted(ranges, key=_width, reverse=True)


def settled(tried: Sequence[float], slack: float) -> bool:
    """Whether no narrower range is worth a try: the widest adds next to nothing, or twice in a row a narrower one added more.

    tried: what ranges add to the output's power by rounding and clipping, the widest first.
    """
    return tried[0] <= slack or (len(tried) > 2 and tried[-1] > tried[-2] > tried[-3])


def choose_range(noise: Mapping[Range, float], slack: float) -> Range:
    """The widest that adds the least, or up to slack more: a precaution, since a few images do not reach as far as all data.

    noise: by range, the widest first, what it adds.
    """
    least = min(noise.values())
    return next(one for one, added in noise.items() if added <= least + slack)


def _width(known: Range) -> float:
    return known[1] - known[0]


def covering(reach: Tensor, count: int) -> list[int]:
    """Indices of the images that together reach furthest, chosen greedily.

    reach: [ends, images] how far each image reaches at every end of every range, at least 0.
    """
    reach = reach / reach.amax(1, keepdim=True).clamp_min(1e-30)
    held, chosen = torch.zeros(len(reach), 1), []
    for _ in range(min(count, reach.shape[1])):
        gain = (reach - held).clamp_min(0).sum(0)
        gain[chosen] = -1.0
        chosen.append(int(gain.argmax()))
        held = torch.maximum(held, reach[:, chosen[-1], None])
    return chosen


# ----------------------------------------------------------------------------------------- networks


def guessed_tensors(model: fx.GraphModule, statistics: Iterable[str]) -> dict[str, int]:
    """Names of the nodes whose range would follow from layers without BatchNorm, and how many of those are in a row.

    statistics: names of the layers of which a BatchNorm tells.
    """
    known, depth = set(statistics), {}
    for node in model.graph.nodes:
        behind = max((depth.get(source.name, 0) for source in node.all_input_nodes), default=0)
        row = operator_of(node)
        if isinstance(module_of(model, node), WEIGHTED):
            behind = 0 if node.target in known else behind + 1
        elif is_tensor(node) and row is not None and row.moments is None and node.target is not operator.getitem:
            behind += 1  # nothing is known behind it
        if behind:
            depth[node.name] = behind
    return depth


def clip_bounds(model: fx.GraphModule) -> dict[str, Range]:
    """Between which values every clip's output lies, whatever its input; by the node's name."""
    clips = {node.name: module_of(model, node) for node in model.graph.nodes}
    return {name: (float(c.low.min()), float(c.high.max())) for name, c in clips.items() if isinstance(c, Clip)}


def describe_guesses(depths: Mapping[str, int], source: str = "distilled images") -> str:
    """A line on the tensors that no BatchNorm tells of.

    depths: of each, how many such layers in a row are behind it. source: what their ranges are from.
    """
    deepest = max(depths.values())
    named = ", ".join(list(depths)[:5]) + (f" and {len(depths) - 5} more" if len(depths) > 5 else "")
    count = f"{len(depths)} tensor" + ("s have" if len(depths) > 1 else " has")
    row = f", up to {deepest} such layers in a row" if deepest > 1 else ""
    return f"{count} no range from BatchNorm ({named}{row}): from {source} instead"


def extreme_ranges(spec: InputSpec, extremes: Mapping[str, tuple[Tensor, Tensor]]) -> RangeOf:
    """From the smallest to the largest value on images, as image_extremes gives them; the input's are its pixels'."""

    def range_of(node: fx.Node) -> Range | Unknown:
        if node.op == "placeholder":
            return spec.range()
        if node.name not in extremes:
            return Unknown("here")
        low, high = extremes[node.name]
        return float(low.min()), float(high.max())

    return range_of


def guesses_replaced(
    analytic: RangeOf, observed: RangeOf, guessed: Collection[str], bounds: Mapping[str, Range]
) -> RangeOf:
    """Ranges from statistics, but for the guessed nodes those of a few images, MARGIN times and within their bounds."""

    def range_of(node: fx.Node) -> Range | Unknown:
        if node.name not in guessed or isinstance(found := observed(node), Unknown):
            return analytic(node)
        return within(widen(found, MARGIN), bounds.get(node.name))

    return range_of


def starting_ranges(
    nodes: Iterable[fx.Node], analytic: RangeOf, observed: RangeOf, guessed: Collection[str], uncapped: bool
) -> dict[str, tuple[Range, ...]]:
    """The ranges that are known of the nodes, by name, before any is measured; of nodes that images tell of.

    First the one that holds those from BatchNorm and on images, then that from BatchNorm; where no BatchNorm tells, that
    on images alone. uncapped: the network lost its ReLU6, with which it was trained. What BatchNorm tells is of the network
    that had them, and keeps values near what they let through, so that it goes before what images show of the other.
    """
    ranges = {}
    for node in nodes:
        seen, known = observed(node), Unknown("here") if node.name in guessed else analytic(node)
        if node.op == "placeholder" or isinstance(seen, Unknown):
            continue
        if isinstance(known, Unknown):
            ranges[node.name] = (seen,)
        else:
            ranges[node.name] = (known,) if uncapped else (combine(known, seen), known)
    return ranges


def fitted_ranges(fitted: Mapping[str, "Fitted"], observed: RangeOf) -> RangeOf:
    """The fitted ranges, and those on images of nodes that have none."""

    def range_of(node: fx.Node) -> Range | Unknown:
        one = fitted.get(node.name)
        return observed(node) if one is None else (one.low, one.high)

    return range_of


@measured_once
def image_extremes(model: fx.GraphModule, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Smallest and largest value [N] that every node's output has on each of the images, by the node's name.

    A value whose first axis does not hold the images, or parts of them in order, has one pair for all that run together.
    """
    found: dict[str, list[Tensor]] = {}
    count = 1

    def see(node: fx.Node, value: Tensor) -> None:
        nonlocal count
        count = len(value) if node.op == "placeholder" else count
        if value.dim() and value.numel():
            rows = value.reshape(count if len(value) % count == 0 else 1, -1)
            ends = torch.stack(rows.aminmax(dim=1)).cpu()
            found.setdefault(node.name, []).append(ends.expand(2, count))

    observe(model, images, see)
    return {name: tuple(torch.cat(parts, 1).clone()) for name, parts in found.items()}


class Rerun:
    """A network's values on a few images, and what becomes of its outputs when one value is replaced.

    images: [N, C, H, W]; all values of all nodes on them are kept.
    """

    def __init__(self, model: fx.GraphModule, images: Tensor):
        self.model = without_overwriting(model)
        self.parts: list[dict[str, object]] = []  # of as many images as the network takes at a time
        self.runner = fx.Interpreter(self.model, garbage_collect_values=False)
        self.behind: dict[str, list[fx.Node]] = {}
        for part in images.split(model.meta["batch"] or len(images)):
            with torch.inference_mode():
                self.runner.run(part)
            self.parts.append({node.name: value for node, value in self.runner.env.items()})
        tensors = [name for name, value in self.parts[0].items() if isinstance(value, Tensor) and value.dim()]
        self.values = {name: joined([part[name] for part in self.parts]) for name in tensors}
        self.result = self.model.graph.output_node().name
        each = [outputs_of(part[self.result]) for part in self.parts]
        self.outputs = [joined(same) for same in zip(*each, strict=True)]
        self.power = [float(output.double().square().sum().clamp_min(1e-30)) for output in self.outputs]

    def noise(self, name: str, value: Tensor) -> float:
        """The change of the outputs, as a share of each output's power, when a node's value is replaced."""
        values = value.split(len(value) // len(self.parts)) if len(self.parts) > 1 else [value]
        return sum(self._noise(part, {name: own}) for part, own in zip(self.parts, values, strict=True))

    def _noise(self, part: dict[str, object], changed: dict[str, object]) -> float:
        with torch.inference_mode():
            for node in self._behind(*changed):
                sources = node.all_input_nodes
                self.runner.env = {source: changed.get(source.name, part.get(source.name)) for source in sources}
                changed[node.name] = self.runner.run_node(node)
        before, after = outputs_of(part[self.result]), outputs_of(changed.get(self.result, part[self.result]))
        return sum(
            float((own - other).double().square().sum()) / power
            for own, other, power in zip(after, before, self.power, strict=True)
        )

    def _behind(self, name: str) -> list[fx.Node]:
        """The nodes whose values depend on that of one, in order."""
        if name not in self.behind:
            reached = {name}
            for node in self.model.graph.nodes:
                if any(source.name in reached for source in node.all_input_nodes):
                    reached.add(node.name)
            self.behind[name] = [node for node in self.model.graph.nodes if node.name in reached - {name}]
        return self.behind[name]


def weight_noise(model: fx.GraphModule, images: Tensor, bits: int, per_channel: bool, symmetric: bool) -> float:
    """What rounded weights add to the outputs on images [N, C, H, W], as a share of their power.

    With every layer's mean left as it is, as bias correction will.
    """
    rounded, means = without_overwriting(model), layer_means(model, images)

    def run(name: str, layer: nn.Module, value: Tensor) -> Tensor:
        round_weight(layer, choose_weight_qparams(layer, bits, per_channel, symmetric))
        result = layer(value)
        shift = channel_mean(layer, result) - means[name]
        return result - along_outputs(layer, shift, result.dim())

    expected = outputs_of(run_layers(without_overwriting(model), images, lambda _, layer, value: layer(value)))
    pairs = zip(expected, outputs_of(run_layers(rounded, images, run)), strict=True)
    return sum(float((a - b).double().square().sum() / a.double().square().sum().clamp_min(1e-30)) for a, b in pairs)


@dataclass(frozen=True)
class Fitted:
    """The range of a tensor, and by what factor it is wider than the one that was given."""

    low: float
    high: float
    factor: float


def fit_ranges(
    model: fx.GraphModule,
    ranges: Mapping[str, Sequence[Range]],
    images: Tensor,
    bits: int,
    allowed: float,
    open_ended: Collection[str] = (),
    signed: bool = False,
    other_bits: Mapping[str, int] | None = None,
) -> dict[str, Fitted]:
    """Of every tensor the noise-optimal range, or a wider one that costs next to nothing; by the node's name.

    ranges: by node, as starting_ranges gives them. images: [N, C, H, W] on which noise is measured; choose those
    with the extremes, as measuring_images does. bits: of the activations. allowed: noise of all tensors together, as a share
    of the outputs' power, as weight_noise tells of the weights; a wider range may cost SLACK of what one tensor in so many may. open_ended: tensors
    that get OPEN times their range, since what the network hands out must not be cut. signed: on a symmetric grid.
    other_bits: by node, where they are others.
    """
    rerun, fitted, bounds = Rerun(model, images), {}, clip_bounds(model)
    slack = SLACK * allowed / max(1, len(ranges))
    for name, known in ranges.items():
        if name in open_ended:
            fitted[name] = Fitted(*widen(known[0], OPEN), OPEN)
            continue
        noise: dict[Range, float] = {}
        own_bits = (other_bits or {}).get(name, bits)
        for low, high in candidates(known, bounds.get(name)):
            quantizer = Quantizer(activation_qparams(torch.tensor(low), torch.tensor(high), own_bits, signed))
            noise[low, high] = rerun.noise(name, quantizer(rerun.values[name]))
            if settled(list(noise.values()), slack):
                break
        chosen = choose_range(noise, slack)
        fitted[name] = Fitted(*chosen, _width(chosen) / max(_width(within(known[0], bounds.get(name))), 1e-30))
    return fitted


def measuring_images(images: Tensor, extremes: Mapping[str, tuple[Tensor, Tensor]], names: Iterable[str]) -> Tensor:
    """The MEASURED images that hold most of the extremes of the nodes named; fewer where images are large, but two.

    extremes: as image_extremes gives them.
    """
    count = min(MEASURED, max(2, PIXELS // (images.shape[-1] * images.shape[-2])))
    ends = [end.clamp_min(0) for name in names for end in (-extremes[name][0], extremes[name][1])]
    return images[covering(torch.stack(ends), count)]


def describe_fitted(fitted: Mapping[str, Fitted]) -> str:
    """A line on how many ranges were widened and narrowed, and which of them most."""
    wider = sum(one.factor > 1 for one in fitted.values())
    narrowed = sorted((name for name in fitted if fitted[name].factor < 1), key=lambda name: fitted[name].factor)
    text = (
        f"ranges: {wider} of {len(fitted)} wider than statistics and images say, where the output does not depend on it"
    )
    if narrowed:
        worst = ", ".join(f"{name} to {fitted[name].factor:.2g}" for name in narrowed[:3])
        text += f"; {len(narrowed)} narrowed, since rounding at full width costs more than clipping ({worst})"
    return text
