"""Capture: the network as one functional graph, under the user's names, for any batch; or refused with its place."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, SMALL, SPEC, Twice, chain, conv_bn, made, modules_in, randomise
from torch import nn

from dfq import Recipe, quantize_data_free
from utils.core import torchvision_compat  # noqa: F401, before timm imports torchvision
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.graph.capture import capture
from utils.graph.layers import Clip
from utils.graph.nodes import module_of, shape, weighted_nodes
from utils.passes.fold_batchnorm import fold_batchnorm
from utils.passes.log import PassLog


def calls(graph):
    """The class of every module and the name of every operator, in order."""
    nodes = [node for node in graph.graph.nodes if node.op.startswith("call")]
    modules = [(node, module_of(graph, node)) for node in nodes]
    return [node.target._opname if module is None else type(module).__name__ for node, module in modules]


def layer_names(graph):
    return [node.target for node in weighted_nodes(graph)]


@pytest.mark.parametrize("name", NETWORKS)
def test_capture_copies_and_keeps_the_output_for_any_batch(name):
    model, graph = made(NETWORKS[name], randomise)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for images in (1, 5):
        torch.testing.assert_close(graph(SPEC.probe(images)), model(SPEC.probe(images)), rtol=1e-5, atol=1e-6)
    for module in graph.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data.zero_()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_a_captured_network_is_copied():
    _, graph = made(chain)
    again = capture(graph, SPEC)
    torch.testing.assert_close(again(SPEC.probe()), graph(SPEC.probe()), rtol=0, atol=0)
    again.get_submodule("0.0").weight.zero_()
    assert graph.get_submodule("0.0").weight.any()


class Functional(nn.Module):
    """Everything as functions and methods, some of them in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc, self.drop = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2), nn.Dropout(0.5)

    def forward(self, x):
        x = F.relu(self.a(x), inplace=True)
        x = F.max_pool2d(x, 2)
        y = torch.clamp(self.b(x), 0, 6)
        y += F.hardtanh(x, 0.0, 6.0)
        y = F.avg_pool2d(y, kernel_size=2)
        y = y.mean([2, 3])
        torch._assert(x.dim() == 4, "never")
        return self.fc(self.drop(F.dropout(y.view(y.size(0), -1), training=self.training)))


def test_functions_and_methods_are_captured_as_what_they_are():
    graph = capture(Functional(), SMALL)
    assert calls(graph) == [
        *("Conv2d", "Clip", "max_pool2d", "Conv2d", "Clip", "Clip", "add", "avg_pool2d", "mean", "reshape", "Linear"),
    ]
    assert [float(clip.high) for clip in modules_in(graph, Clip)] == [torch.inf, 6, 6]
    model = Functional().eval()
    torch.testing.assert_close(capture(model, SMALL)(SMALL.probe(3)), model(SMALL.probe(3)))


def test_shapes_are_those_of_one_image():
    graph = capture(nn.Conv2d(3, 4, 3, stride=2), InputSpec(size=(20, 28)))
    images, conv, _ = graph.graph.nodes
    assert (shape(images), shape(conv)) == ((1, 3, 20, 28), (1, 4, 9, 13)) and graph.meta["batch"] is None


def test_modules_keep_the_users_names():
    _, graph = made(NETWORKS["residual"])
    assert layer_names(graph) == ["stem.0", "inner.0", "outer.0", "head.linear"]
    named = {
        node.target: type(module_of(graph, node)).__name__ for node in graph.graph.nodes if node.op == "call_module"
    }
    assert (named["stem.1"], named["stem.2"]) == ("BatchNorm2d", "Clip")


def test_every_layer_has_a_bias_and_places_for_its_grids():
    _, graph = made(chain)
    for node in weighted_nodes(graph):
        layer = module_of(graph, node)
        assert layer.bias is not None and layer.weight_qparams is None and layer.bias_qparams is None


def test_a_layer_used_twice_becomes_two_with_copies():
    model = Twice().eval()
    graph = capture(model, SMALL)
    assert layer_names(graph) == ["shared", "shared_1"]
    first, second = (graph.get_submodule(name) for name in ("shared", "shared_1"))
    assert torch.equal(first.weight, second.weight) and first.weight.data_ptr() != second.weight.data_ptr()
    torch.testing.assert_close(graph(SMALL.probe(2)), model(SMALL.probe(2)))
    first.weight.zero_()
    assert second.weight.any()


def test_an_activation_used_twice_is_two_activations():
    class TwiceActive(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU6()

        def forward(self, x):
            return self.act(self.b(self.act(self.a(x))))

    graph = capture(TwiceActive(), SMALL)
    assert calls(graph) == ["Conv2d", "Clip", "Conv2d", "Clip"]
    first, second = modules_in(graph, Clip)
    assert first is not second


class Subclass(nn.Conv2d):
    """A layer of the user's own, with weights that are computed."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


class Tied(nn.Module):
    """A linear layer that uses a convolution's weights."""

    def __init__(self):
        super().__init__()
        self.own, self.conv = Subclass(3, 4, 3), nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x):
        x = F.relu(self.conv(self.own(x)))
        return F.linear(x.mean((2, 3)), self.conv.weight.flatten(1))


