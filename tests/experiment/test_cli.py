"""The command as its user meets it: what it prints and records, and one clear line for every mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Head, Twice, chain, settle
from PIL import Image
from torch import nn

import main_cls
import main_det
import main_seg
from utils.core.errors import UserError
from utils.experiment import cli

ROOT = Path(__file__).resolve().parents[2]


def tiny():
    """A network of five classes, for --model test_cli:tiny."""
    torch.manual_seed(0)
    return settle(chain())


def without_batchnorm():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def twice():
    return nn.Sequential(Twice(), Head(3))


def untraceable():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = tiny()

        def forward(self, x):
            return self.network(x if x.sum() > 0 else -x)

    return Branching()


def with_nan():
    model = tiny()
    model[0][0].weight.data[0] = float("nan")
    return model


@pytest.fixture
def images(tmp_path):
    generator = np.random.default_rng(0)
    for name in "abcde":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, 255, (30, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def flags(images, tmp_path, *more, model="test_cli:tiny"):
    base = ["--model", model, "--data", str(images), "--image_size", "24", "--workers", "0"]
    return [*base, "--results", str(tmp_path / "runs.jsonl"), *more]


def test_a_run_prints_a_table_and_records_a_line(images, tmp_path, capsys):
    argv = flags(images, tmp_path, "--quantize", "--relu", "--equalize", "--correction")
    main_cls.main(argv)
    main_cls.main(argv)
    first, second = (json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines())
    volatile = ("time", "forward_seconds")
    assert {k: v for k, v in first.items() if k not in volatile} == {
        k: v for k, v in second.items() if k not in volatile
    }
    assert first["task"] == "classification" and first["metric"] == "top1" and first["samples"] == 20
    assert first["recipe"] == "+ReLU+LE+BC" and first["bits"] == {"weight": 8, "activation": 8, "bias": 32}
    assert first["command"].startswith("python main_cls.py --model test_cli:tiny")
    assert set(first["metrics"]) == {"fp32_original", "fp32", "quantized"}
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("  ")[0] for line in lines if line.startswith(("FP32", "INT8"))]
    assert rows[:3] == ["FP32 as loaded", "FP32 +ReLU+LE", "INT8 +ReLU+LE+BC"]
    assert any("equalized" in line for line in lines)


def test_a_layer_used_twice_is_two_layers(images, tmp_path, capsys):
    main_cls.main(flags(images, tmp_path, "--model", "test_cli:twice"))
    line = json.loads((tmp_path / "runs.jsonl").read_text())
    assert line["fp32"] == line["fp32_original"]
    assert re.search(r"found layers +3$", capsys.readouterr().out, re.MULTILINE)


def test_without_quantize_nothing_is_quantized(images, tmp_path):
    main_cls.main(flags(images, tmp_path))
    line = json.loads((tmp_path / "runs.jsonl").read_text())
    assert line["quantized"] is None and line["bits"] is None and line["fp32"] == line["fp32_original"]


def test_limit_is_recorded(images, tmp_path):
    main_cls.main(flags(images, tmp_path, "--limit", "7", "--quantize"))
    line = json.loads((tmp_path / "runs.jsonl").read_text())
    assert line["samples"] == 7 and line["flags"]["limit"] == 7 and line["subset"] == "evenly spread"


def test_verbose_lists_every_layer(images, tmp_path, capsys):
    main_cls.main(flags(images, tmp_path, "--quantize", "--equalize", "--verbose"))
    printed = capsys.readouterr().out
    assert "equalized: 0.0 -> 1.0" in printed
    assert "skipped, equalized: 3.linear (read by the network's output)" in printed


def test_bad_images_are_skipped_only_when_asked(images, tmp_path, capsys):
    (images / "b" / "2.png").write_bytes(b"no image")
    argv = flags(images, tmp_path, "--quantize")
    assert "b/2.png" in failure(argv, capsys)
    assert not (tmp_path / "runs.jsonl").exists()
    main_cls.main([*argv, "--skip_bad_images"])
    assert json.loads((tmp_path / "runs.jsonl").read_text())["samples"] == 19


def failure(argv, capsys) -> str:
    """The one line with which the command refuses; its exit code must be 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda _: main_cls.main(argv), "main_cls.py")
    assert caught.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and errors[0].startswith("main_cls.py: error: ")
    return errors[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--absorption"], "--absorption needs --equalize"),
        (["--correction"], "--correction needs --quantize"),
        (["--clip_weight"], "--clip_weight needs --quantize"),
        (["--per_channel"], "--per_channel needs --quantize"),
        (["--bits_weight", "4"], "--bits_weight needs --quantize"),
        (["--quantize", "--bits_weight", "1"], "'1' is not a number of bits from 2 to 16"),
        (["--quantize", "--bits_activation", "17"], "'17' is not a number of bits from 2 to 16"),
        (["--quantize", "--bits_bias", "12"], "--bits_bias"),
        (["--quantize", "--clip_weight", "-3"], "'-3' is not a positive number"),
        (["--limit", "0"], "'0' is not a whole number of at least 1"),
        (["--std", "1", "1", "0"], "--std must be positive"),
        (["--std", "1", "1", "nan"], "'nan' is not a finite number"),
        (["--mean", "nan", "0", "0"], "'nan' is not a finite number"),
        (["--seed", "99999999999999999999999"], "is not a whole number from 0 to 4294967295"),
        (["--weights", ""], "--weights got an empty value, as from a variable that is not set"),
        (["--classes="], "--classes got an empty value"),
        (["--table", "--rows", "Original", ""], "--rows got an empty value"),
        (["--data=folder="], "no data folder at 'folder='"),
        (["--weights", "w.pth", "--quantize", "--export", "./w.pth"], "--export would overwrite the file of --weights"),
        (["--image_size", "1", "2", "3"], "--image_size takes one number, or height and width"),
        (["--device", "cuda:99"], "--device cuda:99 is not there"),
        (["--device", "abacus"], "unknown --device 'abacus'"),
        (["--results", "/dev/null/runs.jsonl"], "cannot write results"),
        (["--weights", "absent.pth"], "no weights file at 'absent.pth'"),
        (["--model", "mobilenet"], "did you mean mobilenet_v2"),
        (["--model", "test_cli:untraceable"], "the network's control flow depends on its values (at "),
        (["--model", "test_cli:with_nan"], "'0.0.weight' hold 27 NaN"),
        (
            ["--model", "test_cli:without_batchnorm", "--quantize"],
            "no BatchNorm, whose statistics --quantize would need",
        ),
        (["--data", "absent"], "no data folder at 'absent'"),
        (["--model", "efficientnet_lite0"], "the network has 1000 outputs"),
    ],
)
def test_mistakes_are_one_line(more, message, images, tmp_path, capsys):
    assert message in failure(flags(images, tmp_path, *more), capsys)
    assert not (tmp_path / "runs.jsonl").exists()


@pytest.mark.parametrize("script", [main_cls, main_seg, main_det])
def test_weights_without_data_are_refused(script, tmp_path):
    with pytest.raises(UserError, match="no data to evaluate on; pass --data"):
        script.main(["--weights", "some.pth", "--results", str(tmp_path / "runs.jsonl")])


def test_the_script_itself_fails_with_one_line_and_code_2(tmp_path):
    command = [
        sys.executable,
        ROOT / "main_cls.py",
        "--data",
        str(tmp_path / "absent"),
        "--model",
        "efficientnet_lite0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "no data folder" in done.stderr
    assert not list(tmp_path.iterdir())
