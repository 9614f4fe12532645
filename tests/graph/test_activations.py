"""Elementwise arithmetic becomes the module that it is, whatever its wording."""

import math

import pytest
import torch
import torch.nn.functional as F
from networks import SMALL, Fan, ways
from torch import nn

from utils.graph.capture import capture
from utils.graph.layers import ChannelAffine, Clip, Elementwise
from utils.graph.nodes import module_of

INF = math.inf
BY_CHANNEL = torch.tensor([1.0, 2.0, 3.0, 4.0])


def per_channel(values: torch.Tensor = BY_CHANNEL) -> torch.Tensor:
    return values.view(1, -1, 1, 1)


CLIPS = {
    "relu": (F.relu, 0, INF),
    "clamp": (lambda x: x.clamp(min=0), 0, INF),
    "maximum": (lambda x: torch.maximum(x, torch.tensor(0.0)), 0, INF),
    "where": (lambda x: torch.where(x > 0, x, torch.zeros_like(x)), 0, INF),
    "absolute": (lambda x: (x + x.abs()) / 2, 0, INF),
    "mask": (lambda x: x * (x > 0).float(), 0, INF),
    "threshold": (lambda x: F.threshold(x, 0.0, 0.0), 0, INF),
    "relu6": (F.relu6, 0, 6),
    "hardtanh": (lambda x: F.hardtanh(x, -1.0, 2.5), -1, 2.5),
    "two ends": (lambda x: torch.minimum(torch.maximum(x, torch.tensor(-1.0)), torch.tensor(3.0)), -1, 3),
    "two turns": (lambda x: 6 - F.relu(6 - F.relu(x)), 0, 6),
    "two in a row": (lambda x: F.relu6(F.relu(x)), 0, 6),
    "by channel": (lambda x: torch.minimum(F.relu(x), per_channel()), 0, BY_CHANNEL),
}
LINES = {
    "line": (lambda x: 2 * x + 1, 2, 1),
    "offset first": (lambda x: (x - 3) / 2, 0.5, -1.5),
    "slopes": (lambda x: x * per_channel(), BY_CHANNEL, torch.zeros(4)),
    "nothing left": (torch.zeros_like, 0, 0),
}
NOTHING = {
    "plus 0": lambda x: x + 0,
    "times 1": lambda x: x * 1,
    "two signs": lambda x: torch.neg(-x),
    "there and back": lambda x: x / 2 * 2,
    "nn.Identity": nn.Identity(),
}
OTHERS = {  # and whether a positive scale passes
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), True),
    "leaky by where": (lambda x: torch.where(x > 0, x, 0.1 * x), True),
    "abs": (torch.abs, True),
    "prelu": (nn.PReLU(4), True),
    "silu": (F.silu, False),
    "x * sigmoid(x)": (lambda x: x * torch.sigmoid(x), False),
    "hardswish by hand": (lambda x: x * F.relu6(x + 3) / 6, False),
    "gelu": (nn.GELU(), False),
    "mish by hand": (lambda x: x * torch.tanh(F.softplus(x)), False),
    "square": (lambda x: x * x, False),
    "bent twice": (lambda x: torch.where(x > 1, 2 * x, x * (x > 0).float()), False),
}
# A straight line and a clip are two things; so are values that are read twice, and what follows.
SEVERAL = {
    "line, clip": (lambda x: F.relu(2 * x + 1), [ChannelAffine, Clip]),
    "slopes, silu": (lambda x: F.silu(x * per_channel()), [ChannelAffine, Elementwise]),
    "silu, slopes": (lambda x: F.silu(x) * per_channel(), [Elementwise, ChannelAffine]),
}
PLAIN = CLIPS | LINES | OTHERS | SEVERAL


def key(name: str) -> str:
    return name.replace(".", "_")


@pytest.fixture(scope="module")
def captured():
    with torch.no_grad():
        torch.manual_seed(0)
        functions = {name: entry[0] for name, entry in PLAIN.items()} | NOTHING
        fan = Fan({key(name): function for name, function in functions.items()}).eval()
        graph = capture(fan, SMALL)
        return fan, graph, {name: [module_of(graph, node) for node in way] for name, way in ways(graph, fan).items()}


