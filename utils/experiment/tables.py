"""Markdown tables made from recorded lines: python -m utils.experiment.tables README.md results/README.md

A page says which tables it wants. The command puts them there, and names the rows that were recorded with other code:

    <!-- table: results/demo.jsonl -->
    <!-- /table -->

Every recorded row of the file, a table for each network. Behind bars: `model:`, `weights:` and `data:` choose a network by
the end of its name, `rows:` the rows by name, `columns:` the columns, `layout: engines` or `layout: auto` another table.
"""

import argparse
import ast
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from utils.backends.base import ENGINES
from utils.core.arguments import Parser
from utils.core.errors import UserError
from utils.experiment import cli
from utils.experiment.published import Published, published
from utils.experiment.records import change, identity, name_of, read_lines, signed_interval
from utils.quantization.recipe import TABLE, row_name
from utils.search.replay import replayed
from utils.tasks.registry import TASKS

ROOT = Path(__file__).resolve().parents[2]
_MARKER = re.compile(r"<!-- table: (?P<wish>.*?) -->\n.*?<!-- /table -->", re.DOTALL)
_METHOD = ("dfq.py", "modeling", *(f"utils/{name}" for name in ("graph", "passes", "calibration", "quantization")))
_PREDICTIONS = "utils/core/predictions.py"
_JUDGE = ("utils/search/judge.py", _PREDICTIONS)  # what a row's figures of fidelity follow from besides
_SEARCH = (
    *_JUDGE,
    "utils/search/auto.py",
    "utils/search/float_layers.py",
)  # what a row of --auto follows from, but for its rules
_RULES = ("utils/search/search.py", "utils/search/candidates.py")
_LEARNING = tuple(f"utils/passes/{name}.py" for name in ("adaround", "block_learning", "blocks", "soft_rounding"))
_FILES = ":!utils/quantization/serialization.py"  # reads and writes networks; no recorded row is of a saved one
Line = Mapping[str, Any]
Option = tuple[str, ...]  # a flag and its values, as they stand in a command


@dataclass(frozen=True)
class Group:
    """The rows of one network on the same images. common: options of all their commands. source: published figures."""

    rows: Sequence[Line]
    common: Sequence[Option]
    source: Published | None

    @property
    def title(self) -> str:
        first = self.rows[0]
        low, high = first["intervals"]["fp32_original"]
        return (
            f"**{first['model']}**, weights {first['weights']}, {first['samples']:,} images of {first['data']}; "
            f"{first['metric']} in percent, FP32 as loaded {first['fp32_original']:.2f} ({low:.2f} to {high:.2f}); "
            f"`{_command(self.common)}` and:"
        )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _bits(line: Line, group: Group) -> str:
    if not line["bits"]:
        return "-"
    ends = line["bits"].get("first_last")
    return "{weight}/{activation}/{bias}".format(**line["bits"]) + (f", first and last {ends}" if ends else "")


def _published(line: Line, group: Group) -> float | None:
    """The published figure of a row of the same passes and bits, in simulation and per tensor."""
    bits = line["bits"] and (line["bits"]["weight"], line["bits"]["activation"])
    if group.source is None or line["flags"].get("per_channel") or line["engine"] in ENGINES or bits != (8, 8):
        return None
    return group.source.quantized.get(line["recipe"])


def _interval(line: Line, group: Group) -> str:
    return signed_interval(line["change_interval"]) if line["quantized"] is not None else "-"


def _own_flags(line: Line, group: Group) -> str:
    return f"`{_command(option for option in _options(line) if option not in group.common)}`"


COLUMNS: dict[str, Callable[[Line, Group], str]] = {
    "row": lambda line, group: name_of(line),
    "W/A/bias": _bits,
    "published": lambda line, group: _figure(_published(line, group)),
    "published change": lambda line, group: change(_published(line, group), group.source.fp32),
    "FP32": lambda line, group: _figure(line["fp32"]),
    "quantized": lambda line, group: _figure(line["quantized"]),
    "change": lambda line, group: change(line["quantized"], line["fp32_original"]),
    "95 % CI": _interval,
    "flags": _own_flags,
    "commit": lambda line, group: line["commit"] or "unknown",
}


