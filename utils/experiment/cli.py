"""The command line that the three scripts share, and how they fail."""

import argparse
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from utils.backends.base import ENGINES
from utils.backends.torch_export import SUFFIX as PROGRAM
from utils.core import distributed
from utils.core.arguments import FINITE, POSITIVE, SEED, Number, Parser, at_least
from utils.core.errors import UserError
from utils.core.files import check_target, make_folder
from utils.core.input_spec import InputSpec
from utils.experiment.evaluation import tune_allocator
from utils.experiment.images import OF_IMAGES, add_distillation_flags, add_image_flags, check_image_flags
from utils.experiment.records import Loaded, check_writable
from utils.quantization.recipe import DISTILLED, OF_A_ROW, SETTINGS, add_recipe_flags, check_settings, given
from utils.quantization.target import DEFAULT, TARGETS, check_engine, check_weight_type, without_kernels
from utils.tasks.base import Task


class Demo(Protocol):
    """What stands in for data and weights: flags to set, and the note to print."""

    flags: Mapping[str, Any]
    note: str


# ------------------------------------------------------------------------------------------ flags


def parser_of(task: Task) -> Parser:
    """The parser of a task's script: the flags that all scripts share, and its own."""
    parser = Parser(prog=task.program, description=task.summary)
    add_input_flags(parser)
    add_distillation_flags(add_recipe_flags(parser)[DISTILLED])
    add_image_flags(parser)
    add_search_flags(parser)
    add_deployment_flags(parser)
    add_run_flags(parser)
    task.add_flags(parser)
    return parser


def parse(task: Task, argv: Sequence[str] | None) -> Namespace:
    """The flags of a task's script; combinations that mean nothing end it."""
    parser = parser_of(task)
    args = parser.parse_args(argv)
    typed = parser.parse_args(argv, Namespace(**dict.fromkeys(OF_IMAGES)))  # None where the default holds
    check_image_flags(parser, args, [flag for flag in OF_IMAGES if getattr(typed, flag) is not None])
    return check(parser, args)


def defaults(task: Task) -> dict[str, Any]:
    """The default of every flag of a task's script."""
    parser = parser_of(task)
    return {action.dest: parser.get_default(action.dest) for action in parser._actions if action.dest != "help"}


def add_input_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("network and data")
    group.add_argument(
        "--weights", metavar="PATH|URL", help="checkpoint to load (default: the network's official weights)"
    )
    group.add_argument("--data", metavar="DIR", help="folder of the data set to evaluate on")
    group.add_argument(
        "--image_size",
        type=at_least(1),
        nargs="+",
        metavar="PIXELS",
        help="side, or height and width, of the input: images are scaled to cover it and cropped (default: the network's)",
    )
    data_flags(group)
    group.add_argument(
        "--limit", type=at_least(1), metavar="N", help="evaluate on N images, evenly spread over the data"
    )
    group.add_argument(
        "--skip_bad_images",
        action="store_true",
        help="count and skip images, masks and annotations that cannot be read",
    )


def data_flags(group: argparse._ArgumentGroup) -> None:
    """What tells how files are to be read: the state dict in a checkpoint, the pixels, the order of classes."""
    group.add_argument(
        "--checkpoint_key",
        metavar="NAME",
        help="the entry of the checkpoint to load, such as ema (default: it is said)",
    )
    for flag, metavar, what in (("mean", "M", "mean"), ("std", "S", "standard deviation")):
        group.add_argument(
            f"--{flag}",
            type=FINITE,
            nargs="+",
            metavar=metavar,
            help=f"{what} of pixels in [0, 1], one number for each channel (default: the network's)",
        )
    group.add_argument(
        "--classes",
        metavar="FILE",
        help="names of the network's classes in its order, one a line (default: classes.txt or labels.txt beside the data)",
    )


def add_search_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("search: the passes that suit this network")
    group.add_argument(
        "--auto",
        action="store_true",
        help="try the recipes that can differ on this network, judge each on images that it has not seen, and take the "
        "nearest to float, or one about as near that is simpler, was learned, or predicts more as float does",
    )
    group.add_argument(
        "--doctor",
        action="store_true",
        help="quantize nothing: say what was captured, what will run on integers, what stands in the way, and what to type next",
    )
    group.add_argument(
        "--max_noise",
        type=POSITIVE,
        metavar="DB",
        help="keep the noisiest layers in float until the output is at least DB over its quantization noise; needs --auto",
    )
    group.add_argument(
        "--force",
        action="store_true",
        help="go on where no recipe of --auto comes near to float; needs --auto",
    )


