"""How near a quantized network is to its float one, on images without labels."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from utils.calibration.observers import BATCH, Observer
from utils.graph.layers import WEIGHTED
from utils.graph.nodes import module_of


@dataclass(frozen=True)
class Fidelity:
    """How near a quantized network is to its float one, on images without labels.

    output: signal-to-quantization-noise ratio of the network's outputs, in dB. layers: that ratio of each layer's output.
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
            expected, found = (
                _outputs(Observer(model, see).run(some)) for model, see in ((reference, keep), (quantized, compare))
            )
            for before, after in zip(expected, found, strict=True):
                output.add(before, after)
    return Fidelity(output.decibels(), {name: ratio.decibels() for name, ratio in layers.items()})


def _outputs(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]
