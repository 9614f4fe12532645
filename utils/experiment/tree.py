"""The tree in docs/architecture.md, made from the modules' own first lines: python -m utils.experiment.tree"""

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.core.arguments import Parser

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
_MARKER = re.compile(r"<!-- tree -->.*?<!-- /tree -->", re.DOTALL)


def tree() -> str:
    """Every package and module with the first sentence of its docstring."""
    lines = [_line(file.name, file, 0) for file in sorted([ROOT / "dfq.py", *ROOT.glob("main_*.py")])]
    for folder in ("utils", "modeling", "demo", "benchmarks"):
        lines += _folder(ROOT / folder, 0)
    return "\n".join(lines)


def _folder(folder: Path, depth: int) -> Iterator[str]:
    yield _line(f"{folder.name}/", folder / "__init__.py", depth)
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py" and path.name != "__init__.py":
            yield _line(path.name, path, depth + 1)
    for path in sorted(folder.iterdir()):
        if (path / "__init__.py").is_file():
            yield from _folder(path, depth + 1)


def _line(name: str, file: Path, depth: int) -> str:
    start = "  " * depth + name
    return f"{start:<34}{first_sentence(file)}".rstrip()


def first_sentence(file: Path) -> str:
    """Of a module's docstring, what its first line says before a full stop or a colon with a command."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    first = text.partition("\n\n")[0].replace("\n", " ")
    return re.split(r"\.(?: |$)|: python -m", first)[0]


def update(text: str) -> str:
    """A page's text with the tree between its markers made anew."""
    return _MARKER.sub(lambda _: f"<!-- tree -->\n```\n{tree()}\n```\n<!-- /tree -->", text)


def main(argv: Sequence[str] | None) -> None:
    Parser(prog="python -m utils.experiment.tree", description="Write the tree of docs/architecture.md.").parse_args(
        argv
    )
    PAGE.write_text(update(PAGE.read_text()))
    print(f"wrote {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main(None)
