"""Small networks that are put together from a list of steps, written in the many ways that people write them.

A step is a name of STEPS and a few numbers from 0 to 7, which it reads as it needs: every list of steps is a network, so
that hypothesis may draw and shrink them freely.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from networks import settle
from torch import Tensor, nn

from utils.core.input_spec import InputSpec

Step = tuple[str, int, int, int]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "hardtanh": F.hardtanh,
    "clamp": lambda x: x.clamp(-0.5, 2),
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "silu": lambda x: x * torch.sigmoid(x),
    "hard swish": lambda x: x * F.relu6(x + 3) / 6,
    "hard sigmoid": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "sigmoid": torch.sigmoid,
    "tanh in place": lambda x: (x + 0).tanh_(),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "elu": F.elu,
    "absolute": lambda x: (x + x.abs()) / 2,
    "mask": lambda x: x * (x > 0),
    "where": lambda x: torch.where(x > 0, x, 0.25 * x),
    "maximum": lambda x: torch.maximum(x, 0.1 * x),
    "minus": lambda x: x - F.relu(x - 1),
    "softsign": lambda x: x / (1 + x.abs()),
    "square": lambda x: F.relu(x).square(),
    "line": lambda x: 1.5 * x - 0.25,
    "line then relu": lambda x: F.relu(2 - x),
}
SPATIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "max pool": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "overlapping max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "average pool": lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
    "average pool without zeros": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "average pool with zeros": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive max pool": lambda x: F.adaptive_max_pool2d(x, 2),
    "pad": lambda x: F.pad(x, (1, 0, 0, 2)),
    "reflect": lambda x: F.pad(x, (1, 1, 0, 0), mode="reflect") if x.shape[3] > 1 else x,
    "replicate": lambda x: F.pad(x, (0, 1, 1, 0), mode="replicate"),
    "pad with a value": lambda x: F.pad(x, (1, 1, 1, 1), value=0.5),
    "crop": lambda x: x[:, :, : max(x.shape[2] - 1, 1), x.shape[3] // 4 :],
    "every other": lambda x: x[..., ::2, 1::2] if x.shape[3] > 1 else x,
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "nearest to a size": lambda x: F.interpolate(x, size=(7, 5)),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
    "bilinear, corners aligned": lambda x: F.interpolate(x, size=(9, 8), mode="bilinear", align_corners=True),
    "flip": lambda x: x.flip(3),
    "transpose": lambda x: x.transpose(2, 3),
}
POOLS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.mean((2, 3)),
    lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    lambda x: F.avg_pool2d(x, x.shape[2:])[:, :, 0, 0],
    lambda x: x.flatten(2).mean(-1),
    lambda x: x.sum((2, 3)) / (x.shape[2] * x.shape[3]),
    lambda x: x.amax((2, 3)),
    lambda x: x.mean(3).mean(2),
    lambda x: F.adaptive_max_pool2d(x, 1).view(x.shape[0], -1),
)
WIDTHS = (8, 4, 6, 12)


class FrozenNorm(nn.Module):
    """BatchNorm's arithmetic on constants, as detectors freeze it."""

    def __init__(self, channels: int):
        super().__init__()
        for name, low, high in (("mean", -0.5, 0.5), ("variance", 0.3, 1.5), ("weight", 0.5, 1.5), ("bias", -0.5, 0.5)):
            self.register_buffer(name, torch.empty(1, channels, 1, 1).uniform_(low, high))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / torch.sqrt(self.variance + 1e-5) * self.weight + self.bias


