"""A user's own coder: what is wrong with it is told."""

import pytest
import torch
from torch import nn

from modeling.detection import box_coder
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.tasks.boxes import BoxCoder, Coder
from utils.tasks.detection import count_classes
from utils.tasks.heads import with_heads

SPEC = InputSpec(size=(64, 64), resize=64)


class _Undefined(Coder):
    def decode(self, outputs):
        raise KeyError("cls")


class _Flat(Coder):
    def decode(self, outputs):
        return outputs.flatten(1), outputs.flatten(2)


@pytest.mark.parametrize(
    ("coder", "told"),
    [
        (_Undefined(), "what its coder(size) decodes: decode() fails: KeyError: 'cls'"),
        (_Flat(), "decode() gives (1, 12288) and (1, 3, 4096), not scores [N, P, classes] and boxes [N, P, 4]"),
    ],
)
def test_a_mistake_in_an_own_decode_is_told(coder, told):
    with pytest.raises(UserError) as refused:
        count_classes(nn.Identity(), SPEC, coder)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("coder", "told"),
    [
        (BoxCoder(torch.zeros(1, 4)), "coder of Identity is a BoxCoder; make it a method"),
        (lambda: None, "coder((64, 64)) of Identity (height, width) fails: TypeError"),
        (lambda size: None, "coder((64, 64)) of Identity returns a NoneType; it must return a Coder"),
    ],
)
def test_a_coder_of_the_wrong_kind_is_refused(coder, told):
    model = nn.Identity()
    model.coder = coder
    with pytest.raises(UserError) as refused:
        box_coder(model, SPEC)
    assert told in str(refused.value)


GRID = torch.cartesian_prod(torch.arange(4) / 4 + 0.125, torch.arange(4) / 4 + 0.125)
CENTRED = torch.cat([GRID, torch.full((16, 2), 0.2)], 1)


@pytest.mark.parametrize(
    ("priors", "told"),
    [
        (CENTRED[:, :3], r"gets priors of shape \(16, 3\)"),
        (64 * CENTRED, "gets priors with centres of up to 56, so in pixels"),
    ],
)
def test_priors_of_another_form_are_refused(priors, told):
    with pytest.raises(UserError, match=told + "; it takes"):
        BoxCoder(priors)


@pytest.mark.parametrize("sides", [(0.5, 0.7, 0.9), (0.97, 1.4, 3.0), (1.0, 1.0, 1.0)])
def test_large_anchors_are_priors(sides, capsys):
    priors = [[x, y, w, h] for x in (0.25, 0.5) for y in (0.25, 0.5) for w in sides for h in sides]
    coder = BoxCoder(priors)
    assert coder.doubt(None) is None or max(sides) <= 1  # corners may look so too: told, and not refused
    assert coder.fits((torch.zeros(1, 36, 3), torch.zeros(1, 36, 4)))


def test_priors_that_look_like_corners_are_told():
    assert "look like corners" in BoxCoder(torch.cat([GRID - 0.1, GRID + 0.1], 1)).doubt(None)
    assert BoxCoder(CENTRED).doubt(None) is None


class _Focal(BoxCoder):
    """As one was written before BoxCoder had the flag: probabilities, offsets first, priors in pixels."""

    background = False

    def decode(self, outputs):
        offsets, scores = outputs
        return scores, self.boxes(offsets)


def test_a_subclass_that_decodes_by_itself_gets_what_the_network_returns():
    coder = _Focal(64 * CENTRED)
    assert coder.background is False and BoxCoder(CENTRED).background is True
    assert BoxCoder(CENTRED, background=False).background is False

    class Returns(nn.Module):
        def forward(self, images):
            return {"boxes": torch.zeros(len(images), 16, 4), "scores": torch.full((len(images), 16, 2), 0.5)}

    model = with_heads(Returns(), SPEC, coder)
    assert [one.shape[2] for one in model(SPEC.probe(1))] == [4, 2]
    assert count_classes(model, SPEC, coder) == 2


def test_a_decode_that_gives_no_score_is_told():
    with pytest.raises(UserError, match="decode\\(\\) gives no score"):
        count_classes(nn.Identity(), SPEC, _Empty())


class _Empty(Coder):
    def decode(self, outputs):
        return torch.zeros(1, 0, 3), torch.zeros(1, 0, 4)


def test_priors_may_be_an_array_or_a_list():
    for priors in (CENTRED.numpy(), CENTRED.tolist()):
        torch.testing.assert_close(BoxCoder(priors).priors, CENTRED)


class _As(Coder):
    """Gives the scores and boxes that the network returns."""

    def decode(self, outputs):
        return outputs


@pytest.mark.parametrize(
    ("scores", "boxes", "told"),
    [
        (torch.full((1, 16, 2), 3.0), CENTRED[None], "gives scores from 3 to 3, not between 0 and 1"),
        (torch.rand(1, 16, 2), 64 * CENTRED[None], "gives boxes of up to 56, not fractions"),
        (torch.rand(1, 16, 2), CENTRED[None], "they look like centre and size"),
        (torch.rand(1, 16, 2), torch.cat([GRID - 0.1, GRID + 0.1], 1)[None], ""),
    ],
)
def test_values_that_look_wrong_are_told(scores, boxes, told, capsys):
    class Returns(nn.Module):
        def forward(self, images):
            return scores, boxes

    assert count_classes(Returns(), SPEC, _As()) == 2
    printed = capsys.readouterr().out
    assert told in printed and bool(told) == bool(printed)
