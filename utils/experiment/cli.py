"""The command line that the three scripts share, and how they fail."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from utils.calibration.distillation import Distillation, distilled
from utils.calibration.observers import METHODS
from utils.core import distributed
from utils.core.cache import cache_folder
from utils.core.errors import UserError
from utils.core.files import check_target
from utils.core.input_spec import InputSpec
from utils.experiment.evaluation import tune_allocator
from utils.experiment.pictures import make_folder
from utils.experiment.records import Loaded, check_writable


class Demo(Protocol):
    """What stands in for data and weights: flags to set, and the note to print."""

    flags: Mapping[str, Any]
    note: str


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose flags are typed in full, and whose errors are one line, without the usage."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def shared_flags() -> argparse.ArgumentParser:
    """A parser to pass in parents=[...]: every flag that means the same in the three scripts."""
    flags = argparse.ArgumentParser(add_help=False)

    group = flags.add_argument_group("network and data")
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
    group.add_argument(
        "--mean", type=float, nargs=3, metavar="M", help="per-channel mean of pixels in [0, 1] (default: the network's)"
    )
    group.add_argument(
        "--std",
        type=float,
        nargs=3,
        metavar="S",
        help="per-channel deviation of pixels in [0, 1] (default: the network's)",
    )
    group.add_argument(
        "--limit", type=at_least(1), metavar="N", help="evaluate on N images, evenly spread over the data"
    )
    group.add_argument("--skip_bad_images", action="store_true", help="count and skip images that cannot be read")

    group = flags.add_argument_group("passes, in the order in which they run")
    group.add_argument(
        "--relu", action="store_true", help="replace every ReLU6 by ReLU (the published method; may cost accuracy)"
    )
    group.add_argument(
        "--clear_dead", action="store_true", help="zero the weights that read dead channels (part of --equalize)"
    )
    group.add_argument(
        "--equalize", action="store_true", help="cross-layer equalization; keeps ReLU6 exact without --relu"
    )
    group.add_argument(
        "--absorption", action="store_true", help="absorb high biases into the next layer; needs --equalize"
    )
    group.add_argument(
        "--clip_weight",
        type=_positive,
        nargs="?",
        const=15.0,
        metavar="W",
        help="clip weights to [-W, W] (15 if no value is given)",
    )
    group.add_argument("--quantize", action="store_true", help="quantize weights, biases and activations")
    group.add_argument(
        "--correction", action="store_true", help="correct the biases for the shift that quantized weights cause"
    )

    group = flags.add_argument_group("distilled data: images made from BatchNorm statistics, see the README")
    group.add_argument(
        "--distill_equalize",
        action="store_true",
        help="scale channels so that rounding adds least to the output on distilled images, as far as that is nearer to float; needs --equalize --quantize",
    )
    group.add_argument(
        "--distill_correction",
        action="store_true",
        help="correct biases by what distilled images show instead of by statistics; needs --correction",
    )
    group.add_argument(
        "--distill_rounding",
        action="store_true",
        help="round a layer's weights so that their errors on distilled images make up for each other, as GPTQ does; "
        "needs --distill_correction",
    )
    group.add_argument(
        "--distill_range", action="store_true", help="activation ranges from distilled images; needs --quantize"
    )
    group.add_argument(
        "--range_method",
        choices=METHODS,
        default="minmax",
        help="range of an activation: all that was seen, all but 1e-5 at either end, or least squared error (default: minmax)",
    )
    group.add_argument(
        "--fidelity",
        action="store_true",
        help="compare the quantized network with the float one on distilled images, layer by layer; needs --quantize",
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
        type=at_least(1),
        default=Distillation.steps,
        metavar="N",
        help="optimizer's steps (default: %(default)s)",
    )
    group.add_argument(
        "--distill_cache",
        type=Path,
        metavar="DIR",
        help="folder to keep distilled images in (default: distilled in $DFQ_CACHE or the user's cache folder)",
    )

    group = flags.add_argument_group("quantizers")
    group.add_argument(
        "--bits_weight", type=_bits, default=8, metavar="B", help="bits of weights, 2 to 16 (default: 8)"
    )
    group.add_argument(
        "--bits_activation", type=_bits, default=8, metavar="B", help="bits of activations, 2 to 16 (default: 8)"
    )
    group.add_argument(
        "--bits_bias",
        type=int,
        choices=(8, 16, 32),
        default=32,
        help="bits of biases; 32: on the grid of the accumulator (default)",
    )
    group.add_argument(
        "--per_channel", action="store_true", help="one weight scale per output channel instead of per tensor"
    )
    group.add_argument(
        "--asymmetric", action="store_true", help="weights with a zero point instead of a symmetric range"
    )

    group = flags.add_argument_group("deployment")
    group.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="write the INT8 network as ONNX, once it is known to run as simulated",
    )
    group.add_argument(
        "--engine",
        choices=("simulate", "onnxruntime"),
        default="simulate",
        help="what runs the INT8 network: float arithmetic, or ONNX Runtime on integers (default: simulate)",
    )
    group.add_argument("--save", type=Path, metavar="FILE", help="keep the quantized network, to be loaded again")
    group.add_argument(
        "--load", type=Path, metavar="FILE", help="a network that --save kept, in place of --weights and the passes"
    )

    group = flags.add_argument_group("run")
    group.add_argument(
        "--table",
        action="store_true",
        help="all rows of the result tables in place of the passes above; the same command goes on where it was stopped",
    )
    group.add_argument(
        "--rows", nargs="+", metavar="ROW", help="these rows of --table alone, by name, such as Original +LE+BC"
    )
    group.add_argument("--batch_size", type=at_least(1), default=32, metavar="N", help="images per batch (default: 32)")
    group.add_argument(
        "--workers", type=at_least(0), default=2, metavar="N", help="processes that load images (default: 2)"
    )
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or mps (default: cpu)")
    group.add_argument("--seed", type=int, default=0, help="seed of every random number (default: 0)")
    group.add_argument(
        "--results",
        type=Path,
        default=Path("results/runs.jsonl"),
        metavar="FILE",
        help="file that gets one JSON line (default: results/runs.jsonl)",
    )
    group.add_argument(
        "--report", type=Path, metavar="DIR", help="folder for pictures of images and of what each network says"
    )
    group.add_argument(
        "--verbose", action="store_true", help="list what each pass did to each layer, and what it skipped and why"
    )
    return flags


PASSES = (
    "relu",
    "clear_dead",
    "equalize",
    "absorption",
    "clip_weight",
    "quantize",
    "correction",
    "distill_equalize",
    "distill_correction",
    "distill_rounding",
    "distill_range",
)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Refuse combinations of the shared flags that cannot mean anything."""
    if args.rows and not args.table:
        parser.error("--rows needs --table")
    if args.table:
        said = [flag for flag in (*PASSES, "per_channel", "asymmetric") if getattr(args, flag) not in (False, None)]
        if said:
            parser.error(f"--table runs the passes of each of its rows; leave out --{said[0]}")
    own = [*PASSES, "per_channel", "asymmetric", "weights", "image_size", "mean", "std", "table", "save"]
    if args.load and (said := [flag for flag in own if getattr(args, flag) not in (False, None)]):
        parser.error(f"--load takes the network, its input and its passes from the file; leave out --{said[0]}")
    to_int8 = [flag for flag in ("export", "save") if getattr(args, flag)]
    if to_int8 and args.table:
        parser.error(f"--{to_int8[0]} writes one network; leave out --table")
    to_int8 += ["engine onnxruntime"] if args.engine != "simulate" else []
    if to_int8 and not (args.quantize or args.load or args.table):
        parser.error(f"--{to_int8[0]} needs --quantize or --load")
    bits = args.bits_weight, args.bits_activation, args.bits_bias
    if (args.export or args.engine != "simulate") and bits != (8, 8, 32):
        parser.error(
            f"--{'export' if args.export else to_int8[-1]} is for INT8 engines, with weights and activations of 8 bits "
            "and biases of 32; leave out --bits_weight, --bits_activation and --bits_bias"
        )
    needs = {
        "absorption": "equalize",
        "correction": "quantize",
        "clip_weight": "quantize",
        "per_channel": "quantize",
        "asymmetric": "quantize",
        "distill_equalize": "equalize",
        "distill_correction": "correction",
        "distill_rounding": "distill_correction",
        "distill_range": "quantize",
        "fidelity": "quantize",
    }
    for flag, other in needs.items():
        there = getattr(args, other) or (args.table and other == "quantize")
        if getattr(args, flag) not in (False, None) and not there:
            parser.error(f"--{flag} needs --{other}")
    if args.distill_equalize and not args.quantize:
        parser.error("--distill_equalize needs --quantize")
    if args.range_method != "minmax" and not args.distill_range:
        parser.error("--range_method needs --distill_range")
    for flag in ("bits_weight", "bits_activation", "bits_bias"):
        if getattr(args, flag) != parser.get_default(flag) and not (args.quantize or args.table):
            parser.error(f"--{flag} needs --quantize")
    if args.image_size and len(args.image_size) > 2:
        parser.error(f"--image_size takes one number, or height and width, not {len(args.image_size)} numbers")
    if args.std and min(args.std) <= 0:
        parser.error(f"--std must be positive, not {min(args.std)}")
    args.model_given = args.model != parser.get_default("model")
    return args


