"""The recipes that can differ on a network, in the stages in which they are tried."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from utils.core.errors import UserError
from utils.graph.layers import Clip
from utils.passes.adaround import SAME
from utils.quantization.recipe import OF_A_ROW, SETTINGS, Recipe, Value
from utils.quantization.target import target_of
from utils.search.judge import Judgement


@dataclass(frozen=True)
class Stage:
    """A change to the best recipe so far, which is tried.

    change: settings of Recipe by name; what they require is given with them. gain: by how many dB it must come nearer to
    float to take the other's place, since that is simpler, or was fitted to fewer images. beside: settings that the best
    recipe must have, or the stage is passed over. unless_same: nor is it taken where it measures exactly the same, as a change
    does that was not kept.
    """

    change: dict[str, Any]
    gain: float
    beside: dict[str, Any] = field(default_factory=dict)
    unless_same: bool = False

    def recipe(self, best: Recipe) -> Recipe | None:
        """The best recipe with the change; None where that means nothing, or is not to be tried."""
        fits = all(getattr(best, name) == value for name, value in self.beside.items())
        return changed(best, self.change) if fits else None

    def moved(self, before: Judgement, after: Judgement) -> bool:
        """Whether the change counts as one, by what was measured without and with it."""
        return not self.unless_same or before != after


AGAIN = Stage({}, 0.0)  # no change: what was refused beside far more noise is tried once more
FAR_MORE = 3.0  # dB that noise has fallen since
IMAGES_GAIN = 1.0  # dB: what looks at distilled images does better on other distilled ones than on photographs
SURER = 10.0  # points of agreement with float's predictions, which decide where dB do not; of few predictions more
LEARNED_GAIN = 0.05  # dB: learned rounding that was not kept is as near as what it started from
RELU_LOSS = 0.3  # dB that ReLU in the place of ReLU6 may cost, since engines run it faster


OUTER_BITS = 8  # of the first and the last layer where others have fewer, as in published tables


def outer_bits(bits_weight: int, target: str) -> int | None:
    """Bits of the first and the last layer beside few bits of others; None: as many as the others have.

    So where a target takes fewer of the first layer's weights itself, since 8 saturate: who asks it for fewer asks it for all.
    """
    return OUTER_BITS if bits_weight < OUTER_BITS <= target_of(target).bits_first else None


def check_settings(settings: Iterable[str]) -> None:
    """Refuse settings, by name, that a search chooses itself, and what is none, as a UserError."""
    free = [name for name in SETTINGS if name not in OF_A_ROW]
    for name in settings:
        if name in OF_A_ROW:
            raise UserError(f"a search chooses the passes itself; leave out {name}")
        if name not in free:
            raise UserError(f"there is no setting {name!r}; choose from {', '.join(free)}")


def start(settings: Mapping[str, Value]) -> Recipe:
    """The recipe that all others are changes of. settings: of Recipe, that the user chose."""
    return Recipe(quantize=True, equalize=True, correction=True, **settings)


def stages(network: fx.GraphModule, first: Recipe, real: bool) -> Iterator[Stage]:
    """The stages for a network. first: the recipe that they start from. real: whether images are photographs.

    With few bits the rounding of weights is most of the noise, on any images alike: it is compensated first, so that all
    else is judged beside it, and learned last, once, since that takes minutes. Where images are distilled, dead leaves told
    already whether learning is nearer than the compensation that it starts from: here it must not be further off. Weights
    get zero points then, which cost engines nothing where 8 bits hold them. Empirical correction is left to photographs: beside compensated rounding it is
    nearer on distilled images and further off on photographs (results/rounding.txt).
    """
    few = first.bits_weight < OUTER_BITS
    gain = SAME if real or few else IMAGES_GAIN
    compensated = Stage({"distill_rounding": "gptq"}, gain)
    if not first.engine.per_channel:
        yield Stage({"per_channel": True}, SAME)
    if few and first.engine.zero_points:
        yield Stage({"asymmetric": True}, SAME)
    yield Stage({"equalize": False}, gain)  # equalized ranges hold better on what no image shows
    if few:
        yield compensated
    yield Stage({"distill_range": True}, gain)
    if real or not few:
        yield Stage({"distill_correction": True}, gain)
    if real and few:
        yield compensated  # again, where it was not nearer beside the other correction
    yield Stage({"equalize": True, "distill_equalize": True}, gain)
    if not few:
        yield compensated
    yield AGAIN
    if any(isinstance(module, Clip) and module.rectifies and module.capped for module in network.modules()):
        yield Stage({"relu": True}, -RELU_LOSS)
    if few:
        learned = {"distill_rounding": "adaround"}
        if not real:
            yield Stage(learned, -SAME, beside=compensated.change, unless_same=True)
        yield Stage(learned, LEARNED_GAIN)


def changed(recipe: Recipe, change: dict[str, Any]) -> Recipe | None:
    """The recipe with a change; None where that means nothing."""
    try:
        return replace(recipe, **change)
    except UserError:
        return None
