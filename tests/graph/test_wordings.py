"""However a layer, an activation or a pooling is written, it is captured as what it is, under the user's name."""

import math
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import SPEC, conv_bn, settle
from networks_field import ACTIVATIONS, POOLS, SPATIAL, FrozenNorm, OwnConv
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.utils._pytree import tree_leaves

from utils.core.errors import UserError
from utils.graph.capture import capture


class Apply(nn.Module):
    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Wide(nn.Module):
    """A layer, what is tried, and a layer that reads it."""

    def __init__(self, tried: nn.Module | Callable, channels: int = 8):
        super().__init__()
        self.first, self.tried = conv_bn(3, 8, 3, None, padding=1), tried
        self.last = nn.Conv2d(channels, 4, 1)

    def forward(self, x):
        return self.last(self.tried(self.first(x)))


def tensors(outputs):
    return [value for value in tree_leaves(outputs) if isinstance(value, torch.Tensor)]


def captured(model: nn.Module, spec=SPEC):
    """The graph, held against the network on two batches of different sizes."""
    model = settle(model, spec)
    graph = capture(model, spec)
    for images in (spec.probe(2, 1), spec.probe(3, 2)):
        for wanted, found in zip(tensors(model(images.clone())), tensors(graph(images.clone())), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    return graph


def modules(graph) -> Counter:
    return Counter(
        type(graph.get_submodule(node.target)).__name__ for node in graph.graph.nodes if node.op == "call_module"
    )


def names(graph, *kinds: type[nn.Module]) -> list[str]:
    nodes = [node for node in graph.graph.nodes if node.op == "call_module"]
    return [node.target for node in nodes if isinstance(graph.get_submodule(node.target), kinds or nn.Module)]


# ------------------------------------------------------------------------------------- activations

CLIPS = {"relu", "relu6", "relu in place", "hardtanh", "clamp", "absolute", "mask", "minus"}
LINES = {"line", "line then relu", "hard sigmoid"}  # a line is folded into the layer before it


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_one_module_whatever_its_wording(name):
    found = modules(captured(Wide(ACTIVATIONS[name])))
    found.subtract({"Conv2d": 2, "BatchNorm2d": 1})
    line = {"ChannelAffine": 1} if name in LINES else {}
    kind = "Clip" if name in CLIPS | LINES else "Elementwise"
    assert +found == (line if name == "line" else line | {kind: 1})


OTHERS = {
    "swish by exp": lambda x: x / (1 + torch.exp(-x)),
    "gelu by tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "rational": lambda x: (0.1 + 0.5 * x + 0.2 * x * x) / (1 + (0.3 * x).abs()),
    "log-sigmoid": F.logsigmoid,
    "celu": lambda x: F.celu(x, 0.7),
    "threshold": lambda x: F.threshold(x, 0.3, 0.1),
    "shrink": lambda x: F.softshrink(x, 0.2),
    "sine": lambda x: torch.sin(x) + 0.1 * x,
    "two masks": lambda x: torch.where(x > 1, 2 * x, x * (x > 0).float()),
    "lerp": lambda x: torch.lerp(0.1 * x, F.relu(x), 0.7),
    "filled": lambda x: x.masked_fill(x < -0.5, -0.5) * 0.5 + F.relu(x) ** 2,
    "exponent": lambda x: torch.where(x > 0, x, torch.expm1(x.clamp(max=0))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_are_one_module_too(name):
    found = modules(captured(Wide(OTHERS[name])))
    assert found["Elementwise"] == 1 and found["Clip"] == 0


class Slopes(nn.Module):
    """Every channel has its own slope, by three wordings."""

    def __init__(self, way: int):
        super().__init__()
        self.way, self.weight = way, nn.Parameter(torch.linspace(-0.2, 0.5, 8))

    def forward(self, x):
        slope = self.weight.view(1, -1, 1, 1)
        if self.way == 0:
            return F.prelu(x, self.weight)
        return torch.where(x > 0, x, slope * x) if self.way == 1 else F.relu(x) - slope * F.relu(-x)


@pytest.mark.parametrize("way", range(3))
def test_a_slope_a_channel_is_an_activation(way):
    assert modules(captured(Wide(Slopes(way))))["Elementwise"] == 1


# ----------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize("index", range(len(POOLS)))
def test_pooling_is_pooling(index):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.fc = conv_bn(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(POOLS[index](self.first(x)))

    graph = captured(Pooled())
    assert names(graph, nn.Linear) == ["fc"]
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert called & {
        "aten.mean.dim",
        "aten.amax.default",
        "aten.avg_pool2d.default",
        "aten.adaptive_avg_pool2d.default",
    }


@pytest.mark.parametrize("name", SPATIAL)
def test_maps_are_moved_and_resized(name):
    assert names(captured(Wide(SPATIAL[name])), nn.Conv2d) == ["first.0", "last"]


# ------------------------------------------------------------------------------------------ layers


class FunctionConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.1)

    def forward(self, x):
        return torch.conv2d(x, self.kernel, None, 1, 1)


class ScaledWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8, 1, 1)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return F.conv2d(x, self.weight * 0.3, self.bias)


def pruned() -> nn.Module:
    layer = nn.Conv2d(8, 8, 3, padding=1)
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


WORDED = {
    "module": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "subclass": lambda: OwnConv(8, 8, 3, padding=1),
    "function": FunctionConv,
    "scaled weight": ScaledWeight,
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
    "old weight_norm": lambda: old_weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)),
    "old spectral_norm": lambda: spectral_norm(nn.Conv2d(8, 8, 1)),
    "pruned": pruned,
    "padding same": lambda: nn.Conv2d(8, 8, (2, 3), padding="same", dilation=2),
    "reflect": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", WORDED)
def test_a_convolution_is_a_layer_whatever_its_wording(name):
    graph = captured(Wide(nn.Sequential(WORDED[name](), nn.BatchNorm2d(8), nn.ReLU())))
    found = names(graph, nn.Conv2d)
    assert len(found) == 3 and (found[0], found[2]) == ("first.0", "last") and found[1].startswith("tried.0")
    assert modules(graph)["BatchNorm2d"] == 2


class Rank(nn.Module):
    """A layer over other axes: of one or three dimensions."""

    def __init__(self, dims: int):
        super().__init__()
        self.layer = nn.Conv1d(8, 8, 3, padding=1) if dims == 1 else nn.Conv3d(1, 2, 3, (2, 1, 1), 1)
        self.norm = nn.BatchNorm1d(8) if dims == 1 else nn.BatchNorm3d(2)

    def forward(self, x):
        rows = x.flatten(2) if isinstance(self.layer, nn.Conv1d) else x.unsqueeze(1)
        return F.relu(self.norm(self.layer(rows))).reshape(x.shape[0], 8, *x.shape[2:])


@pytest.mark.parametrize(("dims", "kinds"), [(1, (nn.Conv1d, nn.BatchNorm1d)), (3, (nn.Conv3d, nn.BatchNorm3d))])
def test_layers_of_one_and_three_dimensions(dims, kinds):
    assert names(captured(Wide(Rank(dims))), *kinds) == ["tried.layer", "tried.norm"]


class OwnLinear(nn.Module):
    """y = x W' + b, by four wordings."""

    def __init__(self, way: int):
        super().__init__()
        self.way, self.weight, self.bias = way, nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        if self.way == 0:
            return x @ self.weight.t() + self.bias
        if self.way == 1:
            return torch.addmm(self.bias, x, self.weight.T)
        if self.way == 2:
            return torch.einsum("ni,oi->no", x, self.weight) + self.bias
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("way", range(4))
def test_a_linear_layer_is_a_layer_whatever_its_wording(way):
    model = nn.Sequential(conv_bn(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), OwnLinear(way))
    assert modules(captured(model))["Linear"] == 1


# --------------------------------------------------------------------------------------- BatchNorm


class Worded(FrozenNorm):
    """BatchNorm's arithmetic in other orders."""

    def __init__(self, order: int):
        super().__init__(8)
        self.order = order

    def forward(self, x):
        scale = self.weight * (self.variance + 1e-5).rsqrt()
        shift = self.bias - self.mean * scale
        if self.order == 0:
            return super().forward(x)
        if self.order == 1:
            return x * scale + shift
        if self.order == 2:
            return torch.addcmul(shift, scale, x)
        flat = [part.flatten() for part in (self.mean, self.variance, self.weight, self.bias)]
        return F.batch_norm(x, *flat, training=False)


@pytest.mark.parametrize("order", range(4))
def test_batchnorm_is_found_wherever_its_arithmetic_is(order):
    frozen = Worded(order)
    graph = captured(Wide(nn.Sequential(nn.Conv2d(8, 8, 1), frozen)))
    norms = [graph.get_submodule(name) for name in names(graph, nn.BatchNorm2d)]
    assert len(norms) == 2
    got = norms[1]
    wanted = frozen.weight.flatten() / (frozen.variance.flatten() + 1e-5).sqrt()
    torch.testing.assert_close(got.weight / (got.running_var + got.eps).sqrt(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.running_mean, frozen.mean.flatten(), rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------- in place


class SkipWrites(nn.Module):
    """The skip reads what an in-place ReLU wrote."""

    def __init__(self):
        super().__init__()
        self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(self.relu(x)) + x


class WritesSlice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        y[:, :3] += x[:, 5:]
        y[:, 4:, 1:-1] = 0.5
        y.mul_(2).relu_()
        return y


class FillsZeros(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        out = torch.zeros(x.shape[0], 8, x.shape[2], x.shape[3])
        out[:, :4] = self.conv(x)
        out[:, 4:].copy_(x[:, ::2])
        return out


@pytest.mark.parametrize("kind", [SkipWrites, WritesSlice, FillsZeros])
def test_what_is_written_in_place_is_what_others_read(kind):
    graph = captured(Wide(kind()))
    assert not [node for node in graph.graph.nodes if str(node.target).partition(".")[2].split(".")[0].endswith("_")]


# ----------------------------------------------------------------------------------------- sharing


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU()

    def forward(self, x):
        for _ in range(3):
            x = self.act(self.norm(self.conv(x)))
        return x


def test_a_layer_used_three_times_becomes_three():
    graph = captured(Wide(Reused()))
    convs = [graph.get_submodule(name) for name in names(graph, nn.Conv2d)]
    assert len(convs) == 5
    assert len({id(conv) for conv in convs}) == len({conv.weight.data_ptr() for conv in convs}) == 5
    assert modules(graph)["BatchNorm2d"] == 4 and modules(graph)["Elementwise"] == 3


# ------------------------------------------------------------------------------ around the layers

Pair = namedtuple("Pair", "logits features")


class Returns(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.body, self.fc = kind, conv_bn(3, 8), nn.Linear(8, 4)

    def forward(self, x, scale: float = 1.0, *, everything: bool = False):
        assert x.dim() == 4, "images, please"
        if x.shape[2] % 5:
            x = F.pad(x, (0, 0, 0, 5 - x.shape[2] % 5))
        features = self.body(x).mean((2, 3)) * scale
        logits = self.fc(features)
        made = {
            "tensor": logits,
            "tuple": (logits, None),
            "named": Pair(logits, features),
            "dict": {"logits": logits, "features": [features]},
            "ordered": OrderedDict(out=logits),
            "map": logits[:, :, None, None],
        }
        return (logits, features) if everything else made[self.kind]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "named", "dict", "ordered", "map"])
def test_outputs_and_arguments_of_every_kind(kind):
    graph = captured(Returns(kind))
    assert names(graph, nn.Linear) == ["fc"]


WRAPPED = {
    "data parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_are_taken_off(name):
    model = settle(Returns("tensor"))
    graph = capture(WRAPPED[name](model), SPEC)
    assert names(graph, nn.Conv2d, nn.Linear) == ["body.0", "fc"]
    torch.testing.assert_close(tensors(graph(SPEC.probe()))[0], model(SPEC.probe()))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_taken_as_float32(kind):
    model = settle(Returns("tensor"))
    graph = capture(model.to(kind), SPEC)
    torch.testing.assert_close(tensors(graph(SPEC.probe()))[0], model.float()(SPEC.probe()))
    assert {tensor.dtype for tensor in graph.state_dict().values() if tensor.is_floating_point()} == {torch.float32}


def test_the_network_itself_stays_as_it_is():
    model = Returns("tensor").double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    capture(model, SPEC)
    assert model.training and model.body[1].training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) and value.dtype == before[name].dtype


# ----------------------------------------------------------------------------------------- refused


class Refused(nn.Module):
    def __init__(self, why: str):
        super().__init__()
        self.why, self.body = why, conv_bn(3, 8)

    def forward(self, x):
        y = self.body(x)
        if self.why == "values" and y.sum() > 0:
            y = -y
        if self.why == "fails":
            raise ValueError("seven channels, please")
        return torch.fft.fft2(y) if self.why == "complex" else None if self.why == "nothing" else y


REASONS = {"values": "depends on", "fails": "seven channels, please", "nothing": "return", "complex": "complex"}


@pytest.mark.parametrize("why", REASONS)
def test_what_cannot_be_captured_is_refused_in_one_line(why):
    with pytest.raises(UserError, match=REASONS[why]) as caught:
        capture(Refused(why).eval(), SPEC)
    assert "\n" not in str(caught.value)


def test_a_scripted_network_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"(?i)script"):
        capture(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1))), SPEC)
