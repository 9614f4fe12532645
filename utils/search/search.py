"""The search: stage by stage from one recipe to the one whose network is nearest to float."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from utils.core.errors import UserError
from utils.passes.result import Quantized
from utils.quantization.recipe import Recipe
from utils.search.candidates import AGAIN, FAR_MORE, SAME, SURER, Stage
from utils.search.judge import Judge, Judgement


@dataclass(frozen=True)
class Candidate:
    """A recipe, and how near it came. reason: why it could not be run, where it could not; then judgement is None."""

    recipe: Recipe
    judgement: Judgement | None
    reason: str = ""

    @property
    def noise(self) -> float:
        return self.judgement.noise if self.judgement else float("-inf")


@dataclass(frozen=True)
class Found:
    """What a search found.

    candidates: all that were tried, the nearest first. chosen: the one that was taken, with what quantized it made. why:
    what decided, in a few words.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    quantized: Quantized
    why: str


def search(
    start: Recipe,
    stages: Iterable[Stage],
    quantize: Callable[[Recipe], Quantized],
    judge: Judge,
    say: Callable[[str], None] = lambda line: None,
) -> Found:
    """Try every stage's change on the best recipe of the stages before, and take it where takes_over() says so.

    What was refused beside far more noise, which hid what it does, is tried once more at AGAIN. say: is told of each
    candidate as it is judged. A first recipe that cannot be run is a UserError; a later one is told of.
    """
    tried: dict[Recipe, Candidate] = {}

    def attempt(recipe: Recipe) -> tuple[Candidate, Quantized | None]:
        try:
            quantized = quantize(recipe)
            made = Candidate(recipe, judge(quantized)), quantized
        except UserError as error:
            if not tried:
                raise
            made = Candidate(recipe, None, str(error)), None
        tried[recipe] = made[0]
        say(line_of(made[0]))
        return made

    best, kept = attempt(start)
    nearest = best.noise  # of all that were taken
    refused: list[tuple[Stage, float]] = []  # and how near the best was then
    waiting = deque(stages)
    while waiting:
        stage = waiting.popleft()
        if stage is AGAIN:
            waiting.extendleft(one for one, then in reversed(refused) if best.noise >= then + FAR_MORE)
            continue
        recipe = stage.recipe(best.recipe)
        if recipe is None or recipe in tried:
            continue
        candidate, quantized = attempt(recipe)
        if takes_over(candidate, best, stage.gain, nearest) and stage.moved(best.judgement, candidate.judgement):
            best, kept, nearest = candidate, quantized, max(nearest, candidate.noise)
        elif candidate.judgement:
            refused.append((stage, best.noise))
    ranked = tuple(sorted(tried.values(), key=lambda one: -one.noise))
    return Found(ranked, best, kept, reason(ranked, best))


def takes_over(candidate: Candidate, best: Candidate, gain: float, nearest: float) -> bool:
    """Whether a candidate is taken in the place of the best one so far.

    gain: the dB by which it must be nearer to float. nearest: dB of the nearest that was taken so far. One whose predictions
    are float's by far more often need only be about as near as that; one whose are float's by far less often must be nearer by
    more than what decides nothing.
    """
    if candidate.judgement is None:
        return False
    lead = candidate.noise - best.noise
    if _surer(candidate, best):
        return lead >= gain or candidate.noise > nearest - SAME
    return lead >= (max(gain, SAME) if _surer(best, candidate) else gain)


def _surer(one: Candidate, other: Candidate) -> bool:
    """Whether one candidate's predictions are float's by far more often than another's, and more often than by chance.

    Both were judged. Of n predictions the share that agrees is known to two standard errors, at most 1 / sqrt(n).
    """
    ahead = one.judgement.agreement - other.judgement.agreement
    return ahead >= max(SURER, 100 / math.sqrt(min(one.judgement.predictions, other.judgement.predictions)))


WIDTH = 44  # of a candidate's name
HEAD = f"{'candidate':<{WIDTH}} {'SQNR':>12} {'agreement':>11} {'saturated':>11}"


def line_of(candidate: Candidate) -> str:
    """A candidate in a line of the ranking."""
    name = f"{candidate.recipe.row_name:<{WIDTH}}"
    if candidate.judgement is None:
        return f"{name} not run: {candidate.reason}"
    found = candidate.judgement
    return f"{name} {found.noise:9.1f} dB {found.agreement:9.2f} % {found.saturation:9.3f} %"


def reason(ranked: Sequence[Candidate], best: Candidate) -> str:
    """What decided for the best, in words."""
    first = ranked[0]
    if first is best:
        others = [one for one in ranked[1:] if one.judgement]
        if not others:
            return "the only candidate"
        lead = f"{first.noise - others[0].noise:.1f} dB"
        return "as near to float as the next" if lead == "0.0 dB" else f"nearest to float, {lead} before the next"
    behind = f"{first.noise - best.noise:.1f} dB behind {first.recipe.row_name}"
    if _surer(best, first):
        shares = f"{best.judgement.agreement:.0f} % for {first.judgement.agreement:.0f} %"
        return f"{behind}, but its predictions are float's more often: {shares}"
    return (
        f"{behind}, which is no more than what differs by chance or by the images; "
        "of what is as near it is the simpler, the faster, what was learned, or that which predicts more as float does"
    )