def check_search_flags(parser: ArgumentParser, args: Namespace) -> None:
    """Refuse, beside --auto, what it chooses itself; and what only it reads without it."""
    chosen = [name for name in given({name: getattr(args, name) for name in OF_A_ROW}) if args.auto]
    if chosen:
        parser.error(f"--auto chooses the passes itself; leave out --{chosen[0]}, or --auto")
    for flag in ("table", "load"):
        if args.auto and getattr(args, flag):
            parser.error(f"--auto quantizes one network anew; leave out --{flag}, or --auto")
    others = [flag for flag in ("auto", "table", "load", "export", "save", "images", "fidelity") if getattr(args, flag)]
    others += list(given({name: getattr(args, name) for name in OF_A_ROW}))
    if args.doctor and others:
        parser.error(f"--doctor quantizes nothing; leave out --{others[0]}, or --doctor")
    for flag in ("max_noise", "force"):
        if getattr(args, flag) and not args.auto:
            parser.error(f"--{flag} needs --auto")


def check_data_flags(parser: ArgumentParser, args: Namespace) -> None:
    """Refuse what a saved network would ignore, and keys of a checkpoint that is none of the user's."""
    ignored = ("model", "resize", "checkpoint_key", *OF_IMAGES, "distill_cache")
    said = [flag for flag in ignored if getattr(args, flag, None) != parser.get_default(flag)]
    if args.load and said:
        parser.error(f"--load takes the network, its input and its passes from the file; leave out --{said[0]}")
    if args.checkpoint_key and not args.weights:
        parser.error("--checkpoint_key needs --weights")


def add_deployment_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("deployment")
    group.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="write the quantized network once it is known to run as simulated: as ONNX, or, in a file that ends in .pt2, as a "
        "program of torch.export",
    )
    group.add_argument(
        "--engine",
        choices=("simulate", *ENGINES),
        default="simulate",
        help="what runs the INT8 network: float arithmetic, or "
        f"{' or '.join(engine.title for engine in ENGINES.values())} on integers (default: simulate)",
    )
    group.add_argument(
        "--opset",
        type=Number(int, lambda value: 13 <= value <= 22, "an ONNX opset from 13 to 22"),
        metavar="N",
        help="ONNX opset of what is exported or run, 13 to 22; from 21 on weights of 4 bits are stored in 4 (default: "
        "the lowest that has the network's operators)",
    )
    group.add_argument(
        "--weight_type",
        choices=TARGETS[DEFAULT].weights,
        help="how the file holds weights: int8, fast on processors with VNNI and on ARM, or uint8, exact on x86 without VNNI too "
        "(default: int8 where its sums are exact here)",
    )
    group.add_argument("--save", type=Path, metavar="FILE", help="keep the quantized network, to be loaded again")
    group.add_argument(
        "--load", type=Path, metavar="FILE", help="a network that --save kept, in place of --weights and the passes"
    )


def add_run_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--table",
        action="store_true",
        help="all rows of the result tables in place of the passes above; the same command resumes where it was stopped",
    )
    group.add_argument(
        "--rows", nargs="+", metavar="ROW", help="these rows of --table alone, by name, such as Original +LE+BC"
    )
    group.add_argument(
        "--batch_size", type=at_least(1), default=32, metavar="N", help="images per batch (default: %(default)s)"
    )
    group.add_argument(
        "--workers", type=at_least(0), default=2, metavar="N", help="processes that load images (default: 2)"
    )
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or mps (default: cpu)")
    group.add_argument("--seed", type=SEED, default=0, help="seed of every random number (default: 0)")
    group.add_argument(
        "--results",
        type=Path,
        default=Path("results/runs.jsonl"),
        metavar="FILE",
        help="file that gets one JSON line (default: results/runs.jsonl)",
    )
    group.add_argument(
        "--report", type=Path, metavar="DIR", help="folder for a page with pictures of images and predictions"
    )
    group.add_argument(
        "--verbose", action="store_true", help="list what each pass did to each layer, and what it skipped and why"
    )


# ----------------------------------------------------------------------------------------- checks


