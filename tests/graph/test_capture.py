"""Tracing to canonical form, and the exact links found in it."""

import pytest
import torch
import torch.nn.functional as F
from networks import SPEC, Branches, Head, Residual, Twice, chain, conv_bn
from torch import nn

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.graph.capture import capture
from utils.graph.nodes import module_of, shape
from utils.graph.regions import ChannelSlice, find_regions
from utils.passes.fold_batchnorm import fold_batchnorm
from utils.passes.log import PassLog


def folded(model, spec=SPEC):
    traced = capture(model.eval(), spec)
    fold_batchnorm(traced, PassLog())
    return traced


def kinds(traced):
    return [type(module).__name__ for node in traced.graph.nodes if (module := module_of(traced, node)) is not None]


def test_trace_copies_and_keeps_the_output():
    model = chain().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    traced = folded(model)
    torch.testing.assert_close(traced(SPEC.probe()), model(SPEC.probe()))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


class Functional(nn.Module):
    """The operations of canonical form, spelled as functions and methods."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc, self.drop = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2), nn.Dropout(0.5)

    def forward(self, x):
        x = F.relu(self.a(x), inplace=True)
        x = F.max_pool2d(x, 2)
        y = torch.clamp(self.b(x), 0, 6)
        y += F.hardtanh(x, 0.0, 6.0)
        y = F.avg_pool2d(y.relu(), kernel_size=2)
        y = y.mean([2, 3])
        torch._assert(True, "never")
        return self.fc(self.drop(F.dropout(y.view(y.size(0), -1), training=self.training)))


def test_functions_become_modules():
    traced = capture(Functional(), SPEC)
    assert kinds(traced) == [
        *("Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU6", "ReLU6", "ReLU", "AvgPool2d"),
        *("AdaptiveAvgPool2d", "Flatten", "Linear"),
    ]
    model = Functional().eval()
    torch.testing.assert_close(capture(model, SPEC)(SPEC.probe()), model(SPEC.probe()))


def test_shapes_are_those_of_one_image():
    traced = capture(chain(), InputSpec(size=(20, 28)))
    assert shape(next(iter(traced.graph.nodes))) == (1, 3, 20, 28)


def test_links_of_a_chain():
    links, refused = find_regions(folded(chain()))
    assert [(link.producer, link.readers) for link in links] == [
        ("0.0", (ChannelSlice("1.0", keeps_constants=False),)),
        ("1.0", (ChannelSlice("2.0"),)),
        ("2.0", (ChannelSlice("3.linear"),)),
    ]
    assert all(link.rectified and len(link.clips) == 1 for link in links)
    assert refused == {"3.linear": "read by the network's output"}


def test_links_of_a_residual_block():
    links, refused = find_regions(folded(Residual()))
    assert [(link.producer, [port.name for port in link.readers]) for link in links] == [("inner.0", ["outer.0"])]
    assert refused["stem.0"] == refused["outer.0"] == "read by add 'add'"


def test_links_through_a_concat_know_their_columns():
    links, _ = find_regions(folded(Branches()))
    ports = {link.producer: link.readers for link in links}
    assert ports["left.0"] == (ChannelSlice("reader.0"),)
    assert ports["right.0"] == (ChannelSlice("reader.0", offset=6),)


def test_links_through_flatten_own_their_positions():
    model = nn.Sequential(conv_bn(3, 4, 1), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 2))
    links, _ = find_regions(folded(model))
    assert links[0].readers == (ChannelSlice("3", repeat=9),)


class Forked(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return torch.cat([self.a(x), F.interpolate(self.b(x), scale_factor=1.0)], 1)


def test_every_reader_of_a_fork_is_in_its_link():
    links, _ = find_regions(folded(Forked()))
    assert links[0].readers == (ChannelSlice("a", keeps_constants=False), ChannelSlice("b"))


def test_standalone_batchnorm_becomes_a_depthwise_convolution():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv, self.head = nn.BatchNorm2d(3), conv_bn(3, 8), Head(8)

        def forward(self, x):
            return self.head(self.conv(torch.relu(self.norm(x))))

    model = PreActivation().eval()
    model.norm.running_mean.normal_()
    traced = folded(model)
    assert traced.norm.groups == 3 and traced.norm.kernel_size == (1, 1)
    torch.testing.assert_close(traced(SPEC.probe()), model(SPEC.probe()))


@pytest.mark.parametrize("groups", [1, 2])
def test_batchnorm_folds_into_a_transposed_convolution(groups):
    model = nn.Sequential(nn.ConvTranspose2d(3 * groups, 4, 3, stride=2, groups=groups), nn.BatchNorm2d(4))
    model = nn.Sequential(nn.Conv2d(3, 3 * groups, 1), *model).eval()
    model[2].running_var.uniform_(0.5, 2)
    model[2].weight.uniform_(0.5, 2)
    torch.testing.assert_close(folded(model)(SPEC.probe()), model(SPEC.probe()))


def test_a_layer_used_twice_is_refused_by_name():
    with pytest.raises(UserError, match="layer 'shared' is used 2 times"):
        capture(Twice(), SPEC)


def test_an_activation_used_twice_is_two_activations():
    class TwiceActive(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU6()

        def forward(self, x):
            return self.act(self.b(self.act(self.a(x))))

    traced = capture(TwiceActive(), SPEC)
    assert len({node.target for node in traced.graph.nodes if node.op == "call_module"}) == 4


def test_what_fx_cannot_trace_is_refused_with_its_place():
    class Branching(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(UserError, match=r"cannot trace.*test_graph\.py:\d+, forward"):
        capture(Branching(), SPEC)


def test_an_input_too_small_is_refused():
    with pytest.raises(UserError, match="check --image_size"):
        capture(nn.Sequential(nn.Conv2d(3, 4, 7), nn.Conv2d(4, 4, 30)), SPEC)


def test_timm_layers_become_plain_ones():
    from modeling.efficientnet_lite import efficientnet_lite0

    spec = InputSpec(size=(64, 48))
    model = efficientnet_lite0(7).eval()
    traced = folded(model, spec)
    assert not {"Conv2dSame", "BatchNormAct2d", "BatchNorm2d"} & set(kinds(traced))
    torch.testing.assert_close(traced(spec.probe()), model(spec.probe()), rtol=1e-4, atol=1e-5)


def test_links_through_the_sums_of_a_residual_block():
    links, refused = find_regions(folded(Residual()), through_sums=True)
    (tied,) = [link for link in links if link.tied]
    assert tied.producers == ("stem.0", "outer.0")
    assert {port.name for port in tied.readers} == {"inner.0", "head.linear"}
    assert list(refused) == ["head.linear"]
