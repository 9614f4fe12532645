"""Whether an INT8 engine computes what the simulation says.

Integers make the comparison sharp. Over a whole network single steps add up, so layers are compared
alone: each gets the engine's own input, and its output must be the engine's. Floats and integers round
a value that lies halfway between two steps to one or the other; elsewhere they must agree.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from utils.core.errors import UserError
from utils.core.predictions import Agreement, Predictions, channel_predictions
from utils.graph.layers import WEIGHTED, grouped_weight, per_channel
from utils.graph.nodes import as_returned, module_of, outputs_of
from utils.quantization.quantizer import Quantizer

# Steps from halfway within which both neighbours are right. Float32 strays by 0.0003, or by its resolution where
# the terms of a layer are far larger than their sum.
TIE = 0.01
SHARE = 200e-6  # of a layer's values may be one step off elsewhere
OUTPUT_STEPS = 0.1  # by which an output that is not quantized may differ, in steps of 1/255 of its range
AGREEMENT = 0.99  # of all predictions on evaluation images must be the same


def integers_of(node: fx.Node, quantizer: Quantizer) -> str:
    """The name of the tensor of integers that a quantizer's node has become."""
    return f"{node.name}_{'int8' if quantizer.qparams.quant_min < 0 else 'uint8'}"


@dataclass
class LayerParity:
    """One layer alone: its values, how many are ties that went the other way, one step off, or further off."""

    name: str
    values: int = 0
    ties: int = 0
    off: int = 0
    far: int = 0

    def failed(self, far: float = 0.0) -> bool:
        """far: the share of values that may be further off than a step."""
        return self.far > far * self.values or self.off > SHARE * self.values


@dataclass
class Parity:
    """Engine against simulation over some images.

    layers: each alone, in the order in which they run. agreement: share of equal predictions of the whole
    networks. mean_steps, max_steps: by how much their outputs differ, in steps of 1/255 of their range.
    """

    layers: list[LayerParity]
    agreement: float
    mean_steps: float
    max_steps: float

    @property
    def first_parting(self) -> LayerParity | None:
        """Where the whole networks part: up to there, a layer alone has the input that it has in both."""
        return next((layer for layer in self.layers if layer.ties or layer.off or layer.far), None)

    def check(self, far: float = 0.0, remedy: str = "") -> None:
        """Refuse an engine that rounds a layer otherwise than the simulation does.

        far: the share of a layer's values that may be further off than a step. remedy: what to try.
        """
        for layer in self.layers:
            if layer.failed(far):
                further = f"{far * 1e6:.0f}" if far else "none"
                raise UserError(
                    f"the engine and the simulation disagree at {layer.name!r}: of {layer.values} values {layer.off} "
                    f"are one step off and {layer.far} further, where {SHARE * 1e6:.0f} in a million and {further} are "
                    f"allowed; nothing was exported{remedy}"
                )

    def __str__(self) -> str:
        first, worst = self.first_parting, max(self.layers, key=lambda layer: layer.ties / layer.values)
        parted = f"first at {first.name}" if first else "nowhere"
        return (
            f"engine against simulation: top-1 agreement {100 * self.agreement:.2f} %, outputs apart by "
            f"{self.mean_steps:.2f} steps (at most {self.max_steps:.1f}), {parted}; "
            f"a layer alone: rounding ties {1e6 * worst.ties / worst.values:.0f} ppm at most ({worst.name}), "
            f"else one step off {sum(layer.off for layer in self.layers)}, further {sum(layer.far for layer in self.layers)}"
        )


