"""The user's own network: package.module:factory."""

import difflib
import importlib
import os
import sys
from collections.abc import Iterable

from torch import nn

from modeling.checkpoint import fit, read_checkpoint
from utils.core.errors import UserError
from utils.core.networks import other_type, plain


def build_from_factory(place: str, weights: str | None, key: str | None = None) -> nn.Module:
    """The network that `factory()` of 'package.module:factory' returns, with a checkpoint if one is given.

    key: of the state dict in the checkpoint. The working folder is searched too.
    """
    made = _call(place)
    model = plain(made)
    if kind := other_type(made):
        print(f"{place}: the network's weights are {kind}; they are taken as float32")
    return fit(model, read_checkpoint(weights, key), weights) if weights else model


def _call(place: str) -> nn.Module:
    module_name, _, factory_name = place.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"cannot import {module_name!r} of --model {place}: {error}") from None
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise UserError(f"{module_name!r} has no function {factory_name!r}, which --model {place} names")
    try:
        model = factory()
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"{place}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{place}() returned {type(model).__name__}; it must return a torch.nn.Module")
    return model


def near_matches(name: str, names: Iterable[str]) -> str:
    """' (did you mean ...?)' with the names most like this one, or nothing."""
    matches = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""
