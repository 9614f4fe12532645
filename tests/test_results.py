"""Recorded lines and the tables made from them."""

import json
import re
from pathlib import Path

import pytest

from utils import results
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def line(**changes):
    content = {
        "task": "classification",
        "model": "net",
        "weights": "net.pth",
        "data": "images",
        "samples": 100,
        "metric": "top1",
        "fp32": 70.0,
        "fp32_original": 71.0,
        "quantized": 69.5,
        "recipe": "+ReLU+LE",
        "bits": {"weight": 8, "activation": 8, "bias": 32},
        "flags": {"per_channel": False},
        "command": "python main_cls.py --quantize",
    }
    return content | changes


def test_lines_are_appended_whole(tmp_path):
    file = tmp_path / "deep" / "runs.jsonl"
    for i in range(3):
        results.record(file, line(samples=i))
    assert [entry["samples"] for entry in results.read_lines([file])] == [0, 1, 2]


@pytest.mark.parametrize("text", ["no json", "[1, 2]", '{"task": 1}', "3"])
def test_what_is_no_result_is_refused_by_line(tmp_path, text):
    file = tmp_path / "runs.jsonl"
    file.write_text(json.dumps(line()) + "\n" + text + "\n")
    with pytest.raises(UserError, match="line 2"):
        results.read_lines([file])


def test_a_table_shows_the_change_from_the_network_as_loaded():
    table = results.markdown([line(), line(quantized=None, bits=None, recipe="Original")])
    assert "| +ReLU+LE | 8/8/32 per tensor | 70.00 | 69.50 | -1.50 | `python main_cls.py --quantize` |" in table
    assert "| Original | - | 70.00 | - | - |" in table


def test_updating_replaces_what_is_between_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results: start -->\nold\n<!-- results: end -->\nafter\n")
    assert results.update(readme, "new") == "before\n<!-- results: start -->\nnew\n<!-- results: end -->\nafter\n"
    readme.write_text("nothing")
    with pytest.raises(UserError, match="has no lines"):
        results.update(readme, "new")


def test_the_readmes_tables_are_those_of_the_recorded_runs():
    files = sorted((ROOT / "results").glob("*.jsonl"))
    files = [file for file in files if file.name != "runs.jsonl"]
    tables = results.markdown(results.read_lines(files))
    assert results.update(ROOT / "README.md", tables) == (ROOT / "README.md").read_text(), (
        "run: python -m utils.results results/... --update README.md"
    )


def test_a_results_file_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    results.check_writable(tmp_path / "new" / "folder" / "runs.jsonl")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError):
        results.check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        results.check_writable(tmp_path / "file" / "runs.jsonl")


def test_every_number_of_the_readme_has_its_command():
    text = (ROOT / "README.md").read_text()
    between = text.split("<!-- results: start -->")[1].split("<!-- results: end -->")[0]
    rows = [row for row in between.splitlines() if re.match(r"\| (\+|Original)", row)]
    assert rows and all("`python main_" in row for row in rows)