def grouped(lines: Sequence[Line]) -> list[Group]:
    """The lines by network and images; of a row that was recorded more than once the last line."""
    defaults = {name: cli.defaults(task) for name, task in TASKS.items()}
    latest = {identity(line, defaults[line["task"]]): line for line in lines}
    groups: dict[tuple, list[Line]] = {}
    for line in latest.values():
        key = tuple(line[name] for name in ("task", "model", "weights", "data", "samples", "metric"))
        groups.setdefault(key, []).append(line)
    made = []
    for (task, model, _, data, *_), rows in groups.items():
        rows.sort(key=_place)
        commands = [_options(row) for row in rows]
        common = [o for o in commands[0] if o != ("--quantize",) and all(o in each for each in commands)]
        made.append(Group(rows, common, None if data == "demo" else published(task, model, data)))
    return made


def _place(line: Line) -> tuple:
    """Where a row stands in its table: by bits, many first, then as --table has the recipes, and what it does not have last.

    Of rows of one name that with the biases of fewer bits is the last, and the one that a page gets by that name.
    """
    weight, activation, bias = (
        -line["bits"][name] if line["bits"] else -32 for name in ("weight", "activation", "bias")
    )
    names = list(TABLE)
    named = names.index(line["recipe"]) if line["recipe"] in names else len(names)
    return weight, activation, line["recipe"].startswith("auto"), named, name_of(line), bias, line["command"]


def _options(line: Line) -> list[Option]:
    """The command line by its flags, each with its values, without those that change no figure."""
    options: list[Option] = []
    for word in shlex.split(line["command"]):
        if word.startswith("--") or not options:
            options.append((word,))
        else:
            options[-1] += (word,)
    silent = ("--results", "--workers", "--batch_size", "--verbose", "--fidelity")
    return [option for option in options if option[0] not in silent]


def _command(options: Iterable[Option]) -> str:
    return shlex.join(word for option in options for word in option)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def rows_table(group: Group, columns: Sequence[str] | None = None) -> str:
    """A group's table under its title, with the columns by name (default: all that it has)."""
    if columns is None:
        columns = [name for name in COLUMNS if group.source or not name.startswith("published")]
    heads = {"published": f"published (FP32 {group.source.fp32:.2f})" if group.source else "published"}
    rows = [[COLUMNS[name](line, group) for name in columns] for line in group.rows]
    return f"{group.title}\n\n{table([heads.get(name, name) for name in columns], rows)}"


def engines_table(groups: Sequence[Group]) -> str:
    """Whole networks in simulation and in an engine."""
    header = ["network", "weights", "images", "row", "metric", "simulated", "ONNX Runtime", "same predictions"]
    rows = []
    for line in (line for group in groups for line in group.rows):
        simulated = line["metrics"]["simulated"][line["metric"]]
        figures = f"{simulated:.2f}", f"{line['quantized']:.2f}", f"{line['agreement']:.2f} %"
        rows.append([line["model"], line["weights"], f"{line['samples']:,}", line["recipe"], line["metric"], *figures])
    return table(header, rows)


def auto_table(groups: Sequence[Group]) -> str:
    """What --auto's choice loses, a line for each network, a column for each number of bits of weights."""
    found = [
        (group, {row["bits"]["weight"]: row for row in group.rows if row["flags"].get("auto")}) for group in groups
    ]
    widths = sorted({bits for _, rows in found for bits in rows}, reverse=True)
    if not widths:
        raise UserError("no recorded row is of --auto")
    lines = []
    for group, rows in found:
        first = group.rows[0]
        figures = f"{first['samples']:,}", first["metric"], f"{first['fp32_original']:.2f}"
        changes = [_change_with_interval(rows[bits], group) if bits in rows else "-" for bits in widths]
        if rows:
            lines.append([first["model"], Path(first["weights"]).name, *figures, *changes])
    return table(["network", "weights", "images", "metric", "FP32", *(f"{bits} bits" for bits in widths)], lines)


def _change_with_interval(line: Line, group: Group) -> str:
    return f"{COLUMNS['change'](line, group)} ({_interval(line, group)})"


LAYOUTS: dict[str, Callable[[Sequence[Group]], str]] = {"engines": engines_table, "auto": auto_table}


