"""What a run records, and the tables made from it.

A run appends one JSON line. `python -m utils.experiment.records FILE ...` turns lines into Markdown tables;
with --update README.md it puts them between the README's markers.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from utils.core.errors import UserError
from utils.experiment.published import Published, published
from utils.tasks.metrics import Metric, interval

_PACKAGES = ("torch", "torchvision", "numpy", "timm", "onnx", "onnxruntime")
_FOLDER = Path(__file__).resolve().parents[2]


class Loaded(Protocol):
    """A network with its name and where its weights are from; extras: what a saved one holds besides."""

    model: nn.Module
    name: str
    weights: str
    extras: Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """One network's result: metrics in percent by name, the one that counts first; seconds of its forward passes.

    network: "fp32_original" as loaded, "fp32" the row's own float network, or "quantized". interval: 95 %
    of the main metric; change: its difference to the network as loaded, and change_interval: 95 % of that.
    """

    network: str
    label: str
    metrics: Mapping[str, float]
    seconds: float
    interval: tuple[float, float]
    change: float
    change_interval: tuple[float, float]

    @property
    def value(self) -> float:
        return next(iter(self.metrics.values()))


def scores(metrics: Mapping[str, Metric], seconds: Mapping[str, float], labels: Mapping[str, str]) -> list[Score]:
    """A score for every network that was evaluated, the one as loaded first; labels: what the table calls each."""
    reference = next(iter(metrics.values()))
    made = []
    for name, metric in metrics.items():
        figures = metric.compute()
        value = next(iter(figures.values()))
        change = value - (made[0].value if made else value)
        known = interval(metric), change, interval(metric, reference)
        made.append(Score(name, labels[name], figures, seconds[name], *known))
    return made


def print_table(scores: Sequence[Score], metrics: Mapping[str, Metric]) -> None:
    """FP32 first; a line per network, a column per metric, and the change from the first line with its 95 % interval.

    metrics: the accumulators, for their number of images, and per class where they have it.
    """
    samples = len(metrics[scores[0].network].records)
    names, title = list(scores[0].metrics), f"{samples:,} images"
    width = max(len(title), *(len(score.label) for score in scores))
    columns = "".join(f"{column:>16}" for column in names)
    print("\n" + f"{title:<{width}}{columns}{'change':>10}{'95 % of it':>18}{'images/s':>10}")
    for score in scores:
        shown = "".join(f"{score.metrics[name]:>16.2f}" for name in names)
        speed = samples / max(score.seconds, 1e-9)
        sure = "" if score is scores[0] else "{:+.2f} to {:+.2f}".format(*score.change_interval)
        print(f"{score.label:<{width}}{shown}{score.change:>+10.2f}{sure:>18}{speed:>10.0f}")
    for score in scores:
        remark = getattr(metrics[score.network], "remark", str)()
        if remark:
            print(f"\n{score.label} {remark}")


def cells(scores: Sequence[Score]) -> list[list[str]]:
    """The same as text, a list for each row, the heading first."""
    names = list(scores[0].metrics)
    rows = [
        [
            score.label,
            *(f"{score.metrics[name]:.2f}" for name in names),
            *(
                ["", ""]
                if score is scores[0]
                else [f"{score.change:+.2f}", "{:+.2f} to {:+.2f}".format(*score.change_interval)]
            ),
        ]
        for score in scores
    ]
    return [["", *names, "change", "95 % of it"], *rows]


def print_classes(scores: Sequence[Score], metrics: Mapping[str, Metric]) -> None:
    """The main metric per class, for metrics that have it."""
    shown = [score for score in scores if hasattr(metrics[score.network], "per_class")]
    if not shown:
        return
    figures = {score.label: metrics[score.network].per_class() for score in shown}
    width = max(map(len, ("class", *next(iter(figures.values())))))
    print("\n" + f"{'class':<{width}}" + "".join(f"{label:>{len(label) + 3}}" for label in figures))
    for name in next(iter(figures.values())):
        cells = (f"{values[name]:>{len(label) + 3}.2f}" for label, values in figures.items())
        print(f"{name:<{width}}" + "".join(cells))


# ------------------------------------------------------------------------------------------ lines

FORMAT = 2  # of a line; raised when what it holds changes its meaning

# Flags that change neither what is scored nor on what.
_NEUTRAL = {
    "workers",
    "batch_size",
    "device",
    "results",
    "report",
    "verbose",
    "table",
    "rows",
    "distill_cache",
    "demo",
    "export",
    "save",
}


def settings(task: str, args: argparse.Namespace, command: str, network: Loaded, recipe: str) -> dict[str, Any]:
    """The part of a line that is known before the run: all that must be known to repeat it.

    args: the flags, those of the row's recipe included. command: the command line. recipe: the row's name.
    """
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    if args.demo:  # where it was unpacked is of no interest
        flags |= {"data": None, "weights": None}
    bits = {"weight": args.bits_weight, "activation": args.bits_activation, "bias": args.bits_bias}
    return {
        "format": FORMAT,
        "task": task,
        "model": network.name,
        "weights": "demo" if args.demo else network.weights,
        "weights_sha256": weights_hash(network.model),
        "data": "demo" if args.demo else args.data,
        "subset": "evenly spread" if args.limit else None,
        "recipe": recipe,
        "bits": bits if args.quantize else None,
        "engine": args.engine,
        "command": command,
        "flags": flags,
        "versions": versions(),
        "commit": commit(),
    }


def identity(line: Mapping[str, Any]) -> str:
    """Equal for two lines that score the same network, passes and images."""
    flags = {key: value for key, value in line["flags"].items() if key not in _NEUTRAL}
    return json.dumps([line["task"], line["weights_sha256"], line["data"], line["engine"], flags], sort_keys=True)


def outcome(metrics: Mapping[str, Metric], scores: Sequence[Score]) -> dict[str, Any]:
    """The part of a line that the run finds out. metrics: the accumulators of the scores."""
    by_network = {score.network: score for score in scores}
    original = by_network["fp32_original"]
    quantized = by_network.get("quantized")
    return {
        "samples": len(metrics["fp32_original"].records),
        "metric": next(iter(original.metrics)),
        "fp32": by_network.get("fp32", original).value,
        "fp32_original": original.value,
        "quantized": quantized.value if quantized else None,
        "metrics": {score.network: dict(score.metrics) for score in scores},
        "intervals": {score.network: score.interval for score in scores},
        "change_interval": quantized.change_interval if quantized else None,
        "per_class": {name: metric.per_class() for name, metric in metrics.items() if hasattr(metric, "per_class")},
        "forward_seconds": {score.network: round(score.seconds, 3) for score in scores},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


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
    recorded(file)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names and bytes of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


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


def recorded(file: Path) -> dict[str, dict[str, Any]]:
    """The lines of a results file by identity, the latest of each.

    A last line that an interrupted write has left torn is dropped, and that is said.
    """
    if not file.exists():
        return {}
    content = file.read_bytes()
    whole, newline, torn = content.rpartition(b"\n")
    if torn.startswith(b'{"format"'):  # as every line of ours does
        os.truncate(file, len(whole + newline))
        print(f"{str(file)!r} ended in a torn line of {len(torn)} bytes, which was dropped", file=sys.stderr)
    return {identity(line): line for line in read_lines(file)}


# ------------------------------------------------------------------------------------------ tables

_START, _END = "<!-- results: start -->", "<!-- results: end -->"


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """A table for each network on each data set; a row for each run, with its part of the command that made it."""
    groups: dict[tuple, list] = {}
    for line in lines:
        key = (line["task"], line["model"], line["weights"], line["data"], line["samples"], line["metric"])
        groups.setdefault(key, []).append(line)
    return "\n".join(_group(*key, rows) for key, rows in groups.items())


def _group(task: str, model: str, weights: str, data: str, samples: int, metric: str, rows: Sequence[Mapping]) -> str:
    low, high = rows[0]["intervals"]["fp32_original"]
    source = published(task, model, data) if data != "demo" else None
    columns = ["row", "W/A/bias", "FP32", "quantized", "change", "95 %", "flags"]
    if source:
        columns[2:2] = [f"published {source.fp32:.2f} →", "change"]
    common = _common([_words(row) for row in rows])
    return "\n".join(
        [
            f"**{model}**, weights {weights}, {samples:,} images of {data}; {metric} in percent, "
            f"FP32 as loaded {rows[0]['fp32_original']:.2f} ({low:.2f} to {high:.2f}):",
            f"`{shlex.join(common)}` and",
            "",
            f"| {' | '.join(columns)} |",
            "|" + "---|" * len(columns),
            *(_row(row, common, source) for row in rows),
            "",
        ]
    )


def _words(line: Mapping[str, Any]) -> list[str]:
    """The command line, without what changes no figure."""
    words = shlex.split(line["command"])
    for flag in ("--results", "--workers"):
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    return words


def _common(commands: Sequence[Sequence[str]]) -> list[str]:
    """The words of all commands, but for the passes, which are each row's own."""
    return [word for word in commands[0] if word != "--quantize" and all(word in command for command in commands)]


