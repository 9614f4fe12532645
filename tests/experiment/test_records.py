"""Recorded lines: appended whole, read back with care, and recognised when they come again."""

import json
import shlex
from pathlib import Path

import pytest
import torch

import demo
from utils.core.errors import UserError
from utils.experiment import cli, records
from utils.experiment.records import signed, signed_interval
from utils.quantization.recipe import SETTINGS
from utils.tasks.registry import TASKS

ROOT = Path(__file__).resolve().parents[2]
RECORDED = sorted(file for file in (ROOT / "results").glob("*.jsonl") if file.name != "runs.jsonl")


def line(**changes):
    content = {
        "format": records.FORMAT,
        "task": "classification",
        "engine": "simulate",
        "weights_sha256": "0",
        "data": "images",
        "samples": 100,
        "metric": "top1",
        "fp32": 70.0,
        "recipe": "+ReLU+LE",
        "flags": {"per_channel": False},
    }
    return content | changes


def test_lines_are_appended_whole(tmp_path):
    file = tmp_path / "deep" / "runs.jsonl"
    for i in range(3):
        records.record(file, line(samples=i))
    assert [entry["samples"] for entry in records.read_lines(file)] == [0, 1, 2]


@pytest.mark.parametrize("text", ["no json", "[1, 2]", '{"task": 1}', "3"])
def test_what_is_no_result_is_refused_by_line(tmp_path, text):
    file = tmp_path / "runs.jsonl"
    file.write_text(json.dumps(line()) + "\n" + text + "\n")
    with pytest.raises(UserError, match="line 2"):
        records.read_lines(file)


def test_a_line_of_another_version_is_refused(tmp_path):
    file = tmp_path / "runs.jsonl"
    records.record(file, line(format=records.FORMAT + 1))
    with pytest.raises(UserError, match="line 1, has format"):
        records.read_lines(file)


def test_a_torn_last_line_is_dropped_and_said(tmp_path, capsys):
    file = tmp_path / "runs.jsonl"
    records.record(file, line())
    whole = file.read_bytes()
    file.write_bytes(whole + json.dumps(line(samples=5)).encode()[:-20])
    assert [entry["samples"] for entry in records.recover(file)] == [100]
    assert file.read_bytes() == whole
    assert "torn line" in capsys.readouterr().err


def test_a_file_that_is_not_ours_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("milk, eggs")
    with pytest.raises(UserError, match="no result of this project"):
        records.check_writable(file)
    assert file.read_text() == "milk, eggs"


def test_a_results_file_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    records.check_writable(tmp_path / "new" / "folder" / "runs.jsonl")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError):
        records.check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        records.check_writable(tmp_path / "file" / "runs.jsonl")


# ---- identity

DEFAULTS = {"per_channel": False, "workers": 2, "limit": None, "resize": None}


def test_identity_is_what_is_scored_not_how():
    same = line(flags={"per_channel": False, "workers": 7, "report": "there"}, command="other", samples=9)
    assert records.identity(same, DEFAULTS) == records.identity(line(), DEFAULTS)
    for other in (line(flags={"per_channel": True}), line(weights_sha256="1"), line(data="others")):
        assert records.identity(other, DEFAULTS) != records.identity(line(), DEFAULTS)


def test_a_flag_that_came_later_counts_as_its_default():
    later = DEFAULTS | {"telepathy": False, "bits_thought": 8}
    today = line(flags={**later, "per_channel": False})
    assert records.identity(line(), later) == records.identity(today, later)
    given = line(flags={**later, "bits_thought": 4})
    assert records.identity(given, later) != records.identity(today, later)


def test_a_flag_that_is_gone_counts_where_it_was_given():
    unused, used = (line(flags={"per_channel": False, "telepathy": value}) for value in (False, True))
    assert records.identity(unused, DEFAULTS) == records.identity(line(), DEFAULTS)
    assert records.identity(used, DEFAULTS) != records.identity(line(), DEFAULTS)


def test_a_value_that_a_flag_once_had_counts_as_what_it_means_today():
    task = TASKS["classification"]
    passes = ["--quantize", "--correction", "--distill_correction"]
    defaults = cli.defaults(task)
    for typed, once in ([["--distill_rounding"], True], [["--distill_rounding", "gptq"], True], [[], False]):
        today = line(flags=vars(cli.parse(task, [*passes, *typed])))
        older = line(flags=today["flags"] | {"distill_rounding": once})
        del older["flags"]["bits_first_last"]
        assert records.identity(older, defaults) == records.identity(today, defaults)
        learned = line(flags=today["flags"] | {"distill_rounding": "adaround"})
        assert records.identity(learned, defaults) != records.identity(older, defaults)


def typed_again(recorded: dict) -> dict:
    """The line that a recorded command would start today, on the same weights and data."""
    task = TASKS[recorded["task"]]
    args = cli.parse(task, shlex.split(recorded["command"])[2:])
    if recorded["weights"] == "demo":
        vars(args).update(demo.flags(task.name), data=None, weights=None)
    kept = {name: recorded[name] for name in ("task", "weights_sha256", "data", "engine")}
    return kept | {
        "flags": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    }


def test_every_recorded_line_is_found_again_by_its_own_command():
    """No row of results/ is run again by --table because the command line has grown since."""
    lines = [recorded for file in RECORDED for recorded in records.read_lines(file)]
    assert len(lines) >= 175
    defaults = {name: cli.defaults(task) for name, task in TASKS.items()}
    lost = [
        recorded["command"]
        for recorded in lines
        if records.identity(recorded, defaults[recorded["task"]])
        != records.identity(typed_again(recorded), defaults[recorded["task"]])
    ]
    assert lost == []


@pytest.mark.parametrize("setting", ["asymmetric", "bits_first_last", "distill_equalize", "target"])
def test_a_line_from_before_a_setting_existed_is_found_again(setting):
    lines = [recorded for file in RECORDED for recorded in records.read_lines(file)]
    defaults = {name: cli.defaults(task) for name, task in TASKS.items()}
    found = [one for one in lines if one["flags"].get(setting) == SETTINGS[setting].default]
    assert len(found) >= 100
    for recorded in found:
        older = recorded | {"flags": {name: value for name, value in recorded["flags"].items() if name != setting}}
        default = defaults[recorded["task"]]
        assert records.identity(older, default) == records.identity(typed_again(recorded), default)


def test_a_line_says_what_its_figures_follow_from_besides_the_project():
    versions = records.versions()
    assert versions["torch"] == torch.__version__
    assert versions["cpu"] == torch.backends.cpu.get_cpu_capability()


def test_a_change_that_rounds_to_nothing_has_no_minus():
    assert [signed(change) for change in (-1.5, -0.004, 0.0, 0.005)] == ["-1.50", "+0.00", "+0.00", "+0.01"]
    assert signed_interval((-1.6149, -0.001)) == "-1.61 to +0.00"
