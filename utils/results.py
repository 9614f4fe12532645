"""What a run records, and the tables made from it.

A run appends one JSON line. `python -m utils.results FILE ...` turns lines into Markdown tables;
with --update README.md it puts them between the README's markers.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from utils.errors import UserError

_PACKAGES = ("torch", "torchvision", "numpy", "timm")
_FOLDER = Path(__file__).resolve().parent.parent


class Loaded(Protocol):
    """A network with where its weights are from."""

    model: nn.Module
    weights: str


@dataclass(frozen=True)
class Score:
    """One network's result: metrics in percent by name, the one that counts first; seconds of its forward passes.

    network: "fp32_original" as loaded, "fp32" the row's own float network, or "quantized".
    """

    network: str
    label: str
    metrics: Mapping[str, float]
    seconds: float

    @property
    def value(self) -> float:
        return next(iter(self.metrics.values()))


def scores(metrics: Mapping[str, Any], seconds: Mapping[str, float], labels: Mapping[str, str]) -> list[Score]:
    """A score for every network that was evaluated; labels: what the table calls each."""
    return [Score(name, labels[name], metrics[name].compute(), seconds[name]) for name in metrics]


def print_table(scores: Sequence[Score], metrics: Mapping[str, Any]) -> None:
    """FP32 first; a line per network, a column per metric, and the change from the first line.

    metrics: the accumulators, for their number of samples, and per class where they have it.
    """
    samples = metrics[scores[0].network].samples
    names, title = list(scores[0].metrics), f"{samples:,} images"
    width = max(len(title), *(len(score.label) for score in scores))
    columns = [*names, "change", "images/s"]
    print("\n" + f"{title:<{width}}" + "".join(f"{column:>16}" for column in columns))
    for score in scores:
        shown = "".join(f"{score.metrics[name]:>16.2f}" for name in names)
        speed = samples / max(score.seconds, 1e-9)
        print(f"{score.label:<{width}}{shown}{score.value - scores[0].value:>+16.2f}{speed:>16.0f}")
    per_class = {
        score.label: metrics[score.network].per_class()
        for score in scores
        if hasattr(metrics[score.network], "per_class")
    }
    if per_class:
        print("\n" + f"{'class':<{width}}" + "".join(f"{label:>{len(label) + 3}}" for label in per_class))
        for name in next(iter(per_class.values())):
            print(
                f"{name:<{width}}"
                + "".join(f"{values[name]:>{len(label) + 3}.2f}" for label, values in per_class.items())
            )
    for score in scores:
        remark = getattr(metrics[score.network], "remark", str)()
        if remark:
            print(f"\n{score.label} {remark}")


def entry(
    task: str,
    args: argparse.Namespace,
    command: str,
    network: Loaded,
    recipe: str,
    metrics: Mapping[str, Any],
    scores: Sequence[Score],
) -> dict[str, Any]:
    """The line to record: what was scored, and all that must be known to repeat it.

    command: the command line. recipe: the row's name. metrics: the accumulators of the scores.
    """
    by_network = {score.network: score for score in scores}
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    if args.demo:  # where it was unpacked is of no interest
        flags |= {"data": None, "weights": None}
    original = by_network["fp32_original"]
    quantized = by_network.get("quantized")
    return {
        "task": task,
        "model": args.model,
        "weights": "demo" if args.demo else network.weights,
        "weights_sha256": weights_hash(network.model),
        "data": "demo" if args.demo else args.data,
        "samples": metrics["fp32_original"].samples,
        "subset": "evenly spread" if args.limit else None,
        "metric": next(iter(original.metrics)),
        "fp32": by_network.get("fp32", original).value,
        "fp32_original": original.value,
        "quantized": quantized.value if quantized else None,
        "metrics": {score.network: dict(score.metrics) for score in scores},
        "per_class": {name: metric.per_class() for name, metric in metrics.items() if hasattr(metric, "per_class")},
        "recipe": recipe,
        "bits": {"weight": args.bits_weight, "activation": args.bits_activation, "bias": args.bits_bias}
        if quantized
        else None,
        "engine": "simulate",
        "command": command,
        "flags": flags,
        "forward_seconds": {score.network: round(score.seconds, 3) for score in scores},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def record(file: Path, line: Mapping[str, Any]) -> None:
    """Append one JSON line, in one write: another run's line is never torn or mixed in."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot write results to {str(file)!r}: {error.strerror}") from None
    try:
        os.write(handle, (json.dumps(line) + "\n").encode())
    finally:
        os.close(handle)