def check(parser: ArgumentParser, args: Namespace) -> Namespace:
    """Refuse combinations of the shared flags that mean nothing."""
    check_search_flags(parser, args)
    if args.rows and not args.table:
        parser.error("--rows needs --table")
    settings = {name: getattr(args, name) for name in SETTINGS}
    of_a_row = [name for name in given(settings) if name in OF_A_ROW]
    if args.table and of_a_row:
        parser.error(f"--table runs the passes of each of its rows; leave out --{of_a_row[0]}")
    own = [
        flag for flag in ("weights", "image_size", "mean", "std", "table", "save", "fidelity") if getattr(args, flag)
    ]
    if args.load and (said := [*given(settings), *own]):
        parser.error(f"--load takes the network, its input and its passes from the file; leave out --{said[0]}")
    check_data_flags(parser, args)
    _check_engine(parser, args)
    try:
        check_settings(settings, there=("quantize",) if args.table or args.auto or args.doctor else ())
    except UserError as error:
        parser.error(str(error))
    if args.fidelity and not (args.quantize or args.table or args.auto):
        parser.error("--fidelity needs --quantize")
    _check_input(parser, args)
    return args


def _check_engine(parser: ArgumentParser, args: Namespace) -> None:
    """What writes or runs an INT8 network needs one, and an engine has kernels for some widths alone."""
    to_int8 = [flag for flag in ("export", "save") if getattr(args, flag)]
    if to_int8 and args.table:
        parser.error(f"--{to_int8[0]} writes one network; leave out --table")
    if len(to_int8) == 2 and args.export.resolve() == args.save.resolve():
        parser.error(f"--export and --save are to write the same file, {args.export}; name two")
    read = {Path(file).resolve(): flag for flag in ("weights", "load") if (file := getattr(args, flag))}
    for flag in to_int8:
        if (source := read.get(getattr(args, flag).resolve())) is not None:
            parser.error(f"--{flag} would overwrite the file of --{source}; name another")
    to_int8 += [f"engine {args.engine}"] if args.engine != "simulate" else []
    if to_int8 and not (args.quantize or args.load or args.table or args.auto):
        parser.error(f"--{to_int8[0]} needs --quantize, --auto or --load")
    of_onnx = next((flag for flag in ("opset", "weight_type") if getattr(args, flag)), None)
    if of_onnx and not args.export and not args.doctor and args.engine == "simulate":
        parser.error(f"--{of_onnx} needs --export, or an --engine that is not simulate")
    if not args.load:
        try:
            check_engine(args.target, args.engine)
            check_weight_type(TARGETS[args.target], args.weight_type)
        except UserError as error:
            parser.error(str(error))
    to_onnx = args.export is not None and args.export.suffix != PROGRAM
    if of_onnx and args.export and not to_onnx and args.engine == "simulate":
        parser.error(
            f"--{of_onnx} is of ONNX files, and {args.export} is to be one of torch.export; leave out --{of_onnx}"
        )
    # Other targets' widths are refused with the recipe, even to be simulated.
    runs = args.target == DEFAULT and (to_onnx or args.engine != "simulate")
    if runs and (lacking := without_kernels(vars(args))) is not None:
        wish = "export" if to_onnx else to_int8[-1]
        parser.error(
            f"--{wish} is for integer engines, and {TARGETS[args.target].title} has no kernels for {lacking}; this can "
            f"only be simulated: leave out --{wish}, or --{lacking.partition(' ')[0].removeprefix('--')}"
        )


def _check_input(parser: ArgumentParser, args: Namespace) -> None:
    if args.image_size and len(args.image_size) > 2:
        parser.error(f"--image_size takes one number, or height and width, not {len(args.image_size)} numbers")
    if args.std and min(args.std) <= 0:
        parser.error(f"--std must be positive, not {min(args.std)}")


# ---------------------------------------------------------------------------- from flags to things


def input_spec(args: Namespace, spec: InputSpec) -> InputSpec:
    """The network's input, changed as the flags say; a network that was saved has its own."""
    if args.load:
        return spec
    return changed_spec(spec, args.image_size, getattr(args, "resize", None), args.mean, args.std)