def input_spec(args: argparse.Namespace, spec: InputSpec) -> InputSpec:
    """The network's input, changed as the flags say; a network that was saved has its own."""
    if args.load:
        return spec
    if args.image_size:
        height, width = args.image_size[0], args.image_size[-1]
        spec = replace(spec, size=(height, width), resize=min(height, width))
    if getattr(args, "resize", None):
        spec = replace(spec, resize=args.resize)
    return replace(spec, mean=tuple(args.mean or spec.mean), std=tuple(args.std or spec.std))


def distilled_images(
    args: argparse.Namespace, model: nn.Module, spec: InputSpec, device: torch.device, needed: bool
) -> Tensor | None:
    """Images for the recipe or for --fidelity, as the flags say; None where neither needs any."""
    if not (needed or args.fidelity):
        return None
    settings = Distillation(args.distill_images, args.distill_batch, args.distill_steps, args.seed)
    return distilled(model, spec, settings, device, args.distill_cache or cache_folder() / "distilled")


def with_demo(args: argparse.Namespace, open_demo: Callable[[], Demo]) -> argparse.Namespace:
    """The flags as they are; or, where they name neither data nor weights, those of the embedded demo.

    A network that was asked for by name needs data that only the user has, unless it is only to be written.
    args.demo says which it was.
    """
    own = args.weights is not None or args.model_given
    args.demo = args.data is None and not ((own or args.load) and (args.export or args.save))
    if not args.demo:
        return args
    if own:
        raise UserError(
            "no data to evaluate on; pass --data DIR, or --export or --save to write the INT8 network alone "
            "(or neither --data, --weights nor --model for the embedded demo)"
        )
    with distributed.first_before_others():
        demo = open_demo()
    print(demo.note)
    for flag, value in demo.flags.items():
        setattr(args, flag, value)
    return args


