"""What a run records: one JSON line for every row, only ever appended."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from utils.backends.base import ENGINES
from utils.core.errors import UserError
from utils.quantization.recipe import OF_A_ROW, as_today, row_name

_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "timm",
    *(name for engine in ENGINES.values() for name in engine.packages),
)
_FOLDER = Path(__file__).resolve().parents[2]


class Loaded(Protocol):
    """A network with its name and where its weights are from; extras: what a saved one holds besides."""

    model: nn.Module
    name: str
    weights: str
    extras: Mapping[str, Any]


DEMO = "demo"  # what lines and saved networks call the demo's network and its images
FORMAT = 2  # of a line; raised when what it holds changes its meaning

# Flags that change neither what is scored nor on what. "model_given" stands in older lines.
_NEUTRAL = {
    *("workers", "batch_size", "device", "verbose", "demo", "model_given", "fidelity"),
    *("table", "rows", "results", "report", "export", "save", "distill_cache", "force", "doctor"),
}


def settings(
    task: str, args: argparse.Namespace, command: str, network: Loaded, weights_sha256: str, recipe: str
) -> dict[str, Any]:
    """The part of a line that is known before the run: all that must be known to repeat it.

    args: the flags, those of the row's recipe included. command: the command line. recipe: the row's name.
    """
    flags = _plain(vars(args))
    if args.demo:  # where it was unpacked is of no interest
        flags |= {"data": None, "weights": None}
    bits = {"weight": args.bits_weight, "activation": args.bits_activation, "bias": args.bits_bias}
    bits |= {"first_last": args.bits_first_last} if args.bits_first_last else {}
    return {
        "format": FORMAT,
        "task": task,
        "model": network.name,
        "weights": DEMO if args.demo else network.weights,
        "weights_sha256": weights_sha256,
        "data": DEMO if args.demo else args.data,
        "subset": "evenly spread" if args.limit else None,
        "recipe": recipe,
        "bits": bits if args.quantize else None,
        "engine": args.engine,
        "command": command,
        "flags": flags,
        "versions": versions(),
        "commit": commit(),
    }


def identity(line: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Equal for two lines that score the same network, passes and images.

    defaults: of the flags of the task's script. A flag that did not exist when a line was recorded counts as that; one
    that is gone counts where it was given. A value that a flag once had counts as what it means today. What --auto chose
    was found, not asked for, and does not count.
    """
    flags = {
        key: value for key, value in as_today(line["flags"]).items() if key in defaults or value not in (None, False)
    }
    ignored = {*_NEUTRAL, *OF_A_ROW} if flags.get("auto") else _NEUTRAL
    known = {key: value for key, value in {**_plain(defaults), **flags}.items() if key not in ignored}
    return json.dumps([line["task"], line["weights_sha256"], line["data"], line["engine"], known], sort_keys=True)


def _plain(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags as a line holds them."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}


def record(file: Path, line: Mapping[str, Any]) -> None:
    """Append one JSON line, in one write: another run's line is never torn or mixed in."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (json.dumps(line) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write results to {str(file)!r}: {error.strerror}") from None


def check_writable(file: Path) -> None:
    """Refuse, before the work, a file that could not be appended to after it, or that holds something else."""
    nearest = next(path for path in (file, *file.absolute().parents) if path.exists())
    if file.is_dir() or not os.access(nearest, os.W_OK) or (nearest != file and not nearest.is_dir()):
        raise UserError(f"cannot write results to {str(file)!r}; pass --results with a file that can be written")
    recover(file)


def versions() -> dict[str, str | None]:
    """Of all that figures follow from besides this project. cpu: the instructions that torch's kernels are chosen by."""
    packages = {name: _version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages, "cpu": torch.backends.cpu.get_cpu_capability()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The project's commit, with '+' where the code has changed since."""
    try:
        described = subprocess.run(
            ["git", "-C", _FOLDER, "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip() or None


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The runs recorded in a JSON-lines file, in order."""
    try:
        content = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read results from {str(file)!r}: {error}") from None
    return [_parse(text, file, number) for number, text in enumerate(content.splitlines(), start=1)]


def _parse(text: str, file: Path, number: int) -> dict[str, Any]:
    try:
        line = json.loads(text)
        found, *_ = line["format"], line["task"], line["metric"], line["fp32"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{str(file)!r}, line {number}, is no result of this project; pass a file that --results wrote"
        ) from None
    if found != FORMAT:
        raise UserError(
            f"{str(file)!r}, line {number}, has format {found}, and this version of the project reads and writes "
            f"{FORMAT}: pass --results with another file, or use the version that wrote it"
        )
    return line


def recover(file: Path) -> list[dict[str, Any]]:
    """The lines of a results file, none if it is not there.

    A last line that an interrupted write has left torn is dropped, and that is said.
    """
    if not file.exists():
        return []
    content = file.read_bytes()
    complete, newline, torn = content.rpartition(b"\n")
    if torn.startswith(b'{"format"'):  # as every line of ours does
        os.truncate(file, len(complete + newline))
        print(f"{str(file)!r} ended in a torn line of {len(torn)} bytes, which was dropped", file=sys.stderr)
    return read_lines(file)


def name_of(line: Mapping[str, Any]) -> str:
    """The row's name in a table."""
    name = row_name(line["recipe"], line["flags"])
    return name + (f" in {ENGINES[line['engine']].title}" if line["engine"] in ENGINES else "")


def file_name(line: Mapping[str, Any]) -> str:
    """A folder's name for a row: Original, ReLU_LE_BC, LE_BC_per_channel."""
    name = "".join(letter if letter.isalnum() else "_" for letter in name_of(line))
    return "_".join(part for part in name.split("_") if part)


def change(value: float | None, reference: float) -> str:
    """A figure's difference to the reference, with its sign."""
    return "-" if value is None else signed(value - reference)


def signed(difference: float) -> str:
    """+1.50, -1.50, and +0.00 for what rounds to nothing from either side."""
    return f"{difference:+z.2f}"


def signed_interval(ends: Sequence[float]) -> str:
    """A difference's 95 % confidence interval [2]: -1.61 to +0.40."""
    return " to ".join(map(signed, ends))
