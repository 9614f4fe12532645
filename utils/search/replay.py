"""What today's search takes by what was measured of a recorded one's candidates, without running any."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from utils.core.errors import UserError
from utils.graph.layers import Clip
from utils.passes.log import PassLog
from utils.passes.result import Quantized
from utils.quantization.recipe import OF_A_ROW, SETTINGS, Recipe, as_today
from utils.search.candidates import stages, start
from utils.search.judge import Judgement
from utils.search.search import search


class Unmeasured(Exception):
    """The search asks for a candidate that the recorded one did not try."""


def replayed(line: Mapping[str, Any]) -> str | None:
    """The name of the recipe that today's stages and rules take; None where they try another candidate than was tried,
    or refuse what was asked for.

    line: of results, of a run of --auto without --max_noise.
    """
    tried = {one["recipe"]: one for one in line["ranking"]["candidates"]}
    capped = [Clip(0.0, 6.0)] if any("+ReLU" in name for name in tried) else []  # all that stages() asks of a network
    flags = as_today(line["flags"])
    asked: list[Recipe] = []

    def quantize(recipe: Recipe) -> Quantized:
        if recipe.row_name not in tried:
            raise Unmeasured
        if "noise" not in tried[recipe.row_name]:
            raise UserError(tried[recipe.row_name]["reason"])
        asked.append(recipe)
        return Quantized(None, None, PassLog())

    def judge(quantized: Quantized) -> Judgement:
        found = tried[asked[-1].row_name]
        return Judgement(
            **{name: found[name] for name in ("noise", "agreement", "saturation", "predictions") if name in found}
        )

    try:
        first = start({name: flags[name] for name in SETTINGS if name in flags and name not in OF_A_ROW})
        found = search(first, stages(nn.Sequential(*capped), first, flags["images"] is not None), quantize, judge)
    except (Unmeasured, UserError):  # or today refuses its settings
        return None
    return found.chosen.recipe.row_name