class Remembered(nn.Module):
    """A network that keeps what it last said."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.last = network, None

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        self.last = self.network(images)
        return self.last


class Compared(nn.Module):
    """An engine whose predictions are held against those of a simulation that has just seen the same images.

    first_parting: the layer at which the two are known to part, if any. predictions: what is held against each other.
    """

    def __init__(
        self,
        engine: nn.Module,
        simulation: Remembered,
        first_parting: LayerParity | None,
        predictions: Predictions = channel_predictions,
    ):
        super().__init__()
        self.engine, self.simulation, self.agreement = engine, simulation, Agreement(predictions)
        self.first_parting = first_parting

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = self.engine(images)
        self.agreement.update(found, self.simulation.last)
        return found


def compare(
    simulated: fx.GraphModule,
    engine: Callable[[Tensor], dict[str, Tensor]],
    images: Tensor,
    predictions: Predictions = channel_predictions,
    batch: int = 2,
) -> Parity:
    """Run both on the images.

    engine: gives, by name, the network's outputs first and the integers of all quantizers. predictions: of
    the outputs, for the agreement.
    """
    layers: dict[str, LayerParity] = {}
    agreement, steps = Agreement(predictions), []
    with torch.inference_mode():
        for part in images.split(simulated.meta["batch"] or batch):
            tensors = engine(part)
            outputs = outputs_of(simulated(part))
            if any(output.isnan().any() for output in outputs):
                raise UserError(
                    "the quantized network gives values that are no numbers (NaN), so that no engine can be held to it; "
                    "nothing was exported"
                )
            found = list(tensors.values())[: len(outputs)]
            agreement.update(as_returned(found), as_returned(outputs))
            steps.append(torch.cat([_output_steps(*pair).flatten() for pair in zip(found, outputs, strict=True)]))
            _Alone(simulated, tensors, layers).run(part)
    steps = torch.cat(steps)
    return Parity(list(layers.values()), agreement.share, float(steps.mean()), float(steps.max()))


class _Alone(fx.Interpreter):
    """Runs the simulation with every quantizer's output replaced by the engine's, once compared."""

    def __init__(self, simulated: fx.GraphModule, tensors: dict[str, Tensor], layers: dict[str, LayerParity]):
        super().__init__(simulated)
        self.tensors, self.layers = tensors, layers
        self.reach: dict[fx.Node, float] = {}  # how large the terms of a value can be: float32 rounds it by their size

    def run_node(self, node: fx.Node) -> Tensor:
        module = module_of(self.module, node)
        if isinstance(module, Quantizer):
            return self._compare(node, module)
        if isinstance(module, WEIGHTED):
            terms = (
                grouped_weight(module).abs().sum((2, 3)).flatten() * self.env[node.args[0]].abs().max()
                + module.bias.abs()
            )
            self.reach[node] = float(terms.max())
        else:  # the mean of large values that cancel is as uncertain as they are
            self.reach[node] = max((self._size(source) for source in node.all_input_nodes), default=0)
        return super().run_node(node)

    def _size(self, node: fx.Node) -> float:
        value = self.env[node]
        counts = isinstance(value, Tensor) and value.is_floating_point() and value.numel()
        return max(float(value.abs().max()) if counts else 0, self.reach.get(node, 0))

    def _compare(self, node: fx.Node, quantizer: Quantizer) -> Tensor:
        """The engine's output of a quantizer, held against what the simulation makes of the engine's input."""
        source = node.args[0]
        top = quantizer.step_max if quantizer.cap is None else per_channel(quantizer.cap, self.env[source].dim())
        exact = (self.env[source].double() / quantizer.scale).clamp(min=quantizer.step_min)  # a copy, to be kept:
        expected = (super().run_node(node) / quantizer.scale).round()  # this may overwrite its input
        found = self.tensors[integers_of(node, quantizer)].float() - quantizer.zero_point
        slack = max(TIE, self.reach.get(source, 0) * torch.finfo(torch.float32).eps / quantizer.scale)
        right = (found - exact.minimum(torch.as_tensor(top))).abs() <= 0.5 + slack
        apart = (found - expected).abs()

        layer = self._layer(source.target if source.op == "call_module" else source.name)
        layer.values += apart.numel()
        layer.ties += int(((apart > 0) & right).sum())
        layer.off += int(((apart == 1) & ~right).sum())
        layer.far += int(((apart > 1) & ~right).sum())
        return found * quantizer.scale

    def output(self, target, args, kwargs):
        for i, (result, found) in enumerate(zip(outputs_of(args[0]), self.tensors.values(), strict=False)):
            layer = self._layer(f"output {i}")
            layer.values += result.numel()
            layer.far += int((~(_output_steps(found, result) <= OUTPUT_STEPS)).sum())
        return super().output(target, args, kwargs)

    def _layer(self, name: str) -> LayerParity:
        return self.layers.setdefault(name, LayerParity(name))


def _output_steps(found: Tensor, expected: Tensor) -> Tensor:
    """By how many steps of 1/255 of the output's range the engine's differs."""
    finite = expected[expected.isfinite()]
    step = (finite.max() - finite.min()).clamp_min(torch.finfo(torch.float32).tiny) / 255 if len(finite) else 1
    return torch.where(found == expected, 0, (found - expected).abs() / step)  # infinities may be equal
