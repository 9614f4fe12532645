"""Recorded lines and the tables made from them."""

import json
import re
from pathlib import Path

import pytest

from utils.core.errors import UserError
from utils.experiment import records as results

ROOT = Path(__file__).resolve().parents[2]


def line(**changes):
    content = {
        "format": results.FORMAT,
        "task": "classification",
        "engine": "simulate",
        "weights_sha256": "0",
        "model": "net",
        "weights": "net.pth",
        "data": "images",
        "samples": 100,
        "metric": "top1",
        "fp32": 70.0,
        "fp32_original": 71.0,
        "quantized": 69.5,
        "intervals": {"fp32_original": [61.0, 80.0]},
        "change_interval": [-3.0, 0.25],
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
    assert [entry["samples"] for entry in results.read_lines(file)] == [0, 1, 2]


@pytest.mark.parametrize("text", ["no json", "[1, 2]", '{"task": 1}', "3"])
def test_what_is_no_result_is_refused_by_line(tmp_path, text):
    file = tmp_path / "runs.jsonl"
    file.write_text(json.dumps(line()) + "\n" + text + "\n")
    with pytest.raises(UserError, match="line 2"):
        results.read_lines(file)


def test_a_line_of_another_version_is_refused(tmp_path):
    file = tmp_path / "runs.jsonl"
    results.record(file, line(format=results.FORMAT + 1))
    with pytest.raises(UserError, match="line 1, has format"):
        results.read_lines(file)


def test_a_torn_last_line_is_dropped_and_said(tmp_path, capsys):
    file = tmp_path / "runs.jsonl"
    results.record(file, line())
    whole = file.read_bytes()
    file.write_bytes(whole + json.dumps(line(samples=5)).encode()[:-20])
    assert [entry["samples"] for entry in results.recorded(file).values()] == [100]
    assert file.read_bytes() == whole
    assert "torn line" in capsys.readouterr().err


def test_a_file_that_is_not_ours_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("milk, eggs")
    with pytest.raises(UserError, match="no result of this project"):
        results.check_writable(file)
    assert file.read_text() == "milk, eggs"


def test_identity_is_what_is_scored_not_how():
    same = line(flags={"per_channel": False, "workers": 7, "report": "there"}, command="other", samples=9)
    assert results.identity(same) == results.identity(line())
    assert results.identity(line(flags={"per_channel": True})) != results.identity(line())
    assert results.identity(line(weights_sha256="1")) != results.identity(line())


def test_a_table_shows_the_change_its_interval_and_the_flags_of_each_row():
    other = line(quantized=None, bits=None, recipe="Original", command="python main_cls.py --relu")
    table = results.markdown([line(), other])
    assert "`python main_cls.py` and" in table
    assert "| +ReLU+LE | 8/8/32 | 70.00 | 69.50 | -1.50 | -3.00 to +0.25 | `--quantize` |" in table
    assert "| Original | - | 70.00 | - | - | - | `--relu` |" in table


def test_a_table_of_a_published_network_shows_its_figures():
    table = results.markdown([line(model="mobilenet_v2", data="ImageNet")])
    assert "| published 71.81 → | change | FP32 |" in table
    assert "| 70.32 | -1.49 | 70.00 | 69.50 | -1.50 |" in table


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
    tables = results.markdown([line for file in files for line in results.read_lines(file)])
    assert results.update(ROOT / "README.md", tables) == (ROOT / "README.md").read_text(), (
        "run: python -m utils.experiment.records results/... --update README.md"
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
    assert rows and all(row.endswith("` |") for row in rows)
    assert between.count("`python main_") == between.count("| row |") > 0
