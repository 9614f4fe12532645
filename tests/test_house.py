"""The house itself: what imports what, and how large its rooms are."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = [ROOT / "dfq.py", *ROOT.glob("main_*.py")]
CODE += [file for folder in ("utils", "modeling", "demo", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
LAZY = ("onnx", "onnxruntime", "timm", "matplotlib", "openvino", "tensorrt")


def package_of(module: str) -> str:
    """The room that a module is in: utils.graph, modeling, dfq."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "utils" else parts[0]


def imports(file: Path) -> Iterator[str]:
    """What a file imports as it is imported itself: not in functions, and not for type checkers alone."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms() -> dict[str, set[str]]:
    """For each room, the rooms that it imports."""
    found: dict[str, set[str]] = {}
    for file in CODE:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        found.setdefault(package_of(module), set()).update(map(package_of, imports(file)))
    return {room: (others & found.keys()) - {room} for room, others in found.items()}


def test_rooms_import_one_way():
    left = rooms()
    while free := [room for room, others in left.items() if not others & left.keys()]:
        for room in free:
            del left[room]
    assert left == {}, "these rooms import one another in a circle"


def test_what_stands_below_imports_nothing_above():
    below = rooms()
    assert below["utils.core"] == set()
    assert below["utils.graph"] <= {"utils.core"}
    for room in ("utils.calibration", "utils.quantization", "utils.passes", "utils.backends", "utils.tasks"):
        assert not below[room] & {"utils.experiment", "dfq", "modeling", "demo"}, room
    assert not below["utils.experiment"] & {"dfq", "modeling", "demo"}


def test_slow_packages_are_imported_by_what_uses_them_alone():
    """In a fresh interpreter: once all is imported, and once a script has printed its help."""
    check = f"print('there:', [name for name in {LAZY} if name in sys.modules])"
    lines = ("import sys, dfq, utils.experiment.runner, main_seg, main_det", check, "import main_cls", check)
    code = "\n".join([*lines, "try: main_cls.main(['--help'])", "except SystemExit: pass", check])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("there:")] == ["there: []"] * 3
    assert "--quantize" in done.stdout


def test_no_file_is_too_long_to_read():
    lines = {file.relative_to(ROOT).as_posix(): file.read_text().count("\n") for file in CODE}
    assert {name: count for name, count in lines.items() if count > 450} == {}


def test_no_function_is_too_long_to_read():
    long = {}
    for file in CODE:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 45:
                long[f"{file.name}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert long == {}


def test_the_scripts_are_short_and_differ_in_their_task_alone():
    scripts = [file.read_text() for file in ROOT.glob("main_*.py")]
    assert len(scripts) == 3 and all(text.count("\n") < 50 for text in scripts)
    names = ("classification", "segmentation", "detection")
    bare = [text.replace(name, "TASK") for text in scripts for name in names if f"utils.tasks.{name}" in text]
    bare = [re.sub("build_(classifier|segmenter|detector)", "build_TASK", text) for text in bare]
    without_boxes = [text for text in bare if "box_coder" not in text]
    assert len(without_boxes) == 2 and without_boxes[0] == without_boxes[1]


# What style calls by the field's words, on the left as we once said it.
OLD_WORDS = ("95 % of it", "foretell", "least noise", "even ranges", "output hears", "heard", "left out", "made up for")


@pytest.mark.parametrize("word", OLD_WORDS)
def test_the_words_are_the_fields(word):
    rooms = ("utils/core", "utils/experiment", "main_", "demo", "benchmarks", "utils/quantization/recipe.py")
    own = [file for file in CODE if file.relative_to(ROOT).as_posix().startswith(rooms)]
    pages = [ROOT / "README.md", ROOT / "results" / "README.md", *(ROOT / "docs").glob("*.md")]
    for file in [*own, *pages]:
        text = re.sub(r"<!-- tree -->.*<!-- /tree -->", "", file.read_text(), flags=re.DOTALL)
        assert word not in text, f"{file.relative_to(ROOT)} says {word!r}"
