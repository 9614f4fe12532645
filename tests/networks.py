"""Networks for tests: random weights, and BatchNorm statistics that training could have left."""

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.calibration.moments import Statistics
from utils.core.input_spec import InputSpec
from utils.graph.capture import capture
from utils.passes.fold_batchnorm import fold_batchnorm
from utils.passes.log import PassLog

SPEC = InputSpec(size=(24, 24), resize=24)


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


def folded(model: nn.Module) -> tuple[fx.GraphModule, Statistics]:
    """The captured network with its BatchNorm folded, and what that knew."""
    traced = capture(model, SPEC)
    return traced, fold_batchnorm(traced, PassLog())


def unlike(network, seed: int = 0) -> tuple[fx.GraphModule, Statistics]:
    """A folded network whose channels have unlike ranges, and its statistics."""
    torch.manual_seed(seed)
    model = settle(randomise(network(), seed))
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.weight.mul_(torch.logspace(-1, 1, len(norm.weight)))
    return folded(settle(model))


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