@pytest.mark.parametrize("images", [1, 3])
def test_every_wording_computes_what_it_did(captured, images):
    fan, graph, _ = captured
    x = 4 * SMALL.probe(images)
    for name, before, after in zip(fan.functions, fan(x), graph(x), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", CLIPS)
def test_a_function_that_cuts_is_a_clip_with_its_bounds(captured, name):
    (module,) = captured[2][name]
    assert type(module) is Clip
    for found, expected in zip((module.low, module.high), CLIPS[name][1:], strict=True):
        torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("name", LINES)
def test_a_straight_line_is_a_channel_affine(captured, name):
    (module,) = captured[2][name]
    assert type(module) is ChannelAffine
    for found, expected in zip((module.scale, module.shift), LINES[name][1:], strict=True):
        torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("name", NOTHING)
def test_the_identity_is_nothing(captured, name):
    assert captured[2][key(name)] == []


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_function_is_one_module_that_knows_whether_a_scale_passes(captured, name):
    (module,) = captured[2][name]
    assert type(module) is Elementwise
    assert module.homogeneous is OTHERS[name][1]


@pytest.mark.parametrize("name", SEVERAL)
def test_a_line_by_channel_or_before_a_clip_stands_alone(captured, name):
    assert [type(module) for module in captured[2][name]] == SEVERAL[name][1]


def test_a_users_module_keeps_its_name_and_class(captured):
    _, graph, modules = captured
    assert graph.get_submodule("held.prelu") is modules["prelu"][0] and modules["prelu"][0].kind == "PReLU"
    assert modules["gelu"][0].kind == "GELU" and modules["silu"][0].kind == "silu"


class Frozen(nn.Module):
    """BatchNorm written out."""

    def __init__(self, formula):
        super().__init__()
        self.formula = formula
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.3)
        self.weight, self.bias = nn.Parameter(torch.rand(4) + 0.3), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.formula(x, *map(per_channel, (self.mean, self.var, self.weight, self.bias)))


FORMULAS = {
    "as in the paper": lambda x, m, v, w, b: (x - m) / torch.sqrt(v + 1e-3) * w + b,
    "rsqrt": lambda x, m, v, w, b: (x - m) * torch.rsqrt(v + 1e-3) * w + b,
    "one product, one sum": lambda x, m, v, w, b: x * (w * (v + 1e-3).rsqrt()) + (b - m * (w * (v + 1e-3).rsqrt())),
    "gain first": lambda x, m, v, w, b: (x - m) * (w / (1e-3 + v).sqrt()) + b,
    "power": lambda x, m, v, w, b: w * ((x - m) * (v + 1e-3) ** -0.5) + b,
}
BARE = {
    "without weight and bias": lambda x, m, v, w, b: (x - m) / (v + 1e-3) ** 0.5,
    "without bias": lambda x, m, v, w, b: (x - m) * (v + 1e-3).pow(-0.5) * w,
}


@pytest.fixture(scope="module")
def normalised():
    with torch.no_grad():
        torch.manual_seed(0)
        formulas = FORMULAS | BARE | {"relu behind": lambda *args: F.relu(FORMULAS["rsqrt"](*args))}
        fan = Fan({name: Frozen(formula) for name, formula in formulas.items()}).eval()
        graph = capture(fan, SMALL)
        return fan, graph, {name: [module_of(graph, node) for node in way] for name, way in ways(graph, fan).items()}


def assert_statistics(norm: nn.Module, written: Frozen, weight: torch.Tensor, bias: torch.Tensor) -> None:
    assert type(norm) is nn.BatchNorm2d and norm.eps == pytest.approx(1e-3)
    assert torch.equal(norm.running_mean, written.mean) and torch.equal(norm.running_var, written.var)
    torch.testing.assert_close(norm.weight, weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.bias, bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_batchnorm_written_out_is_found_with_its_statistics(normalised, name):
    fan, _, modules = normalised
    (norm,) = modules[name]
    assert_statistics(norm, fan.functions[name], fan.functions[name].weight, fan.functions[name].bias)


def test_batchnorm_written_out_may_lack_its_weight_and_bias(normalised):
    fan, _, modules = normalised
    (bare,), (biasless,) = (modules[name] for name in BARE)
    assert_statistics(bare, fan.functions["without weight and bias"], torch.ones(4), torch.zeros(4))
    written = fan.functions["without bias"]
    assert_statistics(biasless, written, written.weight, torch.zeros(4))


def test_an_activation_behind_a_written_batchnorm_stands_alone(normalised):
    fan, _, modules = normalised
    norm, clip = modules["relu behind"]
    written = fan.functions["relu behind"]
    assert_statistics(norm, written, written.weight, written.bias)
    assert type(clip) is Clip and clip.rectifies


def test_written_batchnorms_compute_what_they_did(normalised):
    fan, graph, _ = normalised
    x = SMALL.probe(2)
    for before, after in zip(fan(x), graph(x), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


class ReadTwice(nn.Module):
    """relu(x) is read by a layer and by arithmetic: it must be one tensor, not be computed inside both."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.second(x), x * torch.sigmoid(x)


def test_a_value_that_is_read_twice_is_a_tensor_of_its_own():
    graph = capture(ReadTwice(), SMALL)
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert [type(module_of(graph, node)) for node in calls] == [nn.Conv2d, Clip, nn.Conv2d, Elementwise]
    assert all(node.args == (calls[1],) for node in calls[2:])


def test_a_constant_that_differs_by_position_is_no_function_of_a_channel():
    position = torch.linspace(0.0, 1.0, 16)  # along the width
    fan = Fan({"position": lambda x: torch.sigmoid(x + position)})
    graph = capture(fan, SMALL)
    constant, add, sigmoid = ways(graph, fan)["position"]
    assert (
        constant.op == "get_attr"
        and add.target is torch.ops.aten.add.Tensor
        and type(module_of(graph, sigmoid)) is Elementwise
    )
    torch.testing.assert_close(graph(SMALL.probe(2)), fan.eval()(SMALL.probe(2))[0])
