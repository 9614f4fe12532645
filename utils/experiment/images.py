"""The images that a run's passes look at: distilled ones, or the user's own; their flags, and what these give."""

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import fx, nn

from utils.calibration.distillation import (
    LEAVES_STEPS,
    Distillation,
    for_judging,
    for_search,
    from_leaves,
    search_images,
)
from utils.calibration.image_cache import distilled
from utils.calibration.images import Images, load_images
from utils.core import distributed
from utils.core.arguments import at_least
from utils.core.cache import cache_folder
from utils.core.input_spec import InputSpec
from utils.quantization.recipe import SETTINGS
from utils.tasks.base import Task

OF_DISTILLED = ("distill_images", "distill_batch", "distill_steps", "distill_start")
OF_IMAGES = (*OF_DISTILLED, "images_count")  # flags that say which images there are


def add_distillation_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fidelity",
        action="store_true",
        help="compare the quantized network with the float one on held-out images, layer by layer; needs --quantize",
    )
    group.add_argument(
        "--distill_images",
        type=at_least(1),
        default=Distillation.images,
        metavar="N",
        help="images to distill (default: %(default)s)",
    )
    group.add_argument(
        "--distill_batch",
        type=at_least(1),
        default=Distillation.batch,
        metavar="N",
        help="images that are distilled together; bounds the memory (default: %(default)s)",
    )
    group.add_argument(
        "--distill_steps",
        type=at_least(0),
        default=Distillation.steps,
        metavar="N",
        help="steps of the optimizer; 0: take the images as they start (default: %(default)s)",
    )
    group.add_argument(
        "--distill_start",
        choices=("natural", "leaves"),
        default=Distillation.start,
        help=f"what distilled images start as: noise with the spectrum of photographs, or dead leaves, rendered shapes that hide one another, of which steps change one half (default: %(default)s; with fewer than 8 bits of weights leaves, where the network's statistics know them: without a step, or with {LEAVES_STEPS} where rounding is learned)",
    )
    group.add_argument(
        "--distill_cache",
        type=Path,
        metavar="DIR",
        help="folder to keep distilled images in (default: distilled in $DFQ_CACHE or the user's cache folder)",
    )


def add_image_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("your own images: in the place of distilled ones, for every purpose")
    group.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of pictures without labels, at least 2 (4 with --auto; 8 or more are better): half for ranges and corrections, half to judge by",
    )
    group.add_argument(
        "--images_count",
        type=at_least(2),
        default=64,
        metavar="N",
        help="take at most N of them, evenly spread over the folder (default: %(default)s)",
    )


def check_image_flags(parser: ArgumentParser, args: Namespace, typed: Sequence[str]) -> None:
    """Refuse what says how images are made, beside pictures or without a use. typed: of OF_IMAGES those given."""
    if args.images is None:
        if "images_count" in typed:
            parser.error("--images_count needs --images")
        looks = [name for name, one in SETTINGS.items() if one.metadata["images"] and getattr(args, name)]
        if typed and not (looks or args.fidelity or args.table or args.auto or args.doctor or args.load):
            parser.error(f"--{typed[0]} needs what looks at images: --auto, --fidelity or a --distill_... pass")
        return
    if distilling := [flag for flag in typed if flag in OF_DISTILLED]:
        parser.error(f"--images takes the place of distilled images; leave out --{distilling[0]}, or --images")
    if args.load:
        parser.error("--load takes the network, its input and its passes from the file; leave out --images")
    if not (args.quantize or args.equalize or args.table or args.auto or args.doctor):
        parser.error("--images needs --quantize, --equalize or --auto")


def settings_of(args: Namespace) -> Distillation:
    made = Distillation(args.distill_images, args.distill_batch, args.distill_steps, args.seed)
    return from_leaves(made, made.steps) if args.distill_start == "leaves" else made


def images_of(
    args: Namespace,
    task: Task,
    model: nn.Module,
    spec: InputSpec,
    device: torch.device,
    needed: bool,
    captured: fx.GraphModule | None = None,
) -> Images | None:
    """The user's own, or distilled ones for the recipe or for --fidelity; None where neither needs any.

    captured: capture(model, spec), where it is at hand. Distilled images to judge by are of another seed, and a quarter as many; for --auto there are as many again.
    """
    if args.images:
        own = load_images(args.images, partial(task.read_image, spec=spec), args.images_count, args.skip_bad_images)
        if distributed.is_main_process():
            print(f"images: {args.images} gives {own.description}")
        return own
    if not (needed or args.fidelity):
        return None
    settings = settings_of(args)
    folder = args.distill_cache or cache_folder() / "distilled"
    wanted = for_search(settings) if args.auto else (settings, for_judging(settings))
    made = [distilled(model, spec, one, device, folder, captured) for one in wanted]
    return search_images(*made) if args.auto else Images(*made)
