"""docs/flags.md, made from the parsers and the recipe: python -m utils.experiment.flags"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.core.arguments import Parser
from utils.experiment import cli
from utils.experiment.tables import table
from utils.quantization.recipe import SETTINGS, TABLE
from utils.tasks.registry import TASKS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "flags.md"
_HEAD = """# Flags

Made by `python -m utils.experiment.flags`; do not edit. The three scripts share all flags but those of the last sections.
A flag without what it needs, and any value out of its range, is one line and exit code 2; `Recipe` in Python refuses the
same with the same words.
"""


def page() -> str:
    """The page: every flag by group, what it needs and how it shows in a row's name, and the rows of --table."""
    parsers = {task.program: cli.parser_of(task) for task in TASKS.values()}
    first = next(iter(parsers.values()))
    own = {program: _own_flags(parser) for program, parser in parsers.items()}
    parts = [_HEAD]
    for group in first._action_groups:
        actions = [action for action in group._group_actions if action.dest not in own[first.prog] | {"help"}]
        if actions:
            parts += [f"## {group.title[0].upper()}{group.title[1:]}", _flags(actions, parsers)]
    for program, parser in parsers.items():
        parts += [f"## Of {program} alone", _flags([a for a in parser._actions if a.dest in own[program]], {})]
    rows = [[name, f"`{' '.join(recipe.words)}`"] for name, recipe in TABLE.items()]
    parts += ["## Rows of --table", table(["row", "is the same as"], rows)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _own_flags(parser: argparse.ArgumentParser) -> set[str]:
    """The flags that stand in no group: the script's own."""
    grouped = {action.dest for group in parser._action_groups[2:] for action in group._group_actions}
    return {action.dest for action in parser._actions} - grouped - {"help"}


def _flags(actions: Sequence[argparse.Action], parsers: dict[str, argparse.ArgumentParser]) -> str:
    """A table of flags; parsers: by script, whose defaults to compare."""
    rows = []
    for action in actions:
        defaults = {program: parser.get_default(action.dest) for program, parser in parsers.items()}
        differs = len({str(value) for value in defaults.values()}) > 1
        remark = " (" + ", ".join(f"{program}: {value}" for program, value in defaults.items()) + ")" if differs else ""
        text = action.help or ""
        text = text.replace(" (default: %(default)s)", "") if differs else text % {"default": action.default}
        rows.append([f"`{_usage(action)}`", (text + remark).replace("|", "\\|"), _part_of_name(action)])
    if not any(row[2] for row in rows):
        return table(["flag", "what it does"], [row[:2] for row in rows])
    return table(["flag", "what it does", "in a row's name"], rows)


def _usage(action: argparse.Action) -> str:
    """A flag with its value, as one types it."""
    flag = action.option_strings[0]
    if action.nargs == 0:
        return flag
    value = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.metavar or action.dest.upper()
    shown = {"?": f"[{value}]", "+": f"{value} ..."}.get(action.nargs, value)
    return f"{flag} {' '.join([shown] * action.nargs) if isinstance(action.nargs, int) else shown}".replace("|", "\\|")


def _part_of_name(action: argparse.Action) -> str:
    dest = action.dest
    part = SETTINGS[dest].metadata["abbreviation"] if dest in SETTINGS else None
    if part and part.words:
        return " or ".join(f"`{part.of(value)}`" for value in part.words)
    value = "N" if action.nargs == "+" else dest.rpartition("_")[2].upper()  # of several values their number
    return f"`{part.text.strip().replace('{:g}', 'W').replace('{}', value)}`" if part else ""


def main(argv: Sequence[str] | None) -> None:
    Parser(prog="python -m utils.experiment.flags", description="Write docs/flags.md.").parse_args(argv)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    print(f"wrote {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main(None)