def check_writable(file: Path) -> None:
    """Refuse, before the work, a file that could not be appended to after it; creates nothing."""
    nearest = next(path for path in (file, *file.absolute().parents) if path.exists())
    if file.is_dir() or not os.access(nearest, os.W_OK) or (nearest != file and not nearest.is_dir()):
        raise UserError(f"cannot write results to {str(file)!r}; pass --results with a file that can be written")


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names and bytes of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
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


# ------------------------------------------------------------------------------------------ tables

_START, _END = "<!-- results: start -->", "<!-- results: end -->"


def read_lines(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The runs recorded in JSON-lines files, in order."""
    lines = []
    for file in files:
        try:
            content = file.read_text()
        except OSError as error:
            raise UserError(f"cannot read results from {str(file)!r}: {error.strerror}") from None
        for number, text in enumerate(content.splitlines(), start=1):
            try:
                line = json.loads(text)
                line["task"], line["metric"], line["fp32"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{str(file)!r}, line {number}, is no result of this project; pass a file that --results wrote"
                ) from None
            lines.append(line)
    return lines


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """A table for each network on each data set; a row for each run, with the command that made it."""
    groups: dict[tuple, list] = {}
    for line in lines:
        groups.setdefault(
            (line["task"], line["model"], line["weights"], line["data"], line["samples"], line["metric"]), []
        ).append(line)
    tables = []
    for (_, model, weights, data, samples, metric), rows in groups.items():
        tables.append(
            f"**{model}**, weights {weights}, {samples:,} images of {data}; {metric} in percent, FP32 as loaded {rows[0]['fp32_original']:.2f}\n"
        )
        tables.append(
            "| row | bits (W/A/bias), grid | FP32 | quantized | change | command |\n|---|---|---|---|---|---|"
        )
        tables += [_row(row) for row in rows]
        tables.append("")
    return "\n".join(tables)


def _row(line: Mapping[str, Any]) -> str:
    quantized = line["quantized"]
    shown = "-" if quantized is None else f"{quantized:.2f}"
    change = "-" if quantized is None else f"{quantized - line['fp32_original']:+.2f}"
    bits, flags = line["bits"], line["flags"]
    grid = (
        f"{bits['weight']}/{bits['activation']}/{bits['bias']} per {'channel' if flags['per_channel'] else 'tensor'}"
        if bits
        else "-"
    )
    return f"| {line['recipe']} | {grid} | {line['fp32']:.2f} | {shown} | {change} | `{line['command']}` |"


def update(readme: Path, tables: str) -> str:
    """The README's text with the tables between its markers."""
    text = readme.read_text()
    if _START not in text or _END not in text:
        raise UserError(f"{str(readme)!r} has no lines {_START!r} and {_END!r} to put the tables between")
    before, after = text.split(_START)[0], text.split(_END)[1]
    return f"{before}{_START}\n{tables}\n{_END}{after}"


def main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m utils.results", description="Markdown tables from recorded runs.")
    parser.add_argument("files", type=Path, nargs="+", help="JSON-lines files that --results wrote")
    parser.add_argument(
        "--update", type=Path, metavar="README", help="file whose tables to replace, instead of printing"
    )
    args = parser.parse_args(argv)
    tables = markdown(read_lines(args.files))
    if args.update:
        args.update.write_text(update(args.update, tables))
    else:
        print(tables)


if __name__ == "__main__":
    try:
        main(None)
    except UserError as error:
        sys.exit(f"python -m utils.results: error: {error}")
