"""One way of writing each operation: what the wordings of shapes, parts, padding, pooling and layers become."""

import pytest
import torch
import torch.nn.functional as F
from networks import SMALL, Fan, modules_in, ways
from torch import fx, nn

from utils.graph.capture import capture
from utils.graph.layers import ChannelAffine, Elementwise
from utils.graph.nodes import module_of

aten = torch.ops.aten
RESHAPE, PERMUTE, SLICE = aten.reshape.default, aten.permute.default, aten.slice.Tensor
CAT, PAD, MEAN = aten.cat.default, aten.pad.default, aten.mean.dim
MAX, AVERAGE, LARGEST = aten.max_pool2d.default, aten.avg_pool2d.default, aten.amax.default
FLAT = [(RESHAPE, [-1, 4 * 16 * 16])]
TO_POSITION = [(MEAN, [2, 3], True)]
POOLED = [*TO_POSITION, (RESHAPE, [-1, 4])]
HALVES = (MAX, [2, 2], [2, 2], [0, 0], [1, 1], False)
CHANNELS_LAST = [(PERMUTE, [0, 2, 3, 1])]


def averaged(x):
    return x.mean((2, 3), keepdim=True)


# Functions of [N, 4, 16, 16], and the calls that they become, with all arguments that are no tensors.
SHAPES = {
    "view": (lambda x: x.view(x.size(0), -1), FLAT),
    "flatten": (lambda x: torch.flatten(x, 1), FLAT),
    "nn_Flatten": (nn.Flatten(), FLAT),
    "two views": (lambda x: x.view(-1, 4, 256).view(-1, 8, 128), [(RESHAPE, [-1, 8, 128])]),
    "unsqueeze, squeeze": (lambda x: x.unsqueeze(2).squeeze(2), []),
    "permute": (lambda x: x.permute(0, 2, 3, 1), CHANNELS_LAST),
    "movedim": (lambda x: x.movedim(1, -1), CHANNELS_LAST),
    "transpose": (lambda x: x.transpose(-1, -2), [(PERMUTE, [0, 1, 3, 2])]),
    "mT": (lambda x: x.mT, [(PERMUTE, [0, 1, 3, 2])]),
    "no permute": (lambda x: x.permute(0, 1, 2, 3), []),
    "shuffle": (
        lambda x: x.view(x.shape[0], 2, 2, 16, 16).transpose(1, 2).reshape(x.shape),
        [(RESHAPE, [-1, 2, 2, 16, 16]), (PERMUTE, [0, 2, 1, 3, 4]), (RESHAPE, [-1, 4, 16, 16])],
    ),
    "expand": (lambda x: x[:, :1].expand(-1, 4, -1, -1), [(SLICE, 1, 0, 1, 1), (aten.expand.default, [-1, 4, -1, -1])]),
}
PARTS = {
    "chunk": (lambda x: x.chunk(2, 1)[1], [(SLICE, 1, 2, 4, 1)]),
    "split": (lambda x: torch.split(x, [1, 3], 1)[1], [(SLICE, 1, 1, 4, 1)]),
    "narrow": (lambda x: x.narrow(1, 1, 2), [(SLICE, 1, 1, 3, 1)]),
    "slice": (lambda x: x[:, 1:3], [(SLICE, 1, 1, 3, 1)]),
    "negative": (lambda x: x[..., -3:], [(SLICE, 3, 13, 16, 1)]),
    "steps": (lambda x: x[:, :, ::2, 1::2], [(SLICE, 2, 0, 16, 2), (SLICE, 3, 1, 16, 2)]),
    "select": (lambda x: x[:, 2], [(SLICE, 1, 2, 3, 1), (RESHAPE, [-1, 16, 16])]),
    "unbind": (lambda x: x.unbind(1)[3], [(SLICE, 1, 3, 4, 1), (RESHAPE, [-1, 16, 16])]),
    "everything": (lambda x: x[:, :], []),
    "one part": (lambda x: torch.cat([x], 1), []),
    "roll": (lambda x: x.roll(3, 2), [(SLICE, 2, 13, 16, 1), (SLICE, 2, 0, 13, 1), (CAT, 2)]),
    "hstack": (lambda x: torch.hstack([x[:, 2:], x[:, :1]]), [(SLICE, 1, 2, 4, 1), (SLICE, 1, 0, 1, 1), (CAT, 1)]),
    "stack": (
        lambda x: torch.stack([x, x], 1),
        [(RESHAPE, [-1, 1, 4, 16, 16]), (RESHAPE, [-1, 1, 4, 16, 16]), (CAT, 1)],
    ),
}
PADDING = {
    "F_pad": (lambda x: F.pad(x, (1, 2, 3, 4)), [(PAD, [1, 2, 3, 4], "constant", 0.0)]),
    "ZeroPad2d": (nn.ZeroPad2d(2), [(PAD, [2, 2, 2, 2], "constant", 0.0)]),
    "value": (lambda x: F.pad(x, (1, 1), value=2.0), [(PAD, [1, 1], "constant", 2.0)]),
    "reflect": (nn.ReflectionPad2d(2), [(PAD, [2, 2, 2, 2], "reflect", None)]),
    "replicate": (nn.ReplicationPad2d(1), [(PAD, [1, 1, 1, 1], "replicate", None)]),
    "circular": (
        lambda x: F.pad(x, (1, 2, 0, 0), mode="circular"),
        [(SLICE, 3, 15, 16, 1), (SLICE, 3, 0, 2, 1), (CAT, 3)],
    ),
    "cut": (lambda x: F.pad(x, (-1, -2, 1, 0)), [(SLICE, 3, 1, 14, 1), (PAD, [0, 0, 1, 0], "constant", 0.0)]),
    "none": (lambda x: F.pad(x, (0, 0)), []),
}
POOLING = {
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d(1), TO_POSITION),
    "kept mean": (averaged, TO_POSITION),
    "whole window": (lambda x: F.avg_pool2d(x, 16), TO_POSITION),
    "window of its size": (lambda x: F.avg_pool2d(x, x.shape[2:]).flatten(1), POOLED),
    "mean": (lambda x: x.mean((2, 3)), POOLED),
    "mean of mean": (lambda x: x.mean(3).mean(2), POOLED),
    "flat mean": (lambda x: x.flatten(2).mean(2), POOLED),
    "halved": (lambda x: F.adaptive_avg_pool2d(x, 8), [(AVERAGE, [2, 2], [2, 2])]),
    "same": (lambda x: F.adaptive_avg_pool2d(x, 16), []),
    "AvgPool2d": (nn.AvgPool2d(3, 2, 1), [(AVERAGE, [3, 3], [2, 2], [1, 1], False, True)]),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), [HALVES]),
    "with indices": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], [HALVES]),
    "MaxPool2d": (nn.MaxPool2d(3, 2, 1), [(MAX, [3, 3], [2, 2], [1, 1], [1, 1], False)]),
    "AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d(1), [(LARGEST, [2], True), (LARGEST, [3], True)]),
    "amax": (lambda x: x.amax((2, 3)), [(LARGEST, [2, 3], True), (RESHAPE, [-1, 4])]),
    "max": (lambda x: x.max(3)[0], [(LARGEST, [3], True), (RESHAPE, [-1, 4, 16])]),
}
ARITHMETIC = {
    "multiply": (lambda x: torch.multiply(x, averaged(x)), [*TO_POSITION, (aten.mul.Tensor,)]),
    "expanded first": (lambda x: x * averaged(x).expand_as(x), [*TO_POSITION, (aten.mul.Tensor,)]),
    "rsub": (lambda x: torch.rsub(x, averaged(x)), [*TO_POSITION, (aten.sub.Tensor,)]),
    "larger of two": (lambda x: torch.max(x, averaged(x)), [*TO_POSITION, (aten.maximum.default,)]),
    "smaller of two": (lambda x: x.min(averaged(x)), [*TO_POSITION, (aten.minimum.default,)]),
    "true_divide": (lambda x: torch.true_divide(x, averaged(x)), [*TO_POSITION, (aten.div.Tensor,)]),
}
NOTHING = {
    "Dropout": (nn.Dropout(0.5), []),
    "dropout2d": (lambda x: F.dropout2d(x, training=False), []),
    "copies": (lambda x: x.contiguous().clone().detach().float(), []),
}
CALLS = SHAPES | PARTS | PADDING | POOLING | ARITHMETIC | NOTHING
WEIGHT = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
LEFT = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
PRODUCTS = {  # linear layers, however they are written
    "nn_Linear": nn.Linear(16, 3),
    "matmul": lambda x: x @ WEIGHT,
    "einsum": lambda x: torch.einsum("nchw,wo->ncho", x, WEIGHT),
    "F_linear": lambda x: F.linear(x, WEIGHT.T),
}
SUMS = {"sum": lambda x: x.sum((2, 3)), "scaled term": lambda x: torch.add(x, averaged(x), alpha=2)}


