"""Whatever else people do in a network: hooks, contexts, functions of their own, positions, arithmetic on weights."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from networks import SPEC, conv_bn, settle, sqnr
from test_wordings import Wide, captured, modules, names
from torch import nn
from torch.utils.checkpoint import checkpoint

from dfq import Recipe, quantize_data_free
from utils.backends.lowering import lower_to_integers
from utils.core.errors import UserError
from utils.core.networks import plain, scored
from utils.graph.capture import capture
from utils.graph.ops import OPERATORS


class Held(nn.Module):
    """A function of the network and an image, and what it holds."""

    def __init__(self, function: Callable, **held):
        super().__init__()
        self.function = function
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.function(self, x)


def autocast(net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net.body(x)
    return y.float()


def no_gradients(net, x):
    with torch.no_grad():
        y = net.body(x)
    with torch.inference_mode():
        return y + net.body(x.detach())


def recomputed(net, x):
    return checkpoint(net.body, checkpoint(net.body, x, use_reentrant=False), use_reentrant=True)


def straight_through(net, x):
    y = net.body(x)
    return y + (torch.round(y.clamp(0, 6) * 4) / 4 - y).detach()


def row_and_column(net, x):
    """Coordinates of every position, as often as there are images."""
    n, _, height, width = x.shape
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return net.wide(torch.cat([x, torch.stack([rows, columns]).unsqueeze(0).repeat(n, 1, 1, 1)], 1))


def waves(net, x):
    """Positions counted over a mask of the batch's size, as in DETR."""
    mask = ~torch.zeros(x.shape[0], *x.shape[2:], dtype=torch.bool)
    rows = mask.cumsum(1, dtype=torch.float32) / x.shape[2]
    columns = mask.cumsum(2, dtype=torch.float32) / x.shape[3]
    return net.body(x) + torch.stack(
        [f(part * k) for part in (rows, columns) for f in (torch.sin, torch.cos) for k in (1, 2)], 1
    )


def class_token(net, x):
    tokens = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([net.token.expand(tokens.shape[0], -1, -1), tokens], 1)
    return x * net.layer(tokens)[:, 0, :, None, None]


def scale_as(net, x):
    return net.body(net.token.view(1, -1, 1, 1).expand_as(x) * x)


def drawn_in_training(net, x):
    y = net.body(x)
    if net.training and torch.is_grad_enabled():
        y = y * (torch.rand(x.shape[0], 1, 1, 1) > 0.2) / 0.8
    return x + F.dropout2d(y, 0.2, net.training)


