"""What today's search takes by a recorded ranking."""

import math

import pytest

from utils.core.errors import UserError
from utils.experiment.recipe_search import ranking_of
from utils.graph.layers import Clip
from utils.passes.log import PassLog
from utils.passes.result import Quantized
from utils.quantization.recipe import SETTINGS
from utils.search import candidates
from utils.search.candidates import stages, start
from utils.search.judge import Judgement
from utils.search.replay import replayed
from utils.search.search import search


def recorded(noise, bits=8, real=False, network=None):
    """A line of a search whose candidates are as near as noise, of a recipe, says; None: it cannot be run."""
    first, seen = start({"bits_weight": bits}), []

    def quantize(recipe):
        if noise(recipe) is None:
            raise UserError("not here")
        seen.append(recipe)
        return Quantized(None, None, PassLog())

    network = Clip(0.0, 6.0) if network is None else network
    found = search(
        first, stages(network, first, real), quantize, lambda made: Judgement(noise(seen[-1]), 90.0, 0.0, 9.0)
    )
    flags = {name: getattr(first, name) for name in SETTINGS} | {"images": "pictures" if real else None}
    return {"flags": flags, "ranking": ranking_of(found, 8)}, found.chosen.recipe.row_name


@pytest.mark.parametrize("network", [Clip(0.0, 6.0), Clip(0.0, math.inf)], ids=["ReLU6", "ReLU"])
@pytest.mark.parametrize("real", [False, True], ids=["distilled", "pictures"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "noise",
    [
        lambda recipe: 20.0,
        lambda recipe: 20.0 + 3 * recipe.per_channel - 2 * recipe.relu,
        lambda recipe: 20.0 + 3 * recipe.distill_range + 2 * bool(recipe.distill_rounding),
        lambda recipe: None if recipe.per_channel else 20.0 + 2 * recipe.distill_equalize,
        lambda recipe: 20.0 + 3 * bool(recipe.distill_rounding) - 0.3 * (recipe.distill_rounding == "adaround"),
        lambda recipe: 20.0 + 3 * recipe.distill_correction,
    ],
)
def test_today_takes_what_it_takes(noise, bits, real, network):
    line, taken = recorded(noise, bits, real, network)
    assert replayed(line) == taken


def test_settings_that_are_refused_today_are_no_error():
    line, _ = recorded(lambda recipe: 20.0)
    line["flags"]["target"] = "gone"
    assert replayed(line) is None


def test_other_rules_take_another_or_ask_for_what_was_not_tried(monkeypatch):
    line, taken = recorded(lambda recipe: 20.0 + 0.7 * recipe.per_channel)
    assert taken == replayed(line) == "+ReLU+LE+BC per channel"
    monkeypatch.setattr(candidates, "RELU_LOSS", -9.0)
    assert replayed(line) == "+LE+BC per channel"
    monkeypatch.setattr(candidates, "SAME", 0.8)
    assert replayed(line) is None, "beside scales per tensor nothing else was tried"
