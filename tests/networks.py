"""Networks for tests: random weights, and BatchNorm statistics that training could have left."""

import copy
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.calibration.moments import Statistics
from utils.core.input_spec import InputSpec
from utils.graph.capture import capture
from utils.graph.nodes import module_of
from utils.passes.fold_batchnorm import fold_batchnorm
from utils.passes.log import PassLog

SPEC = InputSpec(size=(24, 24), resize=24)
SMALL = InputSpec(size=(16, 16), resize=16)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random BatchNorm parameters and statistics, spread over channels as in trained networks."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            size = module.running_var.shape
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.copy_(torch.rand(size, generator=generator) * 1.5 + 0.25)
            if module.affine:
                module.weight.data.copy_(torch.rand(size, generator=generator) + 0.3)
                module.bias.data.normal_(0, 0.5, generator=generator)
    return model.eval()


def settle(model: nn.Module, spec: InputSpec = SPEC, images: int = 64) -> nn.Module:
    """Make the BatchNorm statistics those of random images, as training would have."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = None  # a plain average
        norm.reset_running_stats()
    model.train()
    model(spec.probe(images, seed=7))
    return model.eval()


@cache
def _made(network: Callable[[], nn.Module], prepare: tuple[Callable, ...]) -> tuple[nn.Module, fx.GraphModule]:
    torch.manual_seed(0)
    model = network().eval()
    for step in prepare:
        step(model)
    return model, capture(model, SPEC)


def made(network: Callable[[], nn.Module], *prepare: Callable) -> tuple[nn.Module, fx.GraphModule]:
    """A network as prepared (randomise, settle), and its graph: copies of what is captured once for all tests."""
    return copy.deepcopy(_made(network, prepare))


def folded(model: nn.Module) -> tuple[fx.GraphModule, Statistics]:
    """The captured network with its BatchNorm folded, and what that knew."""
    graph = capture(model, SPEC)
    return graph, fold_batchnorm(graph, PassLog())


def modules_in(graph: fx.GraphModule, kind: type[nn.Module]) -> list[nn.Module]:
    """Its modules of that class, in the order in which they run."""
    found = (module_of(graph, node) for node in graph.graph.nodes)
    return [module for module in found if isinstance(module, kind)]


def unlike(network, seed: int = 0) -> tuple[fx.GraphModule, Statistics]:
    """A folded network whose channels have unlike ranges, and its statistics."""
    return copy.deepcopy(_unlike(network, seed))


@cache
def _unlike(network: Callable[[], nn.Module], seed: int) -> tuple[fx.GraphModule, Statistics]:
    torch.manual_seed(seed)
    return folded(settle(spread_gains(settle(randomise(network(), seed)))))


def spread_gains(model: nn.Module) -> nn.Module:
    """Channels with unlike ranges, as trained ones have."""
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.weight.data.mul_(torch.logspace(-1, 1, len(norm.weight)))
    return model


def conv_bn(
    before: int, after: int, kernel: int = 3, activation: type[nn.Module] | None = nn.ReLU, **options
) -> nn.Sequential:
    layers = [nn.Conv2d(before, after, kernel, bias=False, **options), nn.BatchNorm2d(after)]
    return nn.Sequential(*layers, *([activation()] if activation else []))


class Head(nn.Module):
    """Global pooling, flatten and a linear layer."""

    def __init__(self, channels: int, classes: int = 5):
        super().__init__()
        self.pool, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, classes)

    def forward(self, x):
        return self.linear(torch.flatten(self.pool(x), 1))


def chain(activation: type[nn.Module] = nn.ReLU6) -> nn.Module:
    """Conv, depthwise conv, 1x1 conv, classifier: everything a pair."""
    return nn.Sequential(
        conv_bn(3, 8, activation=activation, padding=1),
        conv_bn(8, 8, activation=activation, padding=1, groups=8, stride=2),
        conv_bn(8, 12, 1, activation=activation),
        Head(12),
    )


def relu_chain() -> nn.Module:
    return chain(nn.ReLU)


class Residual(nn.Module):
    """A residual block between two layers: its ends feed an add and cannot be scaled alone."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner = conv_bn(3, 8), conv_bn(8, 8, padding=1)
        self.outer, self.head = conv_bn(8, 8, padding=1, activation=None), Head(8)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(x + self.outer(self.inner(x))))


class Branches(nn.Module):
    """Two branches into a concat, and a layer that reads both."""

    def __init__(self):
        super().__init__()
        self.left, self.right = conv_bn(3, 6, 1), conv_bn(3, 4, 3, padding=1, activation=nn.ReLU6)
        self.reader, self.head = conv_bn(10, 8, 1), Head(8)

    def forward(self, x):
        return self.head(self.reader(torch.cat([self.left(x), self.right(x)], dim=1)))


class Twice(nn.Module):
    """One layer called two times."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.shared(self.shared(x))


NETWORKS = {"chain": chain, "relu chain": relu_chain, "residual": Residual, "branches": Branches}


class Fan(nn.Module):
    """Many functions, each of a convolution of its own: one capture for all of them, an output for each."""

    def __init__(self, functions: dict[str, Callable[[Tensor], Tensor]], channels: int = 4):
        super().__init__()
        self.functions = functions
        self.held = nn.ModuleDict({name: made for name, made in functions.items() if isinstance(made, nn.Module)})
        self.layers = nn.ModuleDict({name: nn.Conv2d(3, channels, 1) for name in functions})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(self.layers[name](x)) for name, function in self.functions.items())


def ways(graph: fx.GraphModule, fan: Fan) -> dict[str, list[fx.Node]]:
    """By a Fan's function the nodes behind its convolution, in order, up to its output."""
    outputs = graph.graph.output_node().args[0]
    outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    found = {}
    for name, output in zip(fan.functions, outputs, strict=True):
        way = [output]
        for node in way:  # grows
            way += [source for source in node.all_input_nodes if not _is_start(node, name) and source not in way]
        found[name] = [node for node in graph.graph.nodes if node in way and not _is_start(node, name)]
    return found


def _is_start(node: fx.Node, name: str) -> bool:
    return node.target == f"layers.{name}"


def sqnr(reference: Tensor, noisy: Tensor) -> float:
    """Signal-to-quantization-noise ratio of two tensors of one shape, in dB."""
    noise = (reference - noisy).square().mean()
    return float(10 * torch.log10(reference.square().mean() / noise.clamp_min(1e-30)))
