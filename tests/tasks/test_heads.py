"""Whatever an own detector returns, its coder gets its heads; what cannot be told is said."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import main_det
from modeling import Network
from modeling.detection import box_coder
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.graph.capture import capture
from utils.tasks.boxes import BoxCoder, Coder
from utils.tasks.detection import coder_as_data, coder_from, count_classes
from utils.tasks.heads import with_heads

SPEC = InputSpec(size=(16, 16), resize=16)
PRIORS = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5], [0.25, 0.75, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
BOXES = BoxCoder(PRIORS)


class Heads(nn.Module):
    """Four cells of logits and offsets, in the form that returned() gives them."""

    def __init__(self, returned, classes: int = 3):
        super().__init__()
        self.returned, self.classes = returned, classes
        generator = torch.Generator().manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, classes + 4, 2, stride=2)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        self.eval()

    def forward(self, images: Tensor):
        rows = self.head(self.body(images)).flatten(2).transpose(1, 2)
        return self.returned(rows[..., : self.classes], rows[..., self.classes :])


class Maps(Coder):
    """Of one map or several [N, P, classes + 4]."""

    background = False

    def decode(self, outputs):
        rows = torch.cat([outputs] if isinstance(outputs, Tensor) else list(outputs), 1)
        return rows[..., :-4].sigmoid(), rows[..., -4:]


def expected(model: nn.Module) -> tuple[Tensor, Tensor]:
    return Heads(lambda logits, offsets: (logits, offsets))(SPEC.probe(2))


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (lambda c, b: [c, b], ""),
        (lambda c, b: (c, b, c.mean((1, 2))), ""),
        (
            lambda c, b: (b, c),
            "outputs output_0, output_1: output_1 is taken for class logits, output_0 for box offsets",
        ),
        (lambda c, b: {"cls_logits": c, "bbox_regression": b}, "cls_logits is taken for class logits, bbox_regression"),
        (lambda c, b: {"features": b.mean(1), "boxes": b, "scores": c}, "scores is taken for class logits, boxes for"),
        (lambda c, b: {"cls": c, "box": b, "centerness": c[..., :1]}, "cls is taken for class logits, box for"),
        (lambda c, b: (c[..., :1], c, b), "output_1 is taken for class logits, output_2 for box offsets"),
        (lambda c, b: {"heads": (b, c)}, "heads.output_1 is taken for class logits, heads.output_0 for box offsets"),
    ],
)
def test_logits_and_offsets_are_found_in_what_a_network_returns(returned, told, capsys):
    model = with_heads(Heads(returned), SPEC, BOXES)
    printed = capsys.readouterr().out
    assert told in printed and bool(told) == bool(printed)
    for network in (model, capture(model, SPEC)):
        outputs = network(SPEC.probe(2))
        for found, wanted in zip(outputs, expected(model), strict=False):
            torch.testing.assert_close(found, wanted)
        assert BOXES.fits(outputs)
    assert count_classes(model, SPEC, BOXES) == 3


@pytest.mark.parametrize(("scores", "boxes"), [("conf", "loc"), ("box_cls", "box_delta")])
def test_names_tell_logits_of_four_classes_from_offsets(scores, boxes):
    network = Heads(lambda c, b: {boxes: b, scores: c}, classes=4)
    logits, offsets = with_heads(network, SPEC, BOXES)(SPEC.probe(2))
    found = network(SPEC.probe(2))
    assert torch.equal(logits, found[scores]) and torch.equal(offsets, found[boxes])


def test_what_is_not_clear_is_refused_with_names_and_shapes():
    model = with_heads(Heads(lambda c, b: {"a": c, "b": b, "c": c}), SPEC, BOXES)
    with pytest.raises(UserError, match=r"returns a \(1, 4, 3\), b \(1, 4, 4\), c \(1, 4, 3\); .*define coder\(size\)"):
        count_classes(model, SPEC, BOXES)


def test_scores_that_have_been_through_a_softmax_are_refused():
    with pytest.raises(UserError, match="the network's output_0 add up to 1 over the classes"):
        with_heads(Heads(lambda c, b: (c.softmax(-1), b)), SPEC, BOXES)


@pytest.mark.parametrize(
    "returned",
    [
        lambda c, b: torch.cat([c, b], 2),
        lambda c, b: [torch.cat([c, b], 2)],
        lambda c, b: {"p3": torch.cat([c, b], 2)[:, :1], "p4": torch.cat([c, b], 2)[:, 1:]},
    ],
)
def test_an_own_coder_gets_the_same_from_the_network_its_graph_and_its_file(returned, tmp_path, monkeypatch, capsys):
    network = Heads(returned)
    network.coder = lambda size: Maps()
    model = with_heads(network, SPEC, Maps())
    scores = expected(model)[0].sigmoid()
    for one in (model, capture(model, SPEC)):
        torch.testing.assert_close(Maps().decode(one(SPEC.probe(2)))[0], scores)
    monkeypatch.setattr("main_det.build_model", lambda *_: Network(network, SPEC, "a:b", "a:b"))
    main_det.main(["--model", "a:b", "--quantize", "--image_size", "16", "--export", str(tmp_path / "net.onnx")])
    assert "top-1 agreement 100.00 %" in capsys.readouterr().out


def test_without_a_background_each_class_has_a_sigmoid():
    coder, outputs = replace(BOXES, background=False), expected(None)
    scores, boxes = coder.decode(outputs)
    torch.testing.assert_close(scores, outputs[0].sigmoid())
    torch.testing.assert_close(boxes, BOXES.decode(outputs)[1])
    assert 0 in coder.detect(outputs)[0].labels and 0 not in BOXES.detect(outputs)[0].labels
    logits = torch.full((1, 4, 3), -9.0)
    logits[0, 2, 0] = 1.0
    assert coder.predictions((logits, outputs[1][:1])).tolist() == [[-1, -1, 0, -1]]
    assert coder_from(coder_as_data(coder)).background is False
    assert BOXES.predictions((logits.roll(1, 2), outputs[1][:1])).tolist() == [[-1, -1, 1, -1]]


def test_a_detector_without_a_coder_is_told_whose_priors_it_gets(capsys):
    coder = box_coder(nn.Identity(), SPEC)
    told = f"Identity has no coder(size), so its outputs are taken for SSD-Lite's: {len(coder.priors)} priors"
    assert told in capsys.readouterr().out
