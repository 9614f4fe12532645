"""A user's own coder: what is wrong with it is told."""

import pytest
import torch
from torch import nn

from modeling.detection import box_coder
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.tasks.boxes import BoxCoder, Coder
from utils.tasks.detection import count_classes

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