@pytest.fixture(scope="module")
def captured():
    with torch.no_grad():
        torch.manual_seed(0)
        fan = Fan({name: function for name, (function, _) in CALLS.items()} | PRODUCTS | SUMS).eval()
        graph = capture(fan, SMALL)
        return fan, graph, ways(graph, fan)


@pytest.mark.parametrize("images", [1, 3])
def test_every_wording_computes_what_it_did(captured, images):
    fan, graph, _ = captured
    x = SMALL.probe(images)
    for name, before, after in zip(fan.functions, fan(x), graph(x), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def call(node: fx.Node) -> tuple:
    """A call without the tensors that it reads."""
    return node.target, *(a for a in node.args if not (isinstance(a, fx.Node) or _holds_nodes(a)))


def _holds_nodes(argument: object) -> bool:
    return isinstance(argument, list | tuple) and any(isinstance(entry, fx.Node) for entry in argument)


@pytest.mark.parametrize("name", CALLS)
def test_a_wording_has_one_canonical_form(captured, name):
    way = captured[2][name]
    assert all(node.op == "call_function" and not node.kwargs for node in way)
    assert [call(node) for node in way] == CALLS[name][1]


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_a_constant_matrix_is_a_linear_layer(captured, name):
    fan, graph, found = captured
    (node,) = found[name]
    layer = module_of(graph, node)
    weight = fan.functions[name].weight if name == "nn_Linear" else WEIGHT.T
    bias = fan.functions[name].bias if name == "nn_Linear" else torch.zeros(3)
    assert type(layer) is nn.Linear and layer.weight_qparams is None and layer.bias_qparams is None
    assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)