def test_subclasses_computed_and_shared_weights_are_plain_layers():
    model = Tied().eval()
    graph = capture(model, SMALL)
    assert calls(graph) == ["Conv2d", "Conv2d", "Clip", "mean", "reshape", "Linear"]
    assert layer_names(graph)[0] == "own" and layer_names(graph)[1] == "conv"
    weight = graph.get_submodule("own").weight
    torch.testing.assert_close(weight.mean((1, 2, 3)), torch.zeros(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(graph(SMALL.probe(2)), model(SMALL.probe(2)))


class Projections(nn.Module):
    """Weights of its own beside layers: what they make must not stand in the layers' way."""

    def __init__(self):
        super().__init__()
        self.in_proj_weight, self.out = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = F.conv2d(x, self.in_proj_weight)
        return F.conv2d(self.out(x), 2 * self.out.weight)


def test_no_layer_stands_inside_another():
    graph = capture(nn.Sequential(Projections()), SMALL)
    *names, last = layer_names(graph)
    assert names == ["0.in_proj", "0.out"] and last.startswith("0.conv2d")
    assert all(not list(module_of(graph, node).children()) for node in weighted_nodes(graph))


def test_what_does_not_depend_on_the_image_is_a_constant():
    class Anchored(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(5, 4, 1)

        def forward(self, x):
            rows = torch.linspace(-1, 1, x.shape[2]).view(1, 1, -1, 1).expand(x.shape[0], 2, -1, x.shape[3])
            return self.conv(torch.cat([x, rows], 1))

    model = Anchored().eval()
    graph = capture(model, SMALL)
    for images in (1, 3):
        torch.testing.assert_close(graph(SMALL.probe(images)), model(SMALL.probe(images)))
    assert "linspace" not in calls(graph)


def test_several_outputs_stay_several():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1)

        def forward(self, x):
            return [self.a(x), (self.b(x), None)]

    model = Several().eval()
    first, second = capture(model, SMALL)(SMALL.probe(2))
    torch.testing.assert_close(first, model(SMALL.probe(2))[0])
    torch.testing.assert_close(second, model(SMALL.probe(2))[1][0])


def test_a_network_of_one_image_says_so():
    class OneImage(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            if len(x) != 1:
                raise ValueError("one image at a time")
            return self.conv(x)

    model = OneImage().eval()
    graph = capture(model, SMALL)
    torch.testing.assert_close(graph(SMALL.probe(1)), model(SMALL.probe(1)))
    assert graph.meta["batch"] == 1


class OfOneImage(nn.Module):
    """Takes its input for one image: more of them are mixed up, and no error says so."""

    def __init__(self):
        super().__init__()
        self.convolution, self.head = conv_bn(3, 6, padding=1), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.convolution(x).reshape(1, 6, -1).mean(2))


def test_what_gives_one_answer_to_any_number_of_images_takes_one():
    model = randomise(OfOneImage())
    assert capture(model, SPEC).meta["batch"] == 1
    result = quantize_data_free(model, SPEC, Recipe(quantize=True, equalize=True, correction=True))
    assert result.simulated(SPEC.probe(1)).shape == (1, 5) and result.log.counts()["equalized"]["applied"] == 1


def test_control_flow_that_depends_on_values_is_refused_with_its_place():
    class Branching(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(UserError, match=r"depends on its values \(at .*test_capture\.py:\d+, forward\).*torch\.where"):
        capture(Branching(), SMALL)


def test_a_network_that_fails_is_refused_in_its_own_words():
    with pytest.raises(UserError, match=r"fails on images of shape \(2, 3, 16, 16\): RuntimeError: .*[Kk]ernel size"):
        capture(nn.Sequential(nn.Conv2d(3, 4, 7), nn.Conv2d(4, 4, 30)), SMALL)


def test_a_scripted_network_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript itself
        scripted = torch.jit.trace(nn.Conv2d(3, 4, 1), SMALL.probe(1))
    with pytest.raises(UserError, match=r"TorchScript module; pass the nn\.Module that it was made from"):
        capture(scripted, SMALL)


def test_training_mode_wrappers_and_double_are_left_behind():
    model = nn.DataParallel(nn.Sequential(conv_bn(3, 4), nn.Dropout(0.5))).double().train()
    graph = capture(model, SMALL)
    assert model.training and model.module[0][0].weight.dtype is torch.double
    expected = model.module.float().eval()(SMALL.probe(2))
    torch.testing.assert_close(graph(SMALL.probe(2)), expected)
    assert layer_names(graph) == ["0.0"]


def test_computed_parametrizations_are_captured_as_their_values():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU()).eval()
    graph = capture(model, SMALL)
    assert calls(graph) == ["Conv2d", "Clip"]
    torch.testing.assert_close(graph(SMALL.probe(2)), model(SMALL.probe(2)))


@pytest.mark.parametrize("groups", [1, 2])
def test_batchnorm_folds_into_a_transposed_convolution(groups):
    model = nn.Sequential(nn.ConvTranspose2d(3 * groups, 4, 3, stride=2, groups=groups), nn.BatchNorm2d(4))
    model = randomise(nn.Sequential(nn.Conv2d(3, 3 * groups, 1), *model))
    graph = capture(model, SMALL)
    fold_batchnorm(graph, PassLog())
    assert calls(graph) == ["Conv2d", "ConvTranspose2d"]
    torch.testing.assert_close(graph(SMALL.probe(2)), model(SMALL.probe(2)), rtol=1e-5, atol=1e-5)


def test_timm_layers_become_plain_ones():
    from timm.layers import BatchNormAct2d, Conv2dSame

    first = [Conv2dSame(3, 8, 3, stride=2, bias=False), BatchNormAct2d(8, act_layer=nn.ReLU6)]
    model = randomise(
        nn.Sequential(*first, Conv2dSame(8, 8, 5, stride=2, groups=8), BatchNormAct2d(8, apply_act=False))
    )
    spec = InputSpec(size=(15, 18))  # where TensorFlow's padding differs by side
    graph = capture(model, spec)
    fold_batchnorm(graph, PassLog())
    assert calls(graph) == ["pad", "Conv2d", "Clip", "pad", "Conv2d"]
    torch.testing.assert_close(graph(spec.probe(2)), model(spec.probe(2)), rtol=1e-4, atol=1e-5)
