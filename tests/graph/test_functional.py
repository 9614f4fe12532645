"""In-place operators: what they mean is kept, and nothing is written in the graph."""

import pytest
import torch
import torch.nn.functional as F
from networks import SMALL
from torch import nn

from utils.graph.capture import capture
from utils.graph.functional import functional_form, functionalize
from utils.graph.layers import Clip
from utils.graph.nodes import module_of, shape

aten = torch.ops.aten


class InPlace(nn.Module):
    """A function of two layers' outputs that writes to them."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.function(self.a(x), self.b(x))


def relu_before_a_skip(a, b):
    return torch.cat([a.relu_(), a + b], 1)  # both read the rectified a


def relu_behind_a_reader(a, b):
    before = a + b
    return torch.cat([before, F.relu(a, inplace=True), a], 1)


def add_on_a_residual(a, b):
    a += b
    return F.relu_(a) + a


def several_in_a_row(a, b):
    return a.mul_(2.0).add_(b).clamp_(-1.0, 1.0) - a


def what_is_returned_is_the_same(a, b):
    c = a.add_(b)
    c.relu_()
    return torch.cat([a, b], 1)


def a_branch_that_is_not_read(a, b):
    b.relu_()
    return a.relu()


def dropout_of_a_view(a, b):
    return F.dropout(torch.flatten(a + b, 1), training=False, inplace=True)


def constants_of_python(a, b):
    return torch.maximum(a, torch.tensor(-1.0)) + torch.minimum(b, torch.tensor(1.0)) + torch.tensor([[0.5]])


def viewed_after_it_is_written(a, b):
    a.relu_().add_(b)
    return a.flatten(1) + a[:, :2].repeat(1, 2, 1, 1).flatten(1)


def masked(a, b):
    a[a < 0] = 0
    return a + b


UNSHARED = [
    relu_before_a_skip,
    relu_behind_a_reader,
    add_on_a_residual,
    several_in_a_row,
    what_is_returned_is_the_same,
    a_branch_that_is_not_read,
    dropout_of_a_view,
    constants_of_python,
    viewed_after_it_is_written,
    masked,
]


def slice_is_written(a, b):
    a[:, :2] = b[:, 2:]
    return a


def no_slice_is_written(a, b):
    a[:, 3:1] = b[:, 3:1]
    return a * b


def view_is_written(a, b):
    a.view(a.shape[0], -1).relu_()
    return a + b


def written_after_a_view(a, b):
    half = a[:, :2]
    a.relu_()
    return half * 2


def view_of_what_was_written_is_written(a, b):
    rectified = a.relu_()
    rectified.flatten(1).add_(1.0)
    return rectified * b


def part_is_written(a, b):
    first, second = a.chunk(2, 1)
    first.add_(second)
    return a - b


def filled(a, b):
    result = torch.zeros_like(a)
    result[:, ::2] = a[:, ::2]
    result[:, 1] += b[:, 3]
    return result


def position_is_written(a, b):
    a[:, 1] = b[:, 3].sigmoid()
    a[:, -1] = b[:, 0]
    return a


def every_second_is_written(a, b):
    a[:, 1::2] = b[:, :2]
    return a


def slice_of_a_slice_is_written(a, b):
    a[:, 1:][:, :2, 3] = b[:, :2, 3]
    return a.relu_() + b


SLICES = [
    position_is_written,
    every_second_is_written,
    slice_is_written,
    no_slice_is_written,
    filled,
    slice_of_a_slice_is_written,
]


def slice_is_read_after_it_is_written_again(a, b):
    half = a[:, :2].add_(1.0)
    a[:, 1:] = b[:, 1:]
    return torch.cat([a, half], 1)


def view_is_read_between_slices_are_written(a, b):
    a[:, :2] = b[:, 2:]
    flat = a.flatten(1)
    a[:, 2:] = b[:, :2]
    return flat + b.flatten(1)


SHARED_MEMORY = [
    view_is_written,
    written_after_a_view,
    view_of_what_was_written_is_written,
    part_is_written,
    slice_is_read_after_it_is_written_again,
    view_is_read_between_slices_are_written,
]


def writers(graph):
    return [node for node in graph.graph.nodes if getattr(getattr(node.target, "_schema", None), "is_mutable", False)]


@pytest.mark.parametrize("function", [*UNSHARED, *SLICES, *SHARED_MEMORY], ids=lambda function: function.__name__)
def test_what_is_written_in_place_is_captured_exactly(function):
    model = InPlace(function).eval()
    graph = capture(model, SMALL)
    assert writers(graph) == []
    for images in (1, 3):
        x = SMALL.probe(images, seed=images)
        torch.testing.assert_close(graph(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", [*UNSHARED, *SLICES, *SHARED_MEMORY], ids=lambda function: function.__name__)
def test_only_shared_memory_needs_torchs_own_functionalization(function, monkeypatch):
    program = torch.export.export(InPlace(function).eval(), (SMALL.probe(2),), strict=False)
    decomposed = []
    monkeypatch.setattr(type(program), "run_decompositions", lambda self, table: decomposed.append(table) or self)
    functionalize(program)
    assert decomposed == ([{}] if function in SHARED_MEMORY else [])


def test_an_in_place_activation_and_its_readers_read_one_clip():
    graph = capture(InPlace(relu_before_a_skip), SMALL)
    (clip,) = [node for node in graph.graph.nodes if isinstance(module_of(graph, node), Clip)]
    assert {user.target for user in clip.users} == {aten.cat.default, aten.add.Tensor}
    assert clip.args[0].target == "a" and list(clip.args[0].users) == [clip]


def test_a_residual_that_is_added_in_place_is_a_sum():
    graph = capture(InPlace(add_on_a_residual), SMALL)
    (add,) = [node for node in graph.graph.nodes if node.target is aten.add.Tensor]
    assert [part.target for part in add.args] == ["a", "b"] and shape(add) == (1, 4, 16, 16)


def test_functional_forms():
    assert functional_form(aten.relu_.default) is aten.relu.default
    assert functional_form(aten.add_.Scalar) is aten.add.Scalar
    assert functional_form(aten.relu.default) is None  # it is one
    assert functional_form(aten.zero_.default) is aten.zero.default


@pytest.mark.parametrize("function", [position_is_written, every_second_is_written])
def test_positions_written_in_place_are_moved_by_operators_of_the_table(function):
    graph = capture(InPlace(function), SMALL)
    called = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert called <= {aten.cat.default, aten.slice.Tensor, aten.reshape.default, aten.index_select.default}