def _row(line: Mapping[str, Any], common: Sequence[str], source: Published | None) -> str:
    quantized, bits = line["quantized"], line["bits"]
    grid = f"{bits['weight']}/{bits['activation']}/{bits['bias']}" if bits else "-"
    theirs = source and source.quantized.get(name_of(line))
    cells = [
        name_of(line),
        grid,
        *([_figure(theirs), _change(theirs, source.fp32)] if source else []),
        _figure(line["fp32"]),
        _figure(quantized),
        _change(quantized, line["fp32_original"]),
        "{:+.2f} to {:+.2f}".format(*line["change_interval"]) if quantized is not None else "-",
        f"`{shlex.join(word for word in _words(line) if word not in common)}`",
    ]
    return f"| {' | '.join(cells)} |"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _change(value: float | None, reference: float) -> str:
    return "-" if value is None else f"{value - reference:+.2f}"


def row_cells(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of a table as text, a list for each, the heading first."""
    rows = [
        [
            name_of(line),
            f"{line['fp32']:.2f}",
            f"{line['quantized']:.2f}",
            _change(line["quantized"], line["fp32_original"]),
            "{:+.2f} to {:+.2f}".format(*line["change_interval"]),
        ]
        for line in lines
    ]
    return [["", "FP32", "quantized", "change", "95 % of it"], *rows]


def print_rows(lines: Sequence[Mapping[str, Any]]) -> None:
    """The rows of a table, a line each."""
    rows = row_cells(lines)
    width = max(len(row[0]) for row in rows)
    print()
    for name, fp32, quantized, change, sure in rows:
        print(f"{name:<{width}}{fp32:>9}{quantized:>11}{change:>9}{sure:>18}")


def name_of(line: Mapping[str, Any]) -> str:
    """The row's name in a table."""
    grid = " per channel" if line["flags"]["per_channel"] else ""
    return line["recipe"] + grid + (" in ONNX Runtime" if line["engine"] == "onnxruntime" else "")


def update(readme: Path, tables: str) -> str:
    """The README's text with the tables between its markers."""
    text = readme.read_text()
    if _START not in text or _END not in text:
        raise UserError(f"{str(readme)!r} has no lines {_START!r} and {_END!r} to put the tables between")
    before, after = text.split(_START)[0], text.split(_END)[1]
    return f"{before}{_START}\n{tables}\n{_END}{after}"


def main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m utils.experiment.records", description="Markdown tables from recorded runs."
    )
    parser.add_argument("files", type=Path, nargs="+", help="JSON-lines files that --results wrote")
    parser.add_argument(
        "--update", type=Path, metavar="README", help="file whose tables to replace, instead of printing"
    )
    args = parser.parse_args(argv)
    tables = markdown([line for file in args.files for line in read_lines(file)])
    if args.update:
        args.update.write_text(update(args.update, tables))
    else:
        print(tables)


if __name__ == "__main__":
    try:
        main(None)
    except UserError as error:
        sys.exit(f"python -m utils.experiment.records: error: {error}")
