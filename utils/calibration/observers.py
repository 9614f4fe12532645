"""What a network's activations are on images: their histograms, means and extremes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from utils.core.hashing import measured_once
from utils.graph.layers import WEIGHTED
from utils.graph.nodes import module_of

BATCH = 16  # images that run at once; on every network's activations at full size, a few hundred megabytes
BINS = 2048


class Observer(fx.Interpreter):
    """Runs a network and shows every node's output to `see` before anything can overwrite it."""

    def __init__(self, model: fx.GraphModule, see: Callable[[fx.Node, Tensor], None]):
        super().__init__(model)
        self.see = see

    def run_node(self, node: fx.Node) -> object:
        result = super().run_node(node)
        if isinstance(result, Tensor) and result.is_floating_point() and node.op != "output":
            self.see(node, result)
        return result


def observe(model: fx.GraphModule, images: Tensor, see: Callable[[fx.Node, Tensor], None]) -> None:
    """Show `see` every node's output on the images [N, C, H, W], BATCH of them at a time."""
    observer = Observer(model, see)
    with torch.inference_mode():
        for some in images.split(model.meta["batch"] or BATCH):
            observer.run(some)


def run_layers(model: fx.GraphModule, images: Tensor, run_layer: Callable[[str, nn.Module, Tensor], Tensor]) -> object:
    """Run a network on all images, with every layer called by run_layer on all of them at once; returns the network's output.

    run_layer: is given the layer's name, the layer and its input, may change the layer, and returns the layer's output.
    Between layers a network that takes a number of images alone is run on as many at a time.
    """
    parts = images.split(model.meta["batch"] or len(images))
    runs = [fx.Interpreter(model) for _ in parts]
    for run, part in zip(runs, parts, strict=True):
        run.args_iter = iter([part])
    with torch.no_grad():
        for node in model.graph.nodes:
            layer = module_of(model, node)
            if isinstance(layer, WEIGHTED):
                inputs = [run.env[node.args[0]] for run in runs]
                result = run_layer(node.target, layer, joined(inputs))
                values = result.split([len(x) for x in inputs]) if len(runs) > 1 else [result]
            else:
                values = [run.run_node(node) for run in runs]
            for run, value in zip(runs, values, strict=True):
                run.env[node] = value
                for read in run.user_to_last_uses.get(node, ()):
                    del run.env[read]
    return joined(values) if isinstance(values[0], Tensor) else tuple(map(joined, zip(*values, strict=True)))


def joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


# ---------------------------------------------------------------------------------------- ranges


@dataclass(frozen=True)
class Histogram:
    """counts: [BINS] of values in equal bins from low to high, the extremes that were observed."""

    low: float
    high: float
    counts: Tensor

    def range(self, method: str, bits: int, signed: bool = False) -> tuple[float, float]:
        """The range to quantize to, by one of METHODS; signed: with a grid that is symmetric around 0."""
        if method == "mse":
            return self._least_error(bits, signed)
        return {"minmax": self._whole, "percentile": self._percentile}[method]()

    def _whole(self) -> tuple[float, float]:
        return self.low, self.high

    def _percentile(self, outside: float = 1e-5) -> tuple[float, float]:
        """All values but a share of 1e-5 at either end."""
        share = self.counts.cumsum(0) / self.counts.sum()
        edges = torch.linspace(self.low, self.high, len(self.counts) + 1, dtype=torch.double)
        first = int(torch.searchsorted(share, outside))
        last = int(torch.searchsorted(share, 1 - outside)) + 1
        return float(edges[first]), float(edges[min(last, len(self.counts))])

    def _least_error(self, bits: int, signed: bool) -> tuple[float, float]:
        """The range to which rounding and clipping the values makes the least mean squared error.

        Either end is shortened by sixths of an octave, to a 64th; 0 stays within.
        """
        centres = torch.linspace(self.low, self.high, 2 * len(self.counts) + 1, dtype=torch.double)[1::2]
        shares = torch.logspace(0, -6, 37, base=2, dtype=torch.double)
        ends = (end * shares if end else torch.zeros(1).double() for end in (min(self.low, 0.0), max(self.high, 0.0)))
        candidates = torch.cartesian_prod(*ends)
        errors = _rounding_error(centres, self.counts, *candidates.T[:, :, None], bits, signed)
        return tuple(candidates[errors.argmin()].tolist())


