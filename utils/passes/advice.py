"""Warnings that a user can act on: what may cost accuracy, and which flags to try."""

from utils.calibration.fidelity import Fidelity, held_out
from utils.core.errors import UserError
from utils.quantization.recipe import Recipe

LEAST_OUTPUT = 15.0  # dB of the output over its noise, below which predictions change visibly
MOST_SATURATED = 1.0  # percent of a tensor's values that may be cut without a warning


def other_ranges(recipe: Recipe, real: bool) -> str:
    """What to try where ranges are in doubt. real: whether images are the user's already."""
    tries = [] if real else ["--images DIR with pictures of your own"]
    tries += [] if recipe.distill_range else ["--distill_range"]
    return f"; try {' or '.join(tries)}" if tries else ""


def more_bits(recipe: Recipe) -> list[str]:
    """To try more bits, where there are fewer than the 8 that engines have."""
    few = [f"--{name}" for name in ("bits_weight", "bits_activation") if getattr(recipe, name) < 8]
    return [f"more bits ({', '.join(few)})"] if few else []


def fidelity_warnings(near: Fidelity, recipe: Recipe, images: int, real: bool) -> list[str]:
    """Lines on an output far from the float one's, and on tensors that are cut.

    images: on how many it was measured. real: whether they are the user's.
    """
    warnings = []
    if not near.output >= LEAST_OUTPUT:
        cheapest = ["equalize", "correction", "distill_range", "per_channel"]
        cheapest += ["asymmetric"] * (recipe.bits_weight < 8 and recipe.engine.zero_points)
        given = recipe.settings | {"per_channel": recipe.channel_scales}
        tries = [f"--{name}" for name in cheapest if not given[name]]
        tries += more_bits(recipe) + ([] if real else ["--images DIR"])
        warnings.append(
            f"the output is only {near.output:.1f} dB over its quantization noise on {held_out(images, real)}; "
            f"try {', '.join(tries or ['--float_layers with the noisiest layers'])}"
        )
    cut = {name: share for name, share in near.saturation.items() if share > MOST_SATURATED}
    if cut:
        worst = max(cut, key=cut.__getitem__)
        warnings.append(
            f"ranges cut more than {MOST_SATURATED:g} % of the values of {len(cut)} of {len(near.saturation)} tensors on {held_out(images, real)} "
            f"(most: {worst} {cut[worst]:.2g} %){other_ranges(recipe, real)}"
        )
    return warnings


def check_statistics(recipe: Recipe) -> None:
    """Refuse what a network without BatchNorm cannot have without images."""
    needy = [flag for flag in ("quantize", "correction", "absorption", "clear_dead") if getattr(recipe, flag)]
    if needy:
        flags = " and ".join(f"--{flag}" for flag in needy)
        raise UserError(
            f"the network has no BatchNorm, whose statistics {flags} would need; pass --images DIR with at least 2 "
            "pictures (8 and more are better), or use a network trained with BatchNorm"
        )
