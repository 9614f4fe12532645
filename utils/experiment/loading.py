"""What a run quantizes: a network and its recipes, as the flags say, or as a file that --save wrote has them."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields

from utils.core.errors import UserError, message_of
from utils.experiment.records import DEMO, Loaded
from utils.passes.log import PassLog
from utils.passes.result import Quantized
from utils.quantization import serialization as artifact
from utils.quantization.recipe import Recipe, recipes_of

Quantize = Callable[..., Quantized]  # as dfq.quantize_data_free


def opened(
    args: Namespace, task: str, build: Callable[[], Loaded], quantize: Quantize
) -> tuple[Loaded | artifact.Saved, list[Recipe], Quantize]:
    """The network, its recipes and what quantizes it. build: the network of --model and --weights."""
    if not args.load:
        return _built(args, build), recipes_of(args), quantize
    saved = artifact.load(args.load, task)
    if args.demo and saved.weights != DEMO:
        raise UserError(
            f"no data to evaluate on: {str(args.load)!r} is not the demo's network; pass --data DIR, or --export to write it"
        )
    strange = saved.recipe.keys() ^ {field.name for field in fields(Recipe)}
    if strange:
        raise UserError(
            f"{str(args.load)!r} is of another version (its recipe differs by {min(strange)!r}); save it again"
        )
    quantized = Quantized(saved.float, saved.simulated, PassLog())
    quantized.log.note(f"loaded from {args.load}")
    return saved, [Recipe(**saved.recipe)], lambda *_, **__: quantized


def _built(args: Namespace, build: Callable[[], Loaded]) -> Loaded:
    """The network; whatever goes wrong in the user's own code is a UserError in one line."""
    try:
        return build()
    except UserError:
        raise
    except Exception as error:  # a module of the user's may raise anything as it is imported
        first = message_of(error)
        raise UserError(
            f"--model {args.model}: its code fails as it is imported ({type(error).__name__}: {first}); run it on its own"
        ) from error
