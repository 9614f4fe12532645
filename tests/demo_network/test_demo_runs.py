"""The three scripts on the embedded demo, end to end, as a newcomer runs them first."""

import json

import pytest

import main_cls
import main_det
import main_seg

# Script, the metric that counts, the least that its float network scores, and how much INT8 may lose, in points.
# Measured figures are in results/demo.jsonl; the margins allow for another CPU's rounding.
RUNS = {
    "classification": (main_cls, "top1", 78.0, 2.0),
    "segmentation": (main_seg, "miou", 50.0, 3.0),
    "detection": (main_det, "map_voc12", 50.0, 3.0),
}


@pytest.mark.parametrize("task", RUNS)
def test_the_command_runs_on_the_demo(task, tmp_path, capsys):
    script, metric, least, loss = RUNS[task]
    file, report = tmp_path / "runs.jsonl", tmp_path / "report"
    flags = ["--quantize", "--relu", "--equalize", "--correction", "--workers", "0"]
    script.main([*flags, "--results", str(file), "--report", str(report)])
    line = json.loads(file.read_text())
    assert line["task"] == task and line["metric"] == metric and line["recipe"] == "+ReLU+LE+BC"
    assert line["fp32_original"] >= least
    assert line["quantized"] >= line["fp32"] - loss
    assert capsys.readouterr().out.startswith("demo: ")
    assert len(list(report.glob("*.png"))) >= 2
