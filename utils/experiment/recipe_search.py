"""The search for a recipe (--auto) in a run: as it is printed and recorded."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from utils.calibration.fidelity import held_out
from utils.calibration.images import Images
from utils.core import distributed
from utils.core.errors import UserError
from utils.experiment.loading import Quantize
from utils.passes.advice import more_bits
from utils.quantization.recipe import OF_A_ROW, SETTINGS
from utils.search.auto import check_near, find_recipe
from utils.search.candidates import start
from utils.search.float_layers import describe_noise
from utils.search.forecast import forecast, known_points
from utils.search.search import HEAD, Found

if TYPE_CHECKING:
    from utils.experiment.runner import Run


def find(
    run: "Run", captured: fx.GraphModule, images: Images, judging: Tensor, quantize: Quantize
) -> tuple[Found, dict[str, Any]]:
    """The recipe that --auto takes, and the ranking as a line of results holds it; both printed.

    judging: [N, C, H, W], which no candidate has seen.
    Where none comes near to float, a UserError, unless --force was given.
    """
    args, model = run.args, run.network.model
    settings = {name: getattr(args, name) for name in SETTINGS if name not in OF_A_ROW}
    say = print if distributed.is_main_process() else lambda line: None
    judged = len(judging)
    changed = "" if images.real else ", as they are, mirrored and dimmed"
    say(f"candidates, judged on {held_out(judged, images.real)} that none has seen{changed}:\n{HEAD}")
    found, shares = find_recipe(
        captured,
        images,
        judging,
        partial(quantize, model, run.spec, captured=captured, device=run.device),
        start(settings),
        run.task.predictions,
        args.max_noise,
        say,
    )
    _say_found(run, found, shares, images.real, say)
    try:
        check_near(found, images)
    except UserError:
        if not args.force:
            raise
        say("  warning: far from float, and taken as it is because of --force")
    return found, ranking_of(found, judged)


def _say_found(run: "Run", found: Found, shares: dict[str, float], real: bool, say: Callable[[str], None]) -> None:
    """What was taken and why, what it may cost, and how to have the same again."""
    args = run.args
    say(f"auto: {found.chosen.recipe.row_name}, {found.why}")
    if told := forecast(found.chosen.noise, known_points()):
        say(f"  expected change of the score: {told} points, by rows of other networks that are as noisy")
    say(
        f"  noisiest layers: {describe_noise(shares)} of the noise"
        + ("" if args.max_noise else "; --float_layers NAME ... keeps layers in float")
    )
    if args.max_noise and found.chosen.noise < args.max_noise:
        tries = " or ".join([*([] if real else ["--images DIR"]), *more_bits(found.chosen.recipe)])
        say(
            f"  warning: --max_noise {args.max_noise:g} is not reached with half of the layers in float; leave the network in float"
            + (f", or try {tries}" if tries else "")
        )
    chosen = found.chosen.recipe
    choices = {"equalization": chosen.distill_equalize, "rounding": chosen.learns_rounding}
    if real and any(choices.values()):
        those = " and ".join(name for name, by_images in choices.items() if by_images)
        say(f"  a plain run chooses its {those} by all pictures that are held out, and may choose another")
    say(f"  the same by: {run.command(chosen)}")


def ranking_of(found: Found, judged: int) -> dict[str, Any]:
    """The candidates as plain data, the nearest to float first. judged: on how many images."""

    def plain(one: Any) -> Mapping[str, Any]:
        figures = {name: round(value, 4) for name, value in asdict(one.judgement).items()} if one.judgement else {}
        return {"recipe": one.recipe.row_name, "flags": one.recipe.words, **figures, "reason": one.reason}

    return {"images": judged, "why": found.why, "candidates": [plain(one) for one in found.candidates]}
