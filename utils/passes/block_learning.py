"""One block of AdaRound: its rounding variables, scales and biases are learned so that its output stays what it was.

The loss counts an output's channels by how much the network's output depends on them (in the manner of BRECQ, Li et
al., ICLR 2021, arXiv 2102.05426). What a block reads is a random mixture of what the quantized and the float network
hand it, and some of its channels stay unrounded, as in QDrop (Wei et al., ICLR 2022, arXiv 2203.05740).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from utils.graph.layers import WEIGHTED, per_channel
from utils.passes.bit_widths import FULL
from utils.passes.blocks import Part
from utils.passes.soft_rounding import SoftLayer, SoftQuantizer, rounding_penalty, scaled_quantizer
from utils.quantization.quantizer import Quantizer

Values = dict[str, Tensor]  # what is handed on between blocks, [N, ...] by name
POSITIONS = 2**16  # of uncropped maps, in a step at most; 16 maps have as many at 64 a side
State = dict[str, Any]  # what a block comes to: "layers", "quantizers" by name, and the "gain" in dB


@dataclass(frozen=True)
class Reconstruction:
    """How rounding is learned; benchmarks/rounding.py compares the choices.

    iterations: of Adam, for every block. batch: images in each. crop: a larger map is seen through a random square of
    this side. reach: how far Adam can move a rounding variable in all iterations; 5 is from one end to the other.
    scale_reach, bias_reach: the same of the logarithms of scales, and of biases in deviations of the output; their steps
    fall to zero along a cosine. warm: share of the iterations without penalty. penalty: its weight at first, beside an
    error that is 1 at the start; growth: by what it has grown at the end, so that every weight is decided. drop: share
    of what a block reads that is the float network's. trust: how far variables start from the exact weights towards the
    rounded ones. sensitivity: whether channels count by the output's sensitivity.
    """

    iterations: int = 200
    batch: int = 16
    crop: int = 32
    reach: float = 5.0
    scale_reach: float = 0.4
    bias_reach: float = 0.4
    warm: float = 0.2
    penalty: float = 1.0
    growth: float = 1000.0
    drop: float = 0.5
    trust: float = 0.8
    sensitivity: bool = True
    seed: int = 0

    def with_activations_of(self, bits: int) -> "Reconstruction":
        """With fewer than 8 bits of activations the scales of these are most of what is to be learned, and take longer."""
        return self if bits >= FULL else replace(self, iterations=self.iterations * 5 // 2, scale_reach=1.0)


@dataclass(frozen=True)
class Handed:
    """What the float and the quantized network hand a block, on some images."""

    exact: Values
    rounded: Values

    def __len__(self) -> int:
        return len(next(iter(self.exact.values())))


class BlockLearner:
    """Learns one block of a simulated network.

    target, part: the block of the float and of the simulated network. learning, judging: what these hand it, on images to
    learn from and to judge by. weights: by output, [C] by which its channels' errors count, or None. free: the quantizers
    whose scale may be learned. batch: images in a step.
    """

    def __init__(
        self,
        target: Part,
        part: Part,
        learning: Handed,
        judging: Handed,
        weights: Sequence[Tensor | None],
        free: set[str],
        batch: int,
        settings: Reconstruction,
        seed: int,
    ):
        self.target, self.part, self.learning, self.judging = target, part, learning, judging
        self.weights, self.free, self.batch, self.settings = weights, free, batch, settings
        self.generator = torch.Generator().manual_seed(seed)
        self.device = next(iter(learning.exact.values())).device
        self.layers = {
            name: module
            for name, module in part.graph.named_modules()
            if isinstance(module, WEIGHTED) and module.weight_qparams is not None
        }
        self.quantizers = {name: module for name, module in part.graph.named_modules() if isinstance(module, Quantizer)}

    def learn(self, progress: tqdm) -> State:
        """What the block comes to: what was learned, or what it was, where that is nearer on held-out images."""
        old = self.state()
        before = self.judge(self.part.graph)
        learned = self._optimise(progress)
        self.apply(learned)
        after = self.judge(self.part.graph)
        self.apply(old)
        gain = 10 * math.log10(max(before, 1e-30) / max(after, 1e-30))
        return (learned if gain > 0 else old) | {"gain": gain}

    def state(self) -> State:
        layers = {
            name: {"weight": layer.weight.data, "bias": layer.bias.data, "scale": layer.weight_qparams.scale}
            for name, layer in self.layers.items()
        }
        return {
            "layers": {
                name: {key: value.cpu().clone() for key, value in held.items()} for name, held in layers.items()
            },
            "quantizers": dict.fromkeys(self.quantizers, 1.0),
        }

    def apply(self, state: State, *others: fx.GraphModule) -> None:
        """Give the block's layers and quantizers what a state says. others: networks that have the same quantizers."""
        for name, held in state["layers"].items():
            layer = self.layers[name]
            layer.weight.data.copy_(held["weight"])
            layer.bias.data.copy_(held["bias"])
            layer.weight_qparams = replace(layer.weight_qparams, scale=held["scale"])
        for name, factor in state["quantizers"].items():
            changed = self.quantizers[name] if factor == 1 else scaled_quantizer(self.quantizers[name], factor)
            for graph in (self.part.graph, *others):
                graph.set_submodule(name, changed.to(self.device))

    # ------------------------------------------------------------------------------- the optimizer

    def _optimise(self, progress: tqdm) -> State:
        settings, soft = self.settings, self._softened()
        layers = {name: module for name, module in soft.named_modules() if isinstance(module, SoftLayer)}
        quantizers = {name: module for name, module in soft.named_modules() if isinstance(module, SoftQuantizer)}
        groups = [
            ([layer.v for layer in layers.values()], settings.reach, False),
            ([layer.log_scale for layer in layers.values()], settings.scale_reach, True),
            ([layer.bias_shift for layer in layers.values()], settings.bias_reach, True),
            ([one.log_scale for one in quantizers.values() if one.log_scale.requires_grad], settings.scale_reach, True),
        ]
        groups = [group for group in groups if group[0]]
        if groups:
            optimizer = torch.optim.Adam(
                [{"params": params, "lr": reach / settings.iterations} for params, reach, _ in groups]
            )
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, [_cosine(settings.iterations) if falls else _constant for _, _, falls in groups]
            )
            unit = max(float(self._error_on(self.part.graph, *self._draw())), 1e-30)
            for step in range(settings.iterations):
                error = self._step(soft, list(layers.values()), optimizer, unit, step / settings.iterations)
                schedule.step()
                progress.update()
                if step % 10 == 0:
                    progress.set_postfix(loss=f"{error:.3f}")
        hard = {name: layer.hard() for name, layer in layers.items()}
        return {
            "layers": {
                name: {"weight": weight.cpu(), "bias": bias.cpu(), "scale": qparams.scale.cpu()}
                for name, (weight, bias, qparams) in hard.items()
            },
            "quantizers": {name: one.factor for name, one in quantizers.items()},
        }

    def _step(
        self, soft: fx.GraphModule, layers: list[SoftLayer], optimizer: torch.optim.Optimizer, unit: float, part: float
    ) -> float:
        """One step of the optimizer, at that part of all iterations; returns the error, in units of that at the start."""
        settings = self.settings
        with torch.enable_grad():
            error = self._error_on(soft, *self._draw()) / unit
            loss = error
            if part >= settings.warm and layers:
                done = min(1.0, (part - settings.warm) / (0.95 - settings.warm))
                count = sum(layer.v.numel() for layer in layers)
                penalties = [rounding_penalty(layer.h, 20 - 18 * done) * (layer.v.numel() / count) for layer in layers]
                loss = loss + settings.penalty * settings.growth**done * sum(penalties)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        return float(error.detach())

    def _softened(self) -> fx.GraphModule:
        """The part with layers and quantizers that learn."""
        graph = fx.GraphModule(self.part.graph, self.part.graph.graph).eval()
        deviations = self._deviations()
        for name, layer in self.layers.items():
            exact = self.target.graph.get_submodule(name).weight
            graph.set_submodule(name, SoftLayer(layer, exact.data, self.settings.trust, deviations[name]))
        for name, quantizer in self.quantizers.items():
            learn = name in self.free and quantizer.qparams.bits < 8
            graph.set_submodule(name, SoftQuantizer(quantizer, self.settings.drop, learn, self.generator))
        return graph

    def _deviations(self) -> dict[str, Tensor]:
        """The deviation [C] of every layer's output on a batch."""
        seen: dict[str, Tensor] = {}

        def see(name: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            axis = -1 if isinstance(layer, nn.Linear) else 1
            seen[name] = output.movedim(axis, 0).flatten(1).std(1, correction=0) + 1e-6

        handles = [
            layer.register_forward_hook(lambda layer, inputs, output, name=name: see(name, layer, inputs, output))
            for name, layer in self.layers.items()
        ]
        with torch.no_grad():
            self.part.graph(*(self.learning.rounded[name][: self.batch] for name in self.part.inputs))
        for handle in handles:
            handle.remove()
        return seen

    # ----------------------------------------------------------------------------------- on images

    def _draw(self) -> tuple[Values, Values]:
        """What a random batch of images hands the block: a mixture of both networks' values, and the float one's."""
        count = len(self.learning)
        if self.batch < count:
            index = torch.randperm(count, generator=self.generator)[: self.batch].to(self.device)
        else:
            index = torch.arange(count, device=self.device)
        window = self._window()
        mixed, plain = {}, {}
        for name in self.part.inputs:
            rounded, exact = (values[name][index][window] for values in (self.learning.rounded, self.learning.exact))
            shape = (*exact.shape[:2], *[1] * (exact.dim() - 2))
            pick = (torch.rand(shape, generator=self.generator) < self.settings.drop).to(self.device)
            mixed[name] = torch.where(pick, exact, rounded)
            plain[name] = exact
        return mixed, plain

    def _window(self) -> tuple[slice, ...]:
        """A random square of the block's input, where it is one large map and the block gives maps."""
        side = self.settings.crop
        if not _is_cropped(self.learning, self.part, side):
            return (slice(None),)
        value = self.learning.exact[self.part.inputs[0]]
        starts = [int(torch.randint(max(1, size - side + 1), (), generator=self.generator)) for size in value.shape[2:]]
        return (slice(None), slice(None), *(slice(a // 2 * 2, a // 2 * 2 + side) for a in starts))

    def _error_on(self, graph: fx.GraphModule, read: Values, exact: Values) -> Tensor:
        """The squared error of a block's outputs, their channels weighted; of an image, summed up."""
        with torch.no_grad():
            wanted = self.target.graph(*(exact[name] for name in self.target.inputs))
        found = dict(zip(self.part.outputs, graph(*(read[name] for name in self.part.inputs)), strict=True))
        total = torch.zeros((), device=self.device)
        for name, b, weight in zip(self.target.outputs, wanted, self.weights, strict=True):
            a = found[name]
            error = (a - b).square()
            if weight is not None and len(weight) == error.shape[1]:
                error = error * per_channel(weight.to(error.device), error.dim())
            total = total + error.sum() / len(a)
        return total

    def judge(self, graph: fx.GraphModule) -> float:
        """The error of a block on held-out images, behind what the quantized network hands it."""
        total = 0.0
        with torch.no_grad():
            for i in range(0, len(self.judging), self.batch):
                some = (self.judging.rounded, self.judging.exact)
                some = [{name: value[i : i + self.batch] for name, value in values.items()} for values in some]
                total += float(self._error_on(graph, *some)) * len(next(iter(some[0].values())))
        return total / len(self.judging)


def _is_cropped(handed: Handed, part: Part, side: int) -> bool:
    value = handed.exact[part.inputs[0]]
    return len(part.inputs) == 1 and value.dim() == 4 and max(value.shape[2:]) > side and part.local


def images_in_step(handed: Handed, part: Part, side: int, most: int) -> int:
    """How many images a block learns from in a step: fewer than most where they are large maps that cannot be cropped to
    squares of that side, of which few images show enough positions."""
    if _is_cropped(handed, part, side):
        return most
    area = max(math.prod(handed.exact[name].shape[2:]) for name in part.inputs)
    return max(1, min(most, POSITIONS // area))


def _constant(step: int) -> float:
    return 1.0


def _cosine(steps: int) -> Callable[[int], float]:
    return lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))


def channel_weights(sensitivity: Mapping[str, Tensor], part: Part) -> list[Tensor | None]:
    """By output of a block, [C] that count an error of its channels by what it does to the network's output.

    In units of all the block's outputs together. A hundredth of the mean is added, so that no channel is lost.
    """
    known = [sensitivity.get(name) for name in part.outputs]
    means = [float(one.mean()) for one in known if one is not None]
    unit = max(sum(means) / max(1, len(means)), 1e-30)
    return [None if one is None else one / unit + 0.01 for one in known]