class Standardised(nn.Conv2d):
    """Weights without mean and of deviation 1."""

    def forward(self, x):
        mean, deviation = (f(self.weight, dim=(1, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
        return self._conv_forward(x, (self.weight - mean) / (deviation + 1e-5), self.bias)


class StandardisedByNorm(nn.Conv2d):
    def forward(self, x):
        flat = F.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True)
        return F.conv2d(x, flat.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * torch.sigmoid(x)


def kept(name: str) -> dict[str, nn.Module]:
    if name == "class_token":
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        return {"token": nn.Parameter(torch.randn(1, 1, 8)), "layer": layer}
    if name == "row_and_column":
        return {"wide": conv_bn(10, 8, 3, padding=1)}
    return {"body": conv_bn(8, 8, 3, padding=1), "token": nn.Parameter(torch.rand(8) + 0.5)}


IDIOMS = [autocast, no_gradients, recomputed, straight_through, row_and_column, waves, class_token, scale_as]
IDIOMS += [drawn_in_training]


@pytest.mark.parametrize("function", IDIOMS)
def test_a_network_is_captured_for_any_batch_whatever_is_done_in_it(function):
    network = settle(Wide(Held(function, **kept(function.__name__))))
    quantized = quantize_data_free(network, SPEC, Recipe())  # the capture is held to the network in float32
    graph = quantized.float
    assert graph.meta["batch"] is None
    unknown = [n.target for n in graph.graph.nodes if n.op == "call_function" and n.target not in OPERATORS]
    assert not [target for target in unknown if "sym_size" not in str(target)]


@pytest.mark.parametrize("kind", [Standardised, StandardisedByNorm])
def test_arithmetic_on_weights_is_a_layer(kind):
    graph = captured(Wide(nn.Sequential(kind(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())))
    assert names(graph, nn.Conv2d) == ["first.0", "tried.0", "last"]


def test_functions_of_ones_own_are_what_they_do():
    graph = captured(Wide(Held(lambda net, x: Swish.apply(net.body(x)), body=nn.Conv2d(8, 8, 1))))
    assert modules(graph)["Elementwise"] == 1


# ------------------------------------------------------------------------------------------- hooks


def summed(net, x):
    return net.second(net.body(x)) + net.kept["body"]


def hooked() -> nn.Module:
    """Hooks change what a layer reads and returns, and keep a feature that is read later."""
    held = Held(summed, body=conv_bn(8, 8, padding=1), second=conv_bn(8, 8, padding=1), kept={})
    held.body.register_forward_hook(lambda module, given, result: held.kept.__setitem__("body", result))
    held.second.register_forward_hook(lambda module, given, result: result * 2)
    held.second.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    return Wide(held)


def test_hooks_are_part_of_the_network():
    net = settle(hooked(), SPEC)
    graph = captured(net)
    assert len(names(graph, nn.Conv2d)) == 4


def test_what_functions_enclose_is_copied_with_the_network():
    """A hook of the copy keeps the copy's feature."""
    net = settle(hooked(), SPEC)
    copied = plain(net)
    net.tried.body[0].weight.data.zero_()
    net(SPEC.probe(5))
    assert copied(SPEC.probe(2)).shape[0] == 2
    assert len(copied.tried.kept["body"]) == 2 and len(net.tried.kept["body"]) == 5


class Named(nn.BatchNorm2d):
    """A BatchNorm with its activation in it, as timm has it."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


def test_an_activation_in_a_layer_stands_beside_it():
    """A BatchNorm that no layer can take becomes a layer itself, without what stood in it."""
    body = nn.Sequential(Named(8), nn.Conv2d(8, 8, 1), Named(8))
    network = settle(Wide(Held(lambda net, x: net.body(torch.cat([x[:, 4:], x[:, :4]], 1)), body=body)))
    graph = captured(network)
    assert {"tried.body.0", "tried.body.0_act", "tried.body.2", "tried.body.2_act"} <= set(names(graph))
    assert quantize_data_free(network, SPEC, Recipe(equalize=True, quantize=True)).simulated


@dataclass
class Out:
    logits: torch.Tensor
    features: list


def test_outputs_in_dataclasses_are_found():
    net = settle(Held(lambda net, x: Out(net.body(x).mean((2, 3)), [x, None]), body=conv_bn(3, 8)), SPEC)
    model = scored(net, SPEC, 2)
    assert model.names[0] == "logits"
    assert modules(captured(model))["Conv2d"] == 1


def test_an_output_made_for_every_image_leaves_the_batch_free():
    """Anchors beside logits. The network's first output is a row for every image already."""

    def run(net, x):
        return {"logits": net.body(x).mean((2, 3)), "anchors": torch.full((x.shape[0], 4), 0.5)}

    graph = captured(scored(settle(Held(run, body=conv_bn(3, 8)), SPEC), SPEC, 2))
    assert graph.meta["batch"] is None
    result = quantize_data_free(graph, SPEC, Recipe(quantize=True))
    sizes = [[tuple(one.shape) for one in lower_to_integers(result.simulated)(SPEC.probe(n))] for n in (1, 5)]
    assert sizes == [[(1, 8), (1, 4)], [(5, 8), (5, 4)]]


# ------------------------------------------------------------------------------------------- parts


def test_wrappers_of_parts_are_taken_off():
    parts = [conv_bn(8, 8), torch.compile(conv_bn(8, 8), backend="eager"), nn.DataParallel(conv_bn(8, 8))]
    graph = captured(Wide(nn.Sequential(*parts)))
    assert names(graph, nn.Conv2d) == ["first.0", "tried.0.0", "tried.1.0", "tried.2.0", "last"]


def test_scripted_parts_are_refused_by_name():
    model = Wide(nn.Sequential(conv_bn(8, 8), torch.jit.trace(conv_bn(8, 8).eval(), torch.zeros(1, 8, 9, 9))))
    with pytest.raises(UserError, match=r"'tried\.1' in the network is a scripted or traced"):
        plain(model)


def test_steps_of_quantization_aware_training_are_an_activation():
    steps = torch.ao.quantization.FakeQuantize()
    steps.disable_observer()
    steps.scale.fill_(0.05)
    network = Wide(nn.Sequential(conv_bn(8, 8), steps))
    steps.enable_fake_quant()
    assert modules(captured(network))["Elementwise"] == 1
    steps.disable_fake_quant()
    assert modules(captured(network))["Elementwise"] == 0


@pytest.mark.parametrize(
    "draw",
    [
        lambda net, x: F.dropout(net.body(x)),
        lambda net, x: net.body(x + 0.1 * torch.randn_like(x)),
        lambda net, x: net.body(x) * (torch.rand(8, 1, 1) > 0.5),
        lambda net, x: net.body(x) * torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 0.5)),
        lambda net, x: F.gumbel_softmax(net.body(x), dim=1),
    ],
)
def test_networks_that_draw_random_numbers_are_refused(draw):
    with pytest.raises(UserError, match="draws random numbers in evaluation too"):
        capture(Wide(Held(draw, body=conv_bn(8, 8))).eval(), SPEC)


def attention(net, x):
    rows = x.flatten(2)
    return F.scaled_dot_product_attention(rows, rows, rows).reshape(x.shape)


def recurrent(net, x):
    return x * net.layer(x.mean((2, 3))[:, None])[0].transpose(1, 2)[..., None]


def test_dropout_that_follows_the_mode_draws_none():
    parts = [nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.RReLU()]
    parts += [Held(attention), Held(recurrent, layer=nn.LSTM(8, 8, 2, batch_first=True, dropout=0.2))]
    assert modules(captured(Wide(nn.Sequential(*parts))))["Elementwise"] == 1


GAIN = 1 + torch.arange(8.0)[:, None, None] / 8
INVERSE_ROOTS = {
    "rsqrt": lambda v: torch.rsqrt(v + 1e-6),
    "times a gain": lambda v: GAIN * (v + 1e-6).rsqrt(),
    "a power": lambda v: (v + 1e-6) ** -0.5,
    "one over": lambda v: 1 / (v + 1e-6).sqrt(),
    "a number over": lambda v: torch.div(torch.tensor(2.0), (v + 1e-6).sqrt()),
    "reciprocal": lambda v: GAIN * (v + 1e-6).sqrt().reciprocal() * 0.5,
}


@pytest.mark.parametrize("inverse", INVERSE_ROOTS.values(), ids=INVERSE_ROOTS)
def test_a_norm_that_multiplies_by_an_inverse_is_one_that_divides(inverse):
    """Rounded, the inverse of what is near 0 at some positions would leave nothing of all others."""
    torch.manual_seed(0)
    norm = Held(lambda _, x: x * inverse(x.square().mean(1, keepdim=True)))
    model = settle(Wide(nn.Sequential(conv_bn(8, 8), norm)).eval(), SPEC)
    graph = captured(model)
    assert [node.target for node in graph.graph.nodes].count(torch.ops.aten.div.Tensor) == 1
    images = SPEC.probe(4, seed=3)
    assert sqnr(model(images), quantize_data_free(model, SPEC, Recipe(quantize=True)).simulated(images)) > 20