class OwnConv(nn.Conv2d):
    """A subclass whose weights are centred when they are used."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True) * 0.5
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def convolution(before: int, after: int, size: tuple[int, int], a: int, b: int) -> nn.Module:
    """One of many kinds, for maps of that height and width."""
    kernel = (3, 1, 3, 2, (1, 3), 3, 5, 3)[a]
    kernel = 1 if max(kernel if a == 4 else (kernel,)) > min(size) else kernel
    groups = math.gcd(before, after) if b == 3 else 2 if b == 5 and before % 2 == after % 2 == 0 else 1
    options = {"groups": groups, "bias": b % 2 == 1}
    if b == 4:
        return nn.Conv2d(before, after, kernel, padding="same", **options)
    if b == 6:
        return OwnConv(before, after, kernel, 1, kernel // 2 if isinstance(kernel, int) else 0, **options)
    if b == 7 and max(size) < 14:
        return nn.ConvTranspose2d(before, after, 2, 2, **options)
    padding = (kernel // 2) if isinstance(kernel, int) else (0, 1)
    return nn.Conv2d(before, after, kernel, 2 if a in (2, 7) else 1, padding, **options)


class Network(nn.Module):
    """The steps, one after the other, then a head. size: of the images that it will see."""

    def __init__(self, steps: list[Step], head: int, size: tuple[int, int]):
        super().__init__()
        self.steps, self.head_kind = steps, head
        self.layers = nn.ModuleDict()
        with torch.no_grad():
            x = self._run(torch.zeros(2, 3, *size), build=True)
            self.head = nn.Linear(x.shape[1], 4) if head % 4 < 3 else nn.Conv2d(x.shape[1], 4, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        features = self._run(x)
        if self.head_kind % 4 == 3:
            return self.head(features)
        logits = self.head(POOLS[self.head_kind](features))
        if self.head_kind == 1:
            return logits, features
        return {"logits": logits} if self.head_kind == 5 else logits

    def _run(self, x: Tensor, build: bool = False) -> Tensor:
        for index, (name, *numbers) in enumerate(self.steps):
            self.building, self.place = build, f"{index}"
            x = STEPS[name](self, x, *numbers)
        return x

    def layer(self, suffix: str, make: Callable[[], nn.Module]) -> nn.Module:
        """A layer of the step at hand, made when the network is."""
        name = self.place + suffix
        if self.building and name not in self.layers:
            self.layers[name] = make()
        return self.layers[name]

    def conv(self, x: Tensor, after: int, a: int = 0, b: int = 0, suffix: str = "") -> Tensor:
        size = (x.shape[2], x.shape[3])
        x = self.layer(f"conv{suffix}", lambda: convolution(x.shape[1], after, size, a, b))(x)
        kind = (nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d, FrozenNorm)[(a + b) % 4]
        return self.layer(f"norm{suffix}", lambda: kind(after))(x)


def _layer(net: Network, x: Tensor, a: int, b: int, c: int) -> Tensor:
    return tuple(ACTIVATIONS.values())[c](net.conv(x, WIDTHS[(a + c) % 4], a, b))


def _act(net: Network, x: Tensor, a: int, b: int, c: int) -> Tensor:
    return tuple(ACTIVATIONS.values())[(a + 8 * b) % len(ACTIVATIONS)](net.conv(x, x.shape[1], suffix="s"))


def _bare(net: Network, x: Tensor, a: int, b: int, c: int) -> Tensor:
    """A layer without BatchNorm behind it."""
    x = net.layer("bare", lambda: nn.Conv2d(x.shape[1], WIDTHS[a % 4], 1 + 2 * (b % 2), padding=b % 2))(x)
    return F.relu(x) if c % 2 else x


def _spatial(net: Network, x: Tensor, a: int, b: int, c: int) -> Tensor:
    y = tuple(SPATIAL.values())[(a + 8 * b) % len(SPATIAL)](x)
    return y if max(y.shape[2:]) <= 24 else x


def _residual(net: Network, x: Tensor, a: int, b: int, c: int) -> Tensor:
    y = net.conv(F.relu(net.conv(x, x.shape[1], suffix="r")), x.shape[1], suffix="s")
    if a == 0:
        y += x
    elif a == 1:
        y = torch.add(y, x, alpha=0.5)
    elif a == 2:
        y = x - y
    elif a == 3:  # what the skip reads was written in place
        x = F.relu(x, inplace=b % 2 == 0)
        y = y + x
    elif a == 4:
        y[:, : max(x.shape[1] // 2, 1)] += x[:, : max(x.shape[1] // 2, 1)]
    elif a == 5:
        y = torch.stack([x, y]).sum(0)
    elif a == 6:
        y = torch.maximum(x, y)
    else:
        y = y.add_(x).relu_()
    return F.relu(y) if c % 2 else y


def _concat(net: Network, x: Tensor, a: int, b: int, c: int) -> Tensor:
    if x.shape[1] > 12:
        return x
    y = F.relu(net.conv(x, (4, 6, 8)[b % 3], suffix="c"))
    if a % 4 == 0:
        return torch.cat([x, y], 1)
    if a % 4 == 1:
        return torch.cat((y, F.avg_pool2d(x, 3, 1, 1), y), dim=1)
    if a % 4 == 2:
        return torch.concat([x, y, x[:, :1]], dim=-3)
    out = x.new_zeros(x.shape[0], x.shape[1] + y.shape[1], x.shape[2], x.shape[3])
    out[:, : x.shape[1]] = x
    out[:, x.shape[1] :] = y
    return out


def _split(net: Network, x: Tensor, a: int, b: int, c: int) -> Tensor:
    n, channels, height, width = x.shape
    if channels % 2:
        return x
    first, second = x.chunk(2, 1) if a % 2 else x.split(channels // 2, dim=1)
    if b % 4 == 0:
        return torch.cat([second, F.relu(net.conv(first, channels // 2, suffix="p"))], 1)
    if b % 4 == 1:
        return first * torch.sigmoid(second)
    if b % 4 == 2:
        return x.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(n, -1, height, width)
    return torch.stack([first, second], 2).flatten(1, 2)


def _gate(net: Network, x: Tensor, a: int, b: int, c: int) -> Tensor:
    squeezed = x.mean((2, 3), keepdim=True) if a % 2 else F.adaptive_avg_pool2d(x, 1)
    if b % 2:
        hidden = F.relu(net.layer("down", lambda: nn.Linear(x.shape[1], 4))(squeezed.flatten(1)))
        gate = net.layer("up", lambda: nn.Linear(4, x.shape[1]))(hidden)[:, :, None, None]
    else:
        gate = net.layer("gate", lambda: nn.Conv2d(x.shape[1], x.shape[1], 1))(squeezed)
    return x * (F.hardsigmoid(gate) if c % 2 else gate.sigmoid()).expand_as(x)


def _shared(net: Network, x: Tensor, a: int, b: int, c: int) -> Tensor:
    for _ in range(2 + a % 2):
        x = F.relu(net.conv(x, x.shape[1], suffix="shared"))
        x = F.max_pool2d(x, 2, ceil_mode=True) if b % 2 else x
    return x


def _scale(net: Network, x: Tensor, a: int, b: int, c: int) -> Tensor:
    factor = net.layer("scale", lambda: nn.ParameterList([torch.rand(1, x.shape[1], 1, 1) + 0.5]))[0]
    return x * factor if a % 2 else torch.addcmul(factor, x, factor)


STEPS: dict[str, Callable[..., Tensor]] = {
    "layer": _layer,
    "activation": _act,
    "bare": _bare,
    "spatial": _spatial,
    "residual": _residual,
    "concat": _concat,
    "split": _split,
    "gate": _gate,
    "shared": _shared,
    "scale": _scale,
}


def field_network(steps: list[Step], head: int, size: tuple[int, int], seed: int = 0) -> tuple[nn.Module, InputSpec]:
    """The network in eval mode with BatchNorm statistics of random images, and its input."""
    torch.manual_seed(seed)
    spec = InputSpec(size=size, resize=min(size))
    network = Network(steps, head, size)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.4)
    return settle(network, spec, 16), spec
