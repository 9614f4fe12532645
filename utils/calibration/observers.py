"""What a network's activations do on images: their ranges, their means, and how far quantization moves them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from utils.graph.capture import module_of
from utils.graph.layers import WEIGHTED

BATCH = 16  # images that run at once; on every network's activations at full size, a few hundred megabytes
BINS = 2048
METHODS = ("minmax", "percentile", "mse")


class Watched(fx.Interpreter):
    """Runs a network and shows every node's output to `see` before anything can overwrite it.

    see: may return what to go on with instead. before: is shown what a layer with weights is about to read.
    """

    def __init__(
        self,
        model: fx.GraphModule,
        see: Callable[[fx.Node, Tensor], Tensor | None],
        before: Callable[[fx.Node, Tensor], None] | None = None,
    ):
        super().__init__(model)
        self.see, self.before = see, before

    def run_node(self, node: fx.Node) -> object:
        if self.before and isinstance(module_of(self.module, node), WEIGHTED):
            self.before(node, self.env[node.args[0]])
        result = super().run_node(node)
        if not isinstance(result, Tensor) or not result.is_floating_point() or node.op == "output":
            return result
        replaced = self.see(node, result)
        return result if replaced is None else replaced


def watch(model: fx.GraphModule, images: Tensor, see: Callable[[fx.Node, Tensor], None]) -> None:
    """Show `see` every node's output on the images [N, C, H, W], BATCH of them at a time."""
    interpreter = Watched(model, see)
    with torch.inference_mode():
        for some in images.split(BATCH):
            interpreter.run(some)


# ---------------------------------------------------------------------------------------- ranges


@dataclass(frozen=True)
class Histogram:
    """counts: [BINS] of values in equal bins from low to high, the extremes that were seen."""

    low: float
    high: float
    counts: Tensor

    def range(self, method: str, bits: int) -> tuple[float, float]:
        """The range to quantize to, by one of METHODS."""
        return {"minmax": self._whole, "percentile": self._percentile, "mse": self._least_error}[method](bits)

    def _whole(self, bits: int) -> tuple[float, float]:
        return self.low, self.high

    def _percentile(self, bits: int, outside: float = 1e-5) -> tuple[float, float]:
        """All values but a share of 1e-5 at either end."""
        share = self.counts.cumsum(0) / self.counts.sum()
        edges = torch.linspace(self.low, self.high, len(self.counts) + 1, dtype=torch.double)
        first = int(torch.searchsorted(share, outside))
        last = int(torch.searchsorted(share, 1 - outside)) + 1
        return float(edges[first]), float(edges[min(last, len(self.counts))])

    def _least_error(self, bits: int) -> tuple[float, float]:
        """The range whose grid rounds and clips the values with the least mean squared error.

        Either end is shortened by sixths of an octave, to a 64th; a grid holds 0, so that ends stop there.
        """
        centres = torch.linspace(self.low, self.high, 2 * len(self.counts) + 1, dtype=torch.double)[1::2]
        shares = torch.logspace(0, -6, 37, base=2, dtype=torch.double)
        ends = (end * shares if end else torch.zeros(1).double() for end in (min(self.low, 0.0), max(self.high, 0.0)))
        candidates = torch.cartesian_prod(*ends)
        errors = _grid_error(centres, self.counts, *candidates.T[:, :, None], bits)
        return tuple(candidates[errors.argmin()].tolist())


