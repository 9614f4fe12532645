"""How near a quantized network is to its float one, on images without labels."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress

import torch
from torch import Tensor, fx

from utils.calibration.observers import BATCH, Observer
from utils.graph.layers import WEIGHTED
from utils.graph.nodes import module_of, outputs_of, returned_nodes
from utils.quantization.quantizer import Quantizer

STEADY = 1e-6  # of an output's largest value: a difference that says nothing
LEAST_SATURATION = 0.01  # percent of a tensor's values, below which a report does not name it


def held_out(images: int, real: bool) -> str:
    """What reports call the images that networks are judged on."""
    return f"{images} held-out images ({'yours' if real else 'distilled'})"


@dataclass(frozen=True)
class Fidelity:
    """How near a quantized network is to its float one, on images without labels.

    output: signal-to-quantization-noise ratio of the outputs that tell images apart, in dB. layers: that ratio of each layer's output.
    saturation: percent of each quantized tensor's float values that lie beyond its range, and are cut to it: decibels
    hide how many they are.
    """

    output: float
    layers: dict[str, float]
    saturation: dict[str, float] = field(default_factory=dict)

    def report(self, images: int, verbose: bool, real: bool = False, count: int = 3) -> str:
        """A few lines: the layers that lose most; or all layers. images: how many. real: whether they are the user's."""
        worst = sorted(self.layers.items(), key=lambda layer: layer[1])
        lines = [
            f"  on {held_out(images, real)}: output {self.output:.1f} dB over its quantization noise",
            "  noisiest layers: " + ", ".join(f"{name} {value:.1f} dB" for name, value in worst[:count]),
        ]
        if cut := sorted(
            (name for name in self.saturation if self.saturation[name] >= LEAST_SATURATION), key=self._clipped
        ):
            most = ", ".join(f"{name} {self.saturation[name]:.2g} %" for name in cut[:count])
            lines.append(
                f"  values beyond their range, and cut, at {len(cut)} of {len(self.saturation)} tensors: {most}"
            )
        if verbose:
            lines += [f"  {value:6.1f} dB  {name}" for name, value in self.layers.items()]
        return "\n".join(lines)

    def _clipped(self, name: str) -> float:
        return -self.saturation[name]


class Ratio:
    """Signal and noise power of an output, or of several, summed up over batches."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self.count = 0

    def add(self, reference: Tensor, noisy: Tensor) -> None:
        self.signal += float(reference.double().square().sum())
        self.noise += float((reference.double() - noisy.double()).square().sum())
        self.count += reference.numel()

    def decibels(self) -> float:
        return 10 * float(torch.tensor(max(self.signal, 1e-30) / max(self.noise, 1e-30)).log10())

    def share_beside(self, others: "Ratio") -> float:
        """What an output that tells nothing adds to the noise of others, as a share of their power: nothing where it is exact,
        1 at most. Where it is silent, all that it says is noise, on the scale of the others."""
        scale = others.signal * self.count / max(others.count, 1)
        return min(1.0, self.noise / (self.signal or scale or 1e-30))


def _together(outputs: Sequence[Ratio], telling: Sequence[bool]) -> Ratio:
    """The ratio of all outputs: that of those that tell images apart, and beside them what others move."""
    whole = Ratio()
    for output in compress(outputs, telling):
        whole.signal, whole.noise = whole.signal + output.signal, whole.noise + output.noise
        whole.count += output.count
    shares = [output.share_beside(whole) for output, tells in zip(outputs, telling, strict=True) if not tells]
    whole.noise += sum(shares) * whole.signal
    return whole


def comparable(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both in double precision, with 0 where both have the same infinity: places that are masked."""
    one, other = one.double(), other.double()
    masked = one.isinf() & (one == other)
    return one.masked_fill(masked, 0), other.masked_fill(masked, 0)


def telling_outputs(network: fx.GraphModule, images: Tensor) -> list[bool]:
    """Of every output whether it tells images [N, C, H, W] apart; anchors do not, and would flatter what they stand beside.

    Of one output alone, and where none does, all count.
    """
    told = [False] * len(returned_nodes(network))
    if len(told) == 1:
        return [True]
    shown, others = (some.split(network.meta["batch"] or BATCH) for some in (images, images.roll(1, 0)))
    for pair in zip(shown, others, strict=True):
        with torch.inference_mode():
            outputs = zip(*(outputs_of(network(some)) for some in pair), strict=True)
            told = [known or _differ(before, after) for known, (before, after) in zip(told, outputs, strict=True)]
        if all(told):
            break
    return told if any(told) else [True] * len(told)


def _differ(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.numel():
        return one.shape != other.shape
    one, other = comparable(one, other)
    return not bool(((one - other).abs() <= STEADY * one.abs().max()).all())


def fidelity(reference: fx.GraphModule, quantized: fx.GraphModule, images: Tensor) -> Fidelity:
    """Compare two networks with the same layers on images [N, C, H, W]."""
    layers: dict[str, Ratio] = {}
    telling = telling_outputs(reference, images)
    outputs = [Ratio() for _ in telling]
    kept: dict[str, Tensor] = {}
    ranges = _quantized_ranges(reference, quantized)
    beyond: dict[str, list[int]] = {name: [0, 0] for name in ranges}  # values that are cut, of how many

    def keep(node: fx.Node, value: Tensor) -> None:
        if node.name in ranges:
            low, high = ranges[node.name]
            beyond[node.name][0] += int(((value < low) | (value > high)).sum())
            beyond[node.name][1] += value.numel()
        if isinstance(module_of(reference, node), WEIGHTED):
            kept[node.target] = value.clone()

    def compare(node: fx.Node, value: Tensor) -> None:
        if node.target in kept:
            layers.setdefault(node.target, Ratio()).add(kept.pop(node.target), value)

    with torch.inference_mode():
        for some in images.split(reference.meta["batch"] or BATCH):
            expected, found = (
                outputs_of(Observer(model, see).run(some)) for model, see in ((reference, keep), (quantized, compare))
            )
            for output, before, after in zip(outputs, expected, found, strict=True):
                output.add(*comparable(before, after))
    saturation = {name: 100 * cut / count for name, (cut, count) in beyond.items() if count}
    output = _together(outputs, telling).decibels()
    return Fidelity(output, {name: ratio.decibels() for name, ratio in layers.items()}, saturation)


def _quantized_ranges(reference: fx.GraphModule, quantized: fx.GraphModule) -> dict[str, tuple[float, float]]:
    """Between which values every quantizer rounds without cutting, by the float network's node that it stands for."""
    there, ranges = {node.name for node in reference.graph.nodes}, {}
    for node in quantized.graph.nodes:
        quantizer = module_of(quantized, node)
        if isinstance(quantizer, Quantizer):
            name = node.name if node.name in there else node.args[0].name  # in the place of its activation, or behind
            ranges[name] = tuple(
                quantizer.scale * step for step in (quantizer.step_min - 0.5, quantizer.step_max + 0.5)
            )
    return ranges
