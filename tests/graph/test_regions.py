"""Regions: which channels can be rescaled, and exactly where they are read."""

import pytest
import torch
import torch.nn.functional as F
from networks import SMALL, Branches, Head, Residual, chain, conv_bn
from torch import nn

from utils.graph.capture import capture
from utils.graph.layers import channels_in
from utils.graph.regions import ELSEWHERE, ChannelSlice, find_regions
from utils.passes.equalization import apply_scale
from utils.passes.fold_batchnorm import fold_batchnorm
from utils.passes.log import PassLog

Sinks = list[tuple[str, list[int], bool]]  # name, index and keeps_constants


class Net(nn.Module):
    """A stem of eight channels, a function of its output, and what further layers it calls."""

    def __init__(self, function, stem=8, **layers):
        super().__init__()
        self.stem, self.function = nn.Conv2d(3, stem, 1), function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, self.stem(x))


def squeeze_excitation(net, x):
    x = F.relu(x)
    gate = torch.sigmoid(net.up(F.relu(net.down(x.mean((2, 3), keepdim=True)))))
    return net.a(x * gate)


def shuffled(net, x):
    x = x.view(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
    return net.a(x)


def pooled(net, x):
    return net.a(F.pad(F.max_pool2d(F.relu(x), 2), (1, 1))), net.b(F.interpolate(F.avg_pool2d(x, 2), scale_factor=2))


def conv(before: int = 8, after: int = 4, kernel: int = 1, **options) -> nn.Module:
    return nn.Conv2d(before, after, kernel, **options)


NETS = {
    "chain": chain,
    "residual": Residual,
    "branches": Branches,
    "flatten": lambda: Net(lambda net, x: net.a(F.adaptive_avg_pool2d(x, 2).flatten(1)), a=nn.Linear(32, 3)),
    "shuffle": lambda: Net(shuffled, a=conv(groups=2)),
    "nn.ChannelShuffle": lambda: Net(lambda net, x: net.a(net.shuffle(x)), shuffle=nn.ChannelShuffle(2), a=conv()),
    "slice": lambda: Net(lambda net, x: (net.a(x[:, 2:6]), net.b(x.chunk(2, 1)[1])), a=conv(4), b=conv(4)),
    "squeeze-excitation": lambda: Net(squeeze_excitation, down=conv(8, 2), up=conv(2, 8), a=conv()),
    "product": lambda: Net(lambda net, x: net.b(x * net.a(x)), a=conv(8, 8), b=conv()),
    "pooling": lambda: Net(pooled, a=conv(), b=conv(8, 4, 3, padding=1)),
    "leaky": lambda: Net(lambda net, x: net.a(net.act(x)), act=nn.PReLU(8), a=conv()),
    "silu": lambda: Net(lambda net, x: net.a(F.silu(x)), a=conv()),
    "hardtanh": lambda: Net(lambda net, x: net.a(F.hardtanh(x)), a=conv()),
    "transposed": lambda: Net(lambda net, x: net.a(x), a=nn.ConvTranspose2d(8, 4, 2, 2, groups=2)),
    "roll": lambda: Net(lambda net, x: net.a(x.roll(3, 1)), a=conv()),
    "twice in a concat": lambda: Net(lambda net, x: net.a(torch.cat([x, F.relu(x)], 1)), a=conv(16)),
}


@pytest.fixture(scope="module")
def graphs():
    """The captured and folded networks, each made when it is first asked for."""
    made = {}

    def graph(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = capture(NETS[name]().eval(), SMALL)
            fold_batchnorm(made[name], PassLog())
        return made[name]

    return graph


def regions_of(graph, through_sums: bool = False) -> dict[tuple[str, ...], Sinks]:
    regions = find_regions(graph, through_sums)[0]
    return {region.sources: [(s.name, s.index.tolist(), s.keeps_constants) for s in region.sinks] for region in regions}


def plain(channels: int) -> list[int]:
    return list(range(channels))


@pytest.mark.parametrize("through_sums", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_scaling_every_region_leaves_the_output(graphs, name, through_sums):
    graph = capture(graphs(name), SMALL)
    images = SMALL.probe(2)
    before = graph(images)
    regions, _ = find_regions(graph, through_sums)
    assert regions
    for i, region in enumerate(regions):
        scale = torch.logspace(-1, 1, region.channels, base=4).roll(i)
        apply_scale(graph, region, scale, {})
    after = graph(images)
    for a, b in zip(*((out if isinstance(out, tuple) else (out,)) for out in (before, after)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_a_chain(graphs):
    regions, refused = find_regions(graphs("chain"))
    assert regions_of(graphs("chain")) == {
        ("0.0",): [("1.0", plain(8), False)],  # which pads
        ("1.0",): [("2.0", plain(8), True)],
        ("2.0",): [("3.linear", plain(12), True)],
    }
    assert [region.channels for region in regions] == [8, 8, 12]
    for region, clip in zip(regions, ("0.2", "1.2", "2.2"), strict=True):
        assert region.rectified and not region.tied and region.source == region.sources[0]
        assert [(c.name, c.index.tolist()) for c in region.clips] == [(clip, plain(region.channels))]
    assert refused == {"3.linear": "read by the network's output"}


def test_a_residual_block(graphs):
    regions, refused = find_regions(graphs("residual"))
    assert regions_of(graphs("residual")) == {("inner.0",): [("outer.0", plain(8), False)]}
    assert regions[0].rectified and regions[0].clips == ()
    assert refused["stem.0"].startswith("read by add") and refused["outer.0"] == refused["stem.0"]


def test_the_layers_of_a_sum_are_one_region(graphs):
    regions, refused = find_regions(graphs("residual"), through_sums=True)
    (tied,) = [region for region in regions if region.tied]
    assert regions_of(graphs("residual"), True)["stem.0", "outer.0"] == [
        ("inner.0", plain(8), False),
        ("head.linear", plain(8), True),
    ]
    assert not tied.rectified and list(refused) == ["head.linear"]


def test_a_concat_knows_its_channels(graphs):
    assert regions_of(graphs("branches")) == {
        ("left.0",): [("reader.0", [*plain(6), *[ELSEWHERE] * 4], True)],
        ("right.0",): [("reader.0", [*[ELSEWHERE] * 6, *plain(4)], True)],
        ("reader.0",): [("head.linear", plain(8), True)],
    }


def test_channels_own_their_positions_behind_flatten(graphs):
    assert regions_of(graphs("flatten")) == {("stem",): [("a", [c for c in range(8) for _ in range(4)], True)]}


@pytest.mark.parametrize(
    ("name", "index"), [("shuffle", [0, 4, 1, 5, 2, 6, 3, 7]), ("nn.ChannelShuffle", [0, 4, 1, 5, 2, 6, 3, 7])]
)
def test_shuffles_move_channels(graphs, name, index):
    assert regions_of(graphs(name)) == {("stem",): [("a", index, True)]}


def test_slices_and_rolls_move_channels(graphs):
    assert regions_of(graphs("slice")) == {("stem",): [("a", [2, 3, 4, 5], True), ("b", [4, 5, 6, 7], True)]}
    two_ways = [("a", [*[ELSEWHERE] * 3, 0, 1, 2, 3, 4], True), ("a", [5, 6, 7, *[ELSEWHERE] * 5], True)]
    assert sorted(regions_of(graphs("roll"))["stem",]) == two_ways


def test_a_channel_may_arrive_twice(graphs):
    halves = [("a", [*plain(8), *[ELSEWHERE] * 8], True), ("a", [*[ELSEWHERE] * 8, *plain(8)], True)]
    assert sorted(regions_of(graphs("twice in a concat"))["stem",], reverse=True) == halves


def test_a_product_passes_the_scale_of_one_of_its_operands(graphs):
    regions, _ = find_regions(graphs("squeeze-excitation"))
    assert regions_of(graphs("squeeze-excitation")) == {
        ("stem",): [("down", plain(8), True), ("a", plain(8), False)],  # a product is no constant
        ("down",): [("up", plain(2), True)],
        ("up",): [],  # ends in the gate's sigmoid
    }
    assert not regions[0].rectified and regions[1].rectified
    assert [(gain.name, gain.index.tolist()) for gain in regions[2].gains] == [("sigmoid_default", plain(8))]
    assert regions_of(graphs("product"))[("a",)] == [("b", plain(8), False)]


def test_pooling_and_resizing_pass_a_scale_and_padding_no_constants(graphs):
    regions, _ = find_regions(graphs("pooling"))
    assert regions_of(graphs("pooling")) == {("stem",): [("b", plain(8), False), ("a", plain(8), False)]}
    assert not regions[0].rectified  # one way has no ReLU


def test_a_function_that_no_scale_passes_ends_one_region_and_begins_another(graphs):
    before, behind = find_regions(graphs("silu"))[0]
    assert before.source == "stem" and before.sinks == () and not before.rectified
    assert [(gain.name, gain.index.tolist()) for gain in before.gains] == [("silu_default", plain(8))]
    assert behind.source == "silu_default" and behind.gains == () and behind.channels == 8
    assert [(sink.name, sink.index.tolist()) for sink in behind.sinks] == [("a", plain(8))]


def test_functions_that_a_scale_passes(graphs):
    (leaky,), _ = find_regions(graphs("leaky"))
    assert leaky.clips == () and not leaky.rectified
    (tanh,), _ = find_regions(graphs("hardtanh"))
    assert [clip.index.tolist() for clip in tanh.clips] == [plain(8)] and not tanh.rectified


REFUSED = {
    "offset": (lambda net, x: net.a(x + 1), None),
    "of itself": (lambda net, x: net.a(x * F.max_pool2d(x, 3, 1, 1)), "read by mul 'mul_tensor'"),
    "with its mean": (lambda net, x: net.a(x * x.mean((2, 3), keepdim=True)), "read by mul 'mul_tensor'"),
    "mixed": (lambda net, x: net.c(F.pixel_shuffle(x, 2)), "read by Conv2d 'c', whose channels mix several of its own"),
    "padded with ones": (lambda net, x: net.a(F.pad(x, (1, 1), value=1.0)), "read by pad 'pad_default'"),
    "softmax": (lambda net, x: net.a(torch.softmax(x, 1)), "read by softmax 'softmax_int'"),
    "output": (lambda net, x: (x, net.a(x)), "read by the network's output"),
    "norm": (lambda net, x: net.a(net.norm(F.relu(x))), "read by BatchNorm2d 'norm', which is not folded"),
    "mean of channels": (lambda net, x: net.a(x - x.mean(1, keepdim=True)), None),
    "along the width": (lambda net, x: net.a(net.line(x)), "read by linear layer 'line' along another axis"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_scale_does_not_pass_is_refused_with_its_reason(name):
    function, reason = REFUSED[name]
    net = Net(function, a=conv(), c=conv(2), norm=nn.BatchNorm2d(8), line=nn.Linear(16, 16)).eval()
    regions, refused = find_regions(capture(net, SMALL))
    assert "stem" not in [region.source for region in regions]
    assert refused["stem"].endswith(reason) if reason else refused["stem"].startswith("read by ")


def test_a_linear_layer_on_the_last_of_three_axes_has_no_region():
    net = Net(lambda net, x: net.b(net.line(x.flatten(2).mT)), line=nn.Linear(8, 8), b=nn.Linear(8, 3))
    _, refused = find_regions(capture(net, SMALL))
    assert refused["line"] == "its channels are not the second axis"


def test_a_layer_that_is_called_twice_is_two_layers_of_regions_of_their_own():
    net = Net(lambda net, x: net.a(net.a(x)), a=conv(8, 8))
    assert regions_of(capture(net, SMALL)) == {("stem",): [("a", plain(8), True)], ("a",): [("a_1", plain(8), True)]}


def test_values_of_a_regions_channels_at_a_sink_and_back():
    sink = ChannelSlice("sink", torch.tensor([2, ELSEWHERE, 0, 0]))
    values = torch.tensor([10.0, 20.0, 30.0])
    torch.testing.assert_close(sink.gather(values, elsewhere=1.0), torch.tensor([30.0, 1.0, 10.0, 10.0]))
    largest = sink.reduce(torch.tensor([1.0, 9.0, 3.0, 5.0]), 3)
    torch.testing.assert_close(largest, torch.tensor([5.0, 0.0, 1.0]))  # nobody reads channel 1
    assert sink.reduce(torch.tensor([-1.0, 9.0, -3.0, -5.0]), 3, lowest=-7.0).tolist() == [-3.0, -7.0, -1.0]


@pytest.mark.parametrize("name", NETS)
def test_a_sinks_index_is_as_long_as_its_input(graphs, name):
    graph = graphs(name)
    for region in find_regions(graph)[0]:
        for sink in region.sinks:
            assert len(sink.index) == channels_in(graph.get_submodule(sink.name))
            assert set(sink.index.tolist()) <= {ELSEWHERE, *range(region.channels)}


def test_heads_read_what_is_pooled():
    model = nn.Sequential(conv_bn(3, 6, activation=nn.ReLU6), Head(6)).eval()
    graph = capture(model, SMALL)
    fold_batchnorm(graph, PassLog())
    assert regions_of(graph) == {("0.0",): [("1.linear", plain(6), True)]}