def wished(wish: str) -> str:
    """The tables that a page's marker asks for."""
    files, *choices = (part.strip() for part in wish.split("|"))
    options = dict(tuple(word.strip() for word in choice.split(":", 1)) for choice in choices)
    unknown = options.keys() - {"model", "weights", "data", "rows", "columns", "layout"}
    if unknown:
        raise UserError(
            f"table {wish!r} has no option {min(unknown)!r}; use model, weights, data, rows, columns, layout"
        )
    lines = [line for file in files.split(",") for line in read_lines(ROOT / file.strip())]
    for name in ("model", "weights", "data"):
        lines = [line for line in lines if line[name].endswith(options.get(name, ""))]
    groups = grouped(lines)
    if "rows" in options:
        names = [name.strip() for name in options["rows"].split(",")]
        there = [{name_of(line): line for line in group.rows} for group in groups]
        lines = [rows[name] for rows in there for name in names if name in rows]
        groups = grouped(lines)
    if not groups:
        raise UserError(f"table {wish!r}: no recorded row is of that kind")
    if "layout" in options:
        if options["layout"] not in LAYOUTS:
            raise UserError(f"table {wish!r} has layout {options['layout']!r}; use {' or '.join(LAYOUTS)}")
        return LAYOUTS[options["layout"]](groups)
    columns = [name.strip() for name in options["columns"].split(",")] if "columns" in options else None
    return "\n\n".join(rows_table(group, columns) for group in groups)


def update(text: str) -> str:
    """A page's text with the tables between its markers made anew."""
    return _MARKER.sub(
        lambda found: f"<!-- table: {found['wish']} -->\n\n{wished(found['wish'])}\n\n<!-- /table -->", text
    )


def stale(lines: Sequence[Line]) -> Counter:
    """How many lines were recorded with other code of the method than today's, by commit."""
    current = cache(_is_current)
    old = (line for line in lines if not (current(str(line["commit"]), _besides(line)) and _would_choose(line)))
    return Counter(str(line["commit"]) for line in old)


def _besides(line: Line) -> tuple[str, ...]:
    """The code, besides all rows', that a line follows from."""
    recipes = [one["recipe"] for one in line["ranking"]["candidates"]] if "ranking" in line else []
    learns = line["flags"].get("distill_rounding") == "adaround" or any("+AR" in recipe for recipe in recipes)
    judged = _SEARCH if line["recipe"].startswith("auto: ") else _JUDGE if line.get("fidelity") else ()
    return judged + _LEARNING * learns + _RULES * bool(line["flags"].get("max_noise"))


def _would_choose(line: Line) -> bool:
    """Whether today's stages and rules of the search take what a line took, by what it measured; true of what is no search's.

    With --max_noise a search goes on behind them: the files that hold them are compared then.
    """
    if "ranking" not in line or line["flags"].get("max_noise"):
        return True
    return row_name(line["recipe"], line["flags"]) == f"auto: {replayed(line)}"


def _is_current(commit: str, besides: tuple[str, ...]) -> bool:
    """Whether the method's code, and what else a line follows from, computes what it did at a commit; '+' at its end: it was no
    commit's."""
    if commit.endswith("+") or commit == "None":
        return False
    others = [f":!{file}" for file in _LEARNING if file not in besides]
    changed = _git("diff", "--name-only", commit, "--", *_METHOD, _FILES, *besides, *others)
    return changed is not None and all(_says_the_same(commit, file) for file in changed.splitlines())


def _says_the_same(commit: str, file: str) -> bool:
    """Whether a file's code is what it was, words for its readers aside."""
    before, now = _git("show", f"{commit}:{file}"), ROOT / file
    return before is not None and now.is_file() and file.endswith(".py") and _code(before) == _code(now.read_text())


def _code(text: str) -> str:
    """Without comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


def _git(*words: str) -> str | None:
    """What git prints; None where it cannot."""
    found = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return found.stdout if found.returncode == 0 else None


def main(argv: Sequence[str] | None) -> None:
    parser = Parser(prog="python -m utils.experiment.tables", description="Markdown tables from recorded lines.")
    parser.add_argument("pages", type=Path, nargs="+", help="Markdown files whose tables to make anew")
    args: argparse.Namespace = parser.parse_args(argv)
    files = set()
    for page in args.pages:
        text = page.read_text()
        wishes = [found["wish"] for found in _MARKER.finditer(text)]
        if not wishes:
            raise UserError(f"{str(page)!r} asks for no table; put <!-- table: FILE --> and <!-- /table --> into it")
        files |= {file.strip() for wish in wishes for file in wish.split("|")[0].split(",")}
        page.write_text(update(text))
    for file in sorted(files):
        lines = read_lines(ROOT / file)
        old = stale(lines)
        by_commit = ", ".join(f"{count} at {commit}" for commit, count in old.items())
        print(f"{file}: {old.total()} of {len(lines)} lines are of older code" + (f" ({by_commit})" if old else ""))


if __name__ == "__main__":
    try:
        main(None)
    except UserError as error:
        print(f"python -m utils.experiment.tables: error: {error}", file=sys.stderr)
        sys.exit(2)