@pytest.mark.parametrize("way", [lambda x: LEFT @ x, lambda x: torch.bmm(LEFT.expand(len(x), -1, -1), x)])
def test_a_product_from_the_left_is_a_convolution_of_width_1(way):
    fan = Fan({"way": lambda x: way(x.flatten(2))}).eval()
    graph = capture(fan, SMALL)
    (layer,) = modules_in(graph, nn.Conv1d)
    assert torch.equal(layer.weight, LEFT[:, :, None])
    torch.testing.assert_close(graph(SMALL.probe(3)), fan(SMALL.probe(3))[0])


def test_a_sum_over_positions_is_their_mean_times_their_number(captured):
    _, graph, found = captured
    *calls, last = found["sum"]
    assert [call(node) for node in calls] == POOLED
    affine = module_of(graph, last)
    assert type(affine) is ChannelAffine and (float(affine.scale), float(affine.shift)) == (256, 0)


def test_a_scaled_term_is_scaled_before_the_sum(captured):
    _, graph, found = captured
    _, factor, total = found["scaled term"]
    assert float(module_of(graph, factor).scale) == 2 and total.target is aten.add.Tensor
    assert total.args[1] is factor


def test_a_gated_linear_unit_is_one_half_times_the_sigmoid_of_the_other():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GLU(1)).eval()
    graph = capture(model, SMALL)
    product = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    while isinstance(product, list | tuple):
        (product,) = product
    values, gate = product.args
    assert product.target is aten.mul.Tensor and call(values) == (SLICE, 1, 0, 2, 1)
    assert type(module_of(graph, gate)) is Elementwise and call(gate.args[0]) == (SLICE, 1, 2, 4, 1)
    x = SMALL.probe(3)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


class Layers(nn.Module):
    """Convolutions of every kind, some without a bias, padded as words say, and called as functions."""

    def __init__(self):
        super().__init__()
        self.same = nn.Conv2d(3, 4, (3, 2), padding="same", bias=False)
        self.circular = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1, groups=1)
        self.line = nn.Conv1d(3, 4, 3)
        self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))

    def forward(self, x):
        return self.same(x), self.circular(x), self.up(x), self.line(x.flatten(2)), F.conv2d(x, self.weight, stride=2)


def test_layers_of_every_kind_are_modules_that_pad_with_zeros_alike():
    model = Layers().eval()
    graph = capture(model, SMALL)
    x = SMALL.probe(2)
    for before, after in zip(model(x), graph(x), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    kinds = {"same": nn.Conv2d, "circular": nn.Conv2d, "up": nn.ConvTranspose2d, "line": nn.Conv1d, "weight": nn.Conv2d}
    for name, kind in kinds.items():
        (layer,) = [module for own, module in graph.named_modules() if own in (name, f"{name}_1")]
        assert type(layer) is kind and layer.bias is not None
        assert layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    # An even kernel pads one side more: by itself. A wrapped border is put there by slices.
    pads = [node.args[1] for node in graph.graph.nodes if node.target is PAD]
    assert pads == [[0, 1, 1, 1]] and graph.same.padding == (0, 0)
    assert sum(node.target is CAT for node in graph.graph.nodes) == 2


def test_batchnorm_of_a_functional_call_is_a_module():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=0.01)

        def forward(self, x):
            norm = self.norm
            return F.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight, None, False, 0.1, 0.01)

    model = Functional().eval()
    model.norm.running_mean.normal_()
    graph = capture(model, SMALL)
    norm = graph.get_submodule("norm")
    assert type(norm) is nn.BatchNorm2d and norm.eps == 0.01
    assert torch.equal(norm.running_mean, model.norm.running_mean) and not norm.bias.any()
    torch.testing.assert_close(graph(SMALL.probe(2)), model(SMALL.probe(2)))
