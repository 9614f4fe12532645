"""A detector's heads: whatever a network returns, in the order in which its coder takes them."""

from typing import Any

import torch
from torch import Tensor, nn

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.networks import Scored, failing_in_a_line, named_tensors
from utils.tasks.boxes import BoxCoder, Coder


def run_once(model: nn.Module, spec: InputSpec) -> Any:
    """What the network returns for one image of its input; a network that fails on it is a UserError."""
    images = spec.probe(1)
    with failing_in_a_line(images), torch.inference_mode():
        return model(images)


def with_heads(model: nn.Module, spec: InputSpec, coder: Coder) -> nn.Module:
    """The network as it is where it returns one tensor or several in a list; else wrapped so that it hands out such.

    For a BoxCoder class logits come first and offsets second, by their names and shapes; which are taken is said. Scores
    that are no logits any more are a UserError. For coders with a decode() of their own tensors keep their order, and a
    list of one is that tensor, as engines hand it out.
    """
    result = run_once(model, spec)
    tensors, several = dict(named_tensors(result)), isinstance(result, tuple | list) and len(result) > 1
    flat = isinstance(result, Tensor) or (several and all(isinstance(one, Tensor) for one in result))
    if not coder.takes_heads:
        return model if flat or not tensors else Scored(model, tuple(tensors), flatten=False)
    heads = coder.heads(tensors)
    if flat and coder.fits(result):
        heads = tuple(tensors)[:2]
    if heads is None:
        return model  # which count_classes() refuses
    _check_logits(tensors[heads[0]], heads[0], coder)
    if flat and heads == tuple(tensors)[:2]:
        return model
    print(f"outputs {', '.join(tensors)}: {heads[0]} is taken for class logits, {heads[1]} for box offsets")
    return Scored(model, (*heads, *(name for name in tensors if name not in heads)), flatten=False)


def _check_logits(scores: Tensor, name: str, coder: BoxCoder) -> None:
    sums = scores.sum(-1)
    if (
        coder.background
        and scores.shape[-1] > 1
        and scores.min() >= 0
        and torch.allclose(sums, torch.ones_like(sums), atol=1e-4)
    ):
        raise UserError(
            f"the network's {name} add up to 1 over the classes, so they have been through a softmax; let it return class "
            "logits and box offsets, as they are before softmax and decoding"
        )
