"""Recipes for a network that nobody chose one for, judged on images that none of them has seen."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor, fx

from utils.calibration.images import Images, halves
from utils.core.errors import UserError
from utils.core.predictions import Predictions
from utils.passes.advice import more_bits
from utils.passes.result import Quantized
from utils.quantization.recipe import Recipe
from utils.search.candidates import OUTER_BITS, stages
from utils.search.float_layers import add_until, layer_noise
from utils.search.judge import Judge, views
from utils.search.search import Found, search

FAR = 10.0  # dB of the output over its noise, below which nothing is written without --force
# With weights of fewer than 8 bits, whose user expects a loss: 5 to 8 dB were 3 to 4 points on three networks, 3.5 dB were 17.
FAR_WITH_FEW_BITS = 4.0


def unseen(images: Images) -> tuple[Images, Tensor]:
    """Every other image to judge by for what recipes choose by them, and [N, C, H, W] the others, which none sees.

    Fewer than two are a UserError.
    """
    if len(images.judging) < 2:
        raise UserError(
            f"--auto judges recipes on images that none has seen; {len(images.calibration) + len(images.judging)} pictures are too "
            "few for that; pass at least 4 with --images DIR (8 and more are better)"
        )
    own, others = halves(images.judging)
    return replace(images, judging=own), others


def find_recipe(
    network: fx.GraphModule,
    images: Images,
    unseen: Tensor,
    quantize: Callable[..., Quantized],
    first: Recipe,
    predictions: Predictions | None = None,
    max_noise: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Found, dict[str, float]]:
    """The search on a captured network; and by layer, what share of the output's power its quantization adds.

    images: for the recipes, which choose among equalizations by those to judge by. unseen: [N, C, H, W], on which the search
    judges them. quantize: recipe, and images, judging and real as quantize_data_free takes them, to the quantized network. first: as
    candidates.start() makes it. max_noise: the dB that the output must be over its noise; layers stay in float
    until it is. say: is told of every candidate.
    """
    run = partial(quantize, images=images.calibration, judging=images.judging, real=images.real)
    judge = Judge(network, views(unseen, images.real), predictions)
    found = search(first, stages(network, first, images.real), run, judge, say)
    shares = layer_noise(found.quantized, images.calibration)
    if max_noise is not None and found.chosen.noise < max_noise:
        found = add_until(found, shares, max_noise, run, judge, say)
    return found, shares


def check_near(found: Found, images: Images) -> None:
    """Refuse a network that is far from float in the best of all recipes."""
    far = FAR_WITH_FEW_BITS if found.chosen.recipe.bits_weight < OUTER_BITS else FAR
    if found.chosen.noise < far:
        tries = [] if images.real else ["--images DIR with pictures of your own"]
        tries += more_bits(found.chosen.recipe)
        tries += [f"--max_noise {FAR + 5:g}, which keeps the noisiest layers in float"] * (
            not found.chosen.recipe.float_layers
        )
        raise UserError(
            f"no candidate comes near to float: the best output is {found.chosen.noise:.1f} dB over its noise, and {far:g} "
            f"are asked for; try {', or '.join(tries)}; --force takes it as it is"
        )