def prepare(args: argparse.Namespace) -> torch.device:
    """Check what can fail early, seed, set the allocator; returns the device."""
    device = open_device(args.device)
    check_writable(args.results)
    if args.export or args.engine == "onnxruntime":
        check_packages(f"--{'export' if args.export else 'engine onnxruntime'}", "onnx", "onnxruntime")
    for flag in ("export", "save"):
        if getattr(args, flag):
            check_target(getattr(args, flag), f"--{flag}")
    if args.report:
        make_folder(args.report)
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


def command(program: str, argv: Sequence[str] | None, passes: Sequence[str] | None = None) -> str:
    """The command line that started this run, to be typed again; or of one row of its table, with that row's passes."""
    words = list(sys.argv[1:] if argv is None else argv)
    if passes is not None:
        words.remove("--table")
        if "--rows" in words:
            first = words.index("--rows")
            rest = [i for i in range(first + 1, len(words)) if words[i].startswith("--")]
            del words[first : rest[0] if rest else None]
        words += passes
    start = (
        ["torchrun", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"]
        if distributed.processes() > 1
        else ["python"]
    )
    return shlex.join([*start, program, *words])


def headline(args: argparse.Namespace, network: Loaded, samples: int, recipe: str) -> str:
    """What is about to be evaluated, in a line."""
    subset = ", evenly spread," if args.limit else ""
    return f"{network.name}, weights {_short(network.weights)}; {samples:,} images{subset} of {_short(args.data)}; {recipe}"


def _short(path: str) -> str:
    """A path as one would type it here; anything else as it is."""
    for folder, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if Path(path).is_relative_to(folder):
            return f"{prefix}{Path(path).relative_to(folder)}"
    return path


def run(main: Callable[[Sequence[str] | None], None], program: str) -> None:
    """Run a script's main, on all processes where torchrun has started some: a UserError becomes one line and exit code 2."""
    with distributed.joined():
        try:
            main(None)
        except UserError as error:
            sys.exit(_fail(program, str(error), 2))
        except KeyboardInterrupt:
            sys.exit(_fail(program, "interrupted; rows recorded so far are kept", 130))


def _fail(program: str, message: str, code: int) -> int:
    which = "" if distributed.is_first() else f" (process {distributed.rank()})"
    print(f"{program}{which}: error: {message}", file=sys.stderr)
    return code


def at_least(lowest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.lstrip("+-").isdigit() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}")
        return int(text)

    return parse


def _bits(text: str) -> int:
    if not text.isdigit() or not 2 <= int(text) <= 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bits from 2 to 16")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value