def changed_spec(
    spec: InputSpec,
    image_size: Sequence[int] | None = None,
    resize: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> InputSpec:
    """The input with those parts changed that are given, in the words of the flags."""
    if image_size:
        height, width = image_size[0], image_size[-1]
        spec = replace(spec, size=(height, width), resize=min(height, width))
    if resize:
        spec = replace(spec, resize=resize)
    for flag, values in (("mean", mean), ("std", std)):
        if values and len(values) != spec.channels:
            raise UserError(
                f"--{flag} has {len(values)} number(s), but the network's images have {spec.channels} channel(s); "
                "pass one number for each"
            )
    return replace(spec, mean=tuple(mean or spec.mean), std=tuple(std or spec.std))


def with_demo(task: Task, args: Namespace, open_demo: Callable[[str], Demo]) -> Namespace:
    """The flags as they are; or, where they name neither data nor weights, those of the embedded demo.

    A network that was asked for by name needs data that only the user has, unless it is only to be written.
    args.demo says which it was.
    """
    own = args.weights is not None or args.model != defaults(task)["model"]
    args.demo = args.data is None and not ((own or args.load) and (args.export or args.save or args.doctor))
    if not args.demo:
        shows = "report" if args.report else f"engine {args.engine}" if args.engine != "simulate" else None
        if shows and not args.data and not args.doctor:
            raise UserError(f"--{shows} needs data to evaluate on; pass --data DIR, or leave it out")
        return args
    if own:
        raise UserError(
            "no data to evaluate on; pass --data DIR, or --export or --save to write the INT8 network alone "
            "(or neither --data, --weights nor --model for the embedded demo)"
        )
    with distributed.main_process_first():
        demo = open_demo(task.name)
    print(demo.note)
    for flag, value in demo.flags.items():
        setattr(args, flag, value)
    return args


def prepare(args: Namespace) -> torch.device:
    """Check what can fail early, seed, set the allocator; returns the device."""
    device = open_device(args.device)
    check_writable(args.results)
    if args.data and not Path(args.data).is_dir():
        raise UserError(f"no data folder at {str(args.data)!r}; pass --data with a folder of images")
    if args.export and args.export.suffix != PROGRAM:
        check_packages("--export", "onnx", "onnxruntime")
    if args.engine in ENGINES:
        check_packages(f"--engine {args.engine}", *ENGINES[args.engine].packages)
    for flag in [flag for flag in ("export", "save") if getattr(args, flag)]:
        check_target(getattr(args, flag), f"--{flag}")
    if args.report:
        make_folder(args.report)
    torch.backends.cudnn.allow_tf32 = False  # what is called FP32 is
    torch.manual_seed(args.seed)
    tune_allocator()
    return device


def check_packages(flag: str, *names: str) -> None:
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UserError(f"{flag} needs the package {missing[0]}; pip install {' '.join(missing)}")


def open_device(name: str) -> torch.device:
    """The device by name, if this machine and this build of torch have it."""
    try:
        device = distributed.own_device(torch.device(name))
    except RuntimeError:
        raise UserError(f"unknown --device {name!r}; choose from cpu, cuda, cuda:N, mps") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(
        device.type, 0
    )
    if (device.index or 0) >= count:
        raise UserError(
            f"--device {name} is not there: this machine and build of torch ({torch.__version__}) have {count} of kind {device.type!r}; pass --device cpu"
        )
    return device


# ---------------------------------------------------------------------------------- what is printed


def headline(args: Namespace, network: Loaded, samples: int, recipe: str) -> str:
    """What is about to be evaluated, in a line."""
    subset = ", evenly spread," if args.limit else ""
    return f"{network.name}, weights {_short(network.weights)}; {samples:,} images{subset} of {_short(args.data)}; {recipe}"


def _short(path: str) -> str:
    """A path as one would type it here; anything else as it is."""
    for folder, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if Path(path).is_relative_to(folder):
            return f"{prefix}{Path(path).relative_to(folder)}"
    return path


# ------------------------------------------------------------------------------------------ running


def run(main: Callable[[Sequence[str] | None], None], program: str) -> None:
    """Run a script's main, on all processes where torchrun has started some: a UserError becomes one line and exit code 2."""
    with distributed.process_group():
        try:
            main(None)
        except UserError as error:
            sys.exit(_fail(program, str(error), 2))
        except KeyboardInterrupt:
            sys.exit(_fail(program, "interrupted; rows recorded so far are kept", 130))


def _fail(program: str, message: str, code: int) -> int:
    which = "" if distributed.is_main_process() else f" (process {distributed.rank()})"
    print(f"{program}{which}: error: {' '.join(message.split())}", file=sys.stderr)
    return code