def _rounding_error(
    values: Tensor, counts: Tensor, low: Tensor, high: Tensor, bits: int, signed: bool = False
) -> Tensor:
    """Squared errors [K] of rounding to 2^bits steps over K ranges [low, high] ([K, 1]); counts: of each value [B].

    signed: over the symmetric ranges that hold these.
    """
    if signed:
        step = (torch.maximum(-low, high) / (2 ** (bits - 1) - 1)).clamp_min(1e-30)
        zero = 2 ** (bits - 1)
    else:
        step = ((high - low) / (2**bits - 1)).clamp_min(1e-30)
        zero = (-low / step).round()
    quantized = ((values / step).round() + zero).clamp(0, 2**bits - 1) - zero
    return ((quantized * step - values).square() * counts).sum(1)


def histograms(model: fx.GraphModule, images: Tensor) -> dict[str, Histogram]:
    """Of every node's output on the images, by the node's name: one pass for the extremes, one to count."""
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
        observe(model, images, see)
    return {name: Histogram(*extremes[name], counts[name]) for name in extremes}


def channel_extremes(model: fx.GraphModule, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Smallest and largest value [C] of every node's output channels on the images, by the node's name."""
    extremes: dict[str, tuple[Tensor, Tensor]] = {}

    def see(node: fx.Node, value: Tensor) -> None:
        if value.dim() > 1:
            low, high = value.transpose(0, 1).flatten(1).aminmax(dim=1)
            known = extremes.get(node.name, (low, high))
            extremes[node.name] = torch.minimum(low, known[0]), torch.maximum(high, known[1])

    observe(model, images, see)
    return {name: (low.clone(), high.clone()) for name, (low, high) in extremes.items()}


@measured_once
def layer_extremes(model: fx.GraphModule, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Smallest and largest value [C] of every layer's output channels on the images, by the layer's name."""
    extremes: dict[str, tuple[Tensor, Tensor]] = {}

    def see(node: fx.Node, value: Tensor) -> None:
        layer = module_of(model, node)
        if isinstance(layer, WEIGHTED):
            low, high = _channels_last(layer, value).flatten(0, -2).aminmax(dim=0)
            known = extremes.get(node.target, (low, high))
            extremes[node.target] = torch.minimum(low, known[0]), torch.maximum(high, known[1])

    observe(model, images, see)
    return {name: (low.clone(), high.clone()) for name, (low, high) in extremes.items()}


# ----------------------------------------------------------------------------------------- means


def channel_mean(layer: nn.Module, value: Tensor) -> Tensor:
    """[C] of a layer's output [N, C, ...], or [N, ..., C] of a linear layer's."""
    return _channels_last(layer, value).flatten(0, -2).mean(0)


def _channels_last(layer: nn.Module, value: Tensor) -> Tensor:
    return value if isinstance(layer, nn.Linear) else value.movedim(1, -1)


class _Means:
    """Means over values that come in parts of unlike size, by name. A part may hold several rows of an image, as windows do."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def add(self, name: str, rows: int, mean: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + rows * mean
        self.rows[name] = self.rows.get(name, 0) + rows

    def by_name(self) -> dict[str, Tensor]:
        return {name: (total / self.rows[name]).clone() for name, total in self.sums.items()}


def layer_means(model: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Mean [C] of every layer's output on the images, by the layer's name."""
    means = _Means()

    def see(node: fx.Node, value: Tensor) -> None:
        layer = module_of(model, node)
        if isinstance(layer, WEIGHTED):
            means.add(node.target, len(value), channel_mean(layer, value).double())

    observe(model, images, see)
    return {name: mean.float() for name, mean in means.by_name().items()}


def input_means(model: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Mean [C_in] of what every layer reads on the images, by the layer's name."""
    means = _Means()

    def see(node: fx.Node, value: Tensor) -> None:
        for user in node.users:
            layer = module_of(model, user)
            if isinstance(layer, WEIGHTED):
                means.add(user.target, len(value), channel_mean(layer, value))

    observe(model, images, see)
    return means.by_name()
