"""Control flow on what does not depend on the images is followed; on what does, it is refused in one line."""

from collections.abc import Callable

import pytest
import torch
from networks import SPEC, conv_bn
from test_wordings import captured, modules
from torch import nn

from utils.core.errors import UserError
from utils.core.torchvision_compat import torchvision
from utils.graph.capture import _export, _OfImages, capture


class Body(nn.Module):
    """A layer, and what is asked about constants before and behind it."""

    def __init__(self, ask: Callable):
        super().__init__()
        self.ask, self.body = ask, conv_bn(3, 8, 3)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.register_buffer("steps", torch.tensor([2, 3]))
        self.register_buffer("ready", torch.tensor(True))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        return self.ask(self, x)


def normalize(net, x):
    return net.body(torchvision.transforms.functional.normalize(x, [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]))


def checked_deviation(net, x):
    deviation = torch.tensor([0.2, 0.3, 0.25], device=x.device)
    if (deviation <= 0).any() or not torch.isfinite(deviation).all():
        raise ValueError("deviations are positive")
    return net.body(x / deviation[:, None, None])


def flag(net, x):
    return net.body(x) * net.scale.view(1, -1, 1, 1) if net.ready else x


def number(net, x):
    y = net.body(x)
    return y * 3 if net.scale.abs().max().item() > 1 and float(net.scale[0]) < 1 and int(net.calls) == 0 else y


def steps(net, x):
    y = net.body(x)
    for step in net.steps.tolist():
        y = y[:, :, ::step] + step
    return y


def mask(net, x):
    """A constant that is written to, through a view of it too."""
    chosen = torch.zeros(8)
    chosen[2:] = 1
    half = chosen.view(2, 4)
    half[1] += 2
    return net.body(x) + (5 if chosen.sum() == 14 else 0)


def counted(net, x):
    """A buffer that is counted up, as some networks do in evaluation too."""
    calls = net.calls + 1
    return net.body(x) * (2 if calls > 0 else 1)


ASKED = {f.__name__: f for f in (normalize, checked_deviation, flag, number, steps, mask, counted)}


@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_of_constants_is_known(name):
    graph = captured(Body(ASKED[name]))
    assert modules(graph)["Conv2d"] == 1
    assert graph.meta["batch"] is None


def of_image(net, x):
    return net.body(x) if x.mean() > 0 else net.body(-x)


def of_constant_written_by_image(net, x):
    total = torch.zeros(2)
    total[0] = x.sum()
    return net.body(x) if total.max() > 0 else net.body(-x)


def of_mask_joined_by_image(net, x):
    bright = torch.zeros(2, dtype=torch.bool)
    bright |= x.sum() > 0
    return net.body(x) if bright.any() else net.body(-x)


def sliced_by_image(net, x):
    return net.body(x)[:, :, : int(x.abs().sum() * 0 + 5)]


@pytest.mark.parametrize("ask", [of_image, of_constant_written_by_image, of_mask_joined_by_image, sliced_by_image])
def test_what_is_asked_of_images_is_refused(ask):
    with pytest.raises(UserError, match="depends on its values"):
        capture(Body(ask).eval(), SPEC)


def masked_in_place(net, x):
    """PixelCNN's masks."""
    net.body[0].weight.data *= net.taps
    return net.body(x)


def masked_anew(net, x):
    net.body[0].weight.data = net.body[0].weight.data * net.taps
    return net.body(x)


def masked_without_gradient(net, x):
    with torch.no_grad():
        net.body[0].weight.masked_fill_(net.taps == 0, 0.0)
    return net.body(x)


@pytest.mark.parametrize("forward", [masked_in_place, masked_anew, masked_without_gradient])
def test_a_mask_that_is_written_into_weights_is_in_the_graphs_weights(forward):
    network = Body(forward).eval()
    network.register_buffer("taps", (torch.arange(9) < 5).float().view(3, 3))
    before = network.body[0].weight.detach().clone()
    graph = capture(network, SPEC)
    assert torch.equal(network.body[0].weight, before)  # the network itself stays as it is
    assert torch.equal(graph.get_submodule("body.0").weight, before * network.taps)
    torch.testing.assert_close(graph(SPEC.probe(3)), network(SPEC.probe(3)))


def test_data_of_a_value_is_the_value():
    network = Body(lambda net, x: net.body(x).data * 2).eval()
    torch.testing.assert_close(captured(network)(SPEC.probe(3)), network(SPEC.probe(3)))


def test_a_network_that_computes_with_constants_is_exported_in_one_piece():
    """torch.export cuts a graph wherever gradients are switched, which takes minutes for networks of many layers."""

    def forward(net, x):
        with torch.no_grad():
            x = net.body(x)
        return x * (net.scale * 2).view(1, -1, 1, 1)

    with torch.no_grad():
        program = _export(_OfImages(Body(forward).eval()), SPEC.probe(2), None)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(isinstance(target, torch._ops.OpOverload) for target in called)


class Picked(nn.Module):
    """Channels or positions that a mask in a buffer picks, read or written."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function, self.body = function, conv_bn(3, 8, 3)
        self.register_buffer("channels", torch.tensor([1, 0, 1, 1, 0, 1, 0, 1]).bool())
        self.register_buffer("cells", torch.eye(22).bool())

    def forward(self, x):
        return self.function(self, self.body(x).clone())


def _set(picked: Picked, x: torch.Tensor) -> torch.Tensor:
    x[:, picked.channels] = 0
    return x


def _add(picked: Picked, x: torch.Tensor) -> torch.Tensor:
    x[:, picked.channels] += 1
    return x


@pytest.mark.parametrize(
    "function",
    [
        _set,
        _add,
        lambda picked, x: x[:, picked.channels],
        lambda picked, x: x[:, ~picked.channels].mean(1),
        lambda picked, x: x[..., picked.cells],
        lambda picked, x: x.transpose(0, 1)[picked.channels].transpose(0, 1),
    ],
)
def test_what_a_constant_mask_picks_is_known(function):
    model = Picked(function).eval()
    images = SPEC.probe(3)
    torch.testing.assert_close(capture(model, SPEC)(images), model(images))