def _grid_error(values: Tensor, counts: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Squared errors [K] of K grids over [low, high] ([K, 1]) on values [B] that occur so often."""
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-30)
    zero = (-low / step).round()
    quantized = ((values / step).round() + zero).clamp(0, 2**bits - 1) - zero
    return ((quantized * step - values).square() * counts).sum(1)


def histograms(model: fx.GraphModule, images: Tensor) -> dict[str, Histogram]:
    """Of every node's output on the images, by the node's name: one reading for the extremes, one to count."""
    extremes: dict[str, tuple[float, float]] = {}
    counts: dict[str, Tensor] = {}

    def widen(node: fx.Node, value: Tensor) -> None:
        low, high = (float(end) for end in torch.aminmax(value))
        known = extremes.get(node.name, (low, high))
        extremes[node.name] = min(low, known[0]), max(high, known[1])

    def count(node: fx.Node, value: Tensor) -> None:
        low, high = extremes[node.name]
        found = torch.histc(value, BINS, low, high) if high > low else torch.full((BINS,), value.numel() / BINS)
        counts[node.name] = counts.get(node.name, 0) + found.double().cpu()

    for see in (widen, count):
        watch(model, images, see)
    return {name: Histogram(*extremes[name], counts[name]) for name in extremes}


def channel_extremes(model: fx.GraphModule, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Lowest and highest value [C] of the channels of every node's output [N, C, ...] on the images, by the node's name."""
    extremes: dict[str, tuple[Tensor, Tensor]] = {}

    def see(node: fx.Node, value: Tensor) -> None:
        if value.dim() > 1:
            low, high = value.transpose(0, 1).flatten(1).aminmax(dim=1)
            known = extremes.get(node.name, (low, high))
            extremes[node.name] = torch.minimum(low, known[0]), torch.maximum(high, known[1])

    watch(model, images, see)
    return {name: (low.clone(), high.clone()) for name, (low, high) in extremes.items()}


# ----------------------------------------------------------------------------------------- means


def channel_mean(layer: nn.Module, value: Tensor) -> Tensor:
    """[C] of a layer's output [N, C, ...], or [N, ..., C] of a linear layer's."""
    return _channels_last(layer, value).flatten(0, -2).mean(0)


def _channels_last(layer: nn.Module, value: Tensor) -> Tensor:
    return value if isinstance(layer, nn.Linear) else value.movedim(1, -1)


def layer_means(model: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Mean [C] of every layer's output on the images, by the layer's name."""
    sums: dict[str, Tensor] = {}

    def see(node: fx.Node, value: Tensor) -> None:
        layer = module_of(model, node)
        if isinstance(layer, WEIGHTED):
            sums[node.target] = sums.get(node.target, 0) + len(value) * channel_mean(layer, value).double()

    watch(model, images, see)
    return {name: (total / len(images)).float() for name, total in sums.items()}


def input_means(model: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Mean [C_in] of what every layer reads on the images, by the layer's name."""
    sums: dict[str, Tensor] = {}

    def see(node: fx.Node, value: Tensor) -> None:
        for user in node.users:
            layer = module_of(model, user)
            if isinstance(layer, WEIGHTED):
                sums[user.target] = sums.get(user.target, 0) + len(value) * channel_mean(layer, value)

    watch(model, images, see)
    return {name: (total / len(images)).clone() for name, total in sums.items()}


# -------------------------------------------------------------------------------------- fidelity


@dataclass(frozen=True)
class Fidelity:
    """How near a quantized network is to its float one, on images without labels.

    output: signal-to-quantization-noise ratio of the network's outputs, in dB. layers: that ratio of each layer's
    output.
    """

    output: float
    layers: dict[str, float]

    def report(self, images: int, verbose: bool, count: int = 3) -> str:
        """A few lines: of how many images, the layers that lose most; or all layers."""
        worst = sorted(self.layers.items(), key=lambda layer: layer[1])
        lines = [
            f"  on {images} distilled images: output {self.output:.1f} dB over its quantization noise",
            "  noisiest layers: " + ", ".join(f"{name} {value:.1f} dB" for name, value in worst[:count]),
        ]
        if verbose:
            lines += [f"  {value:6.1f} dB  {name}" for name, value in self.layers.items()]
        return "\n".join(lines)


class _Ratio:
    """Signal and noise power, summed up over batches."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, reference: Tensor, noisy: Tensor) -> None:
        self.signal += float(reference.double().square().sum())
        self.noise += float((reference.double() - noisy.double()).square().sum())

    def decibels(self) -> float:
        return 10 * float(torch.tensor(max(self.signal, 1e-30) / max(self.noise, 1e-30)).log10())


def fidelity(reference: fx.GraphModule, quantized: fx.GraphModule, images: Tensor) -> Fidelity:
    """Compare two networks with the same layers on images [N, C, H, W]."""
    layers: dict[str, _Ratio] = {}
    output = _Ratio()
    kept: dict[str, Tensor] = {}

    def keep(node: fx.Node, value: Tensor) -> None:
        if isinstance(module_of(reference, node), WEIGHTED):
            kept[node.target] = value.clone()

    def compare(node: fx.Node, value: Tensor) -> None:
        if node.target in kept:
            layers.setdefault(node.target, _Ratio()).add(kept.pop(node.target), value)

    with torch.inference_mode():
        for some in images.split(BATCH):
            expected, seen = (
                _outputs(Watched(model, see).run(some)) for model, see in ((reference, keep), (quantized, compare))
            )
            for before, after in zip(expected, seen, strict=True):
                output.add(before, after)
    return Fidelity(output.decibels(), {name: ratio.decibels() for name, ratio in layers.items()})


def _outputs(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]
