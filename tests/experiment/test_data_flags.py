"""The flags that tell how files are read: what they reach, and the combinations that mean nothing."""

import json

import numpy as np
import pytest
import torch
from networks import chain, settle
from PIL import Image
from torch import nn

import main_cls
import main_det
import main_seg
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.experiment import cli
from utils.tasks.masks import MaskValues, parse_mask_values, parse_void


def tiny():
    """A network of five classes, for --model test_data_flags:tiny."""
    torch.manual_seed(0)
    return settle(chain())


def by_brightness():
    """A grey network of two classes: dark and bright."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model[0].weight.data, model[0].bias.data = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1), torch.zeros(2)
    return model.eval()


def bright_pixels():
    """A segmentation network of two classes: dark and bright pixels."""
    model = nn.Conv2d(3, 2, 1)
    model.weight.data, model.bias.data = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1), torch.zeros(2)
    return model.eval()


LOADING = {
    "resize": (main_cls, ["--resize", "20"]),
    "model": (main_cls, ["--model", "resnet18"]),
    "checkpoint_key": (main_cls, ["--weights", "w.pth", "--checkpoint_key", "ema"]),
    "mean": (main_seg, ["--mean", "0.5"]),
    "distill_images": (main_cls, ["--distill_images", "3"]),
    "distill_cache": (main_det, ["--distill_cache", "folder"]),
    "target": (main_cls, ["--target", "openvino"]),
    "per_channel": (main_seg, ["--per_channel"]),
    "fidelity": (main_cls, ["--fidelity"]),
}


@pytest.mark.parametrize("flag", LOADING)
def test_load_takes_no_flag_that_it_ignores(flag, capsys):
    script, words = LOADING[flag]
    with pytest.raises(SystemExit, match="2"):
        script.parse_args(["--load", "net.dfq", "--data", "x", *words])
    error = capsys.readouterr().err
    assert "--load takes the network, its input and its passes from the file; leave out --" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "words"),
    [(main_cls, ["--classes", "c.txt"]), (main_seg, ["--void", "none"]), (main_det, ["--pixel_inclusive"])],
)
def test_load_takes_the_flags_of_data(script, words):
    assert script.parse_args(["--load", "net.dfq", "--data", "x", *words]).load


def test_the_doctor_takes_the_opset_that_its_file_would_have():
    assert main_cls.parse_args(["--doctor", "--opset", "21"]).opset == 21


def test_a_key_needs_a_checkpoint(capsys):
    with pytest.raises(SystemExit):
        main_cls.parse_args(["--data", "x", "--checkpoint_key", "ema"])
    assert "--checkpoint_key needs --weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0=0,255=1", {0: 0, 255: 1}), (" 7 = void, 1=0", {7: 255, 1: 0}), ("65535=1", {65535: 1})],
)
def test_values_of_masks_are_parsed(text, expected):
    assert parse_mask_values(text) == expected


@pytest.mark.parametrize("text", [" ", "0", "0=a", "0=0,0=1", "65536=0", "0=256", "0=0;1=1"])
def test_values_of_masks_that_mean_nothing_are_refused(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        main_seg.parse_args(["--mask_values", text])
    error = capsys.readouterr().err
    assert "is no list of different values and their classes" in error and error.count("\n") == 1


def test_no_values_of_masks_are_refused_as_empty(capsys):
    with pytest.raises(SystemExit, match="2"):
        main_seg.parse_args(["--mask_values", ""])
    error = capsys.readouterr().err
    assert "--mask_values got an empty value" in error and error.count("\n") == 1


def test_void_is_a_value_or_none(capsys):
    assert parse_void("none") is None and parse_void("0") == 0
    for text in ("x", "-1", "65536", "None"):
        with pytest.raises(SystemExit, match="2"):
            main_seg.parse_args(["--void", text])
    assert "is neither a value of a mask, 0 to 65535, nor none" in capsys.readouterr().err
    with pytest.raises(UserError, match="--mask_values names class 2, but the network has 2, 0 to 1"):
        MaskValues(2, {0: 0, 255: 2})


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_mean_and_std_have_a_number_for_each_channel(channels):
    spec = InputSpec(mean=(0.1,) * channels, std=(0.2,) * channels)
    args = main_cls.parse_args(["--mean", *["0.5"] * channels, "--std", *["0.25"] * channels])
    changed = cli.input_spec(args, spec)
    assert changed.mean == (0.5,) * channels and changed.std == (0.25,) * channels
    for flag in ("--mean", "--std"):
        args = main_cls.parse_args([flag, "0.5", "0.5"])
        with pytest.raises(
            UserError, match=rf"{flag} has 2 number\(s\), but the network's images have {channels} channel"
        ):
            cli.input_spec(args, spec)


def last_line(tmp_path):
    return json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[-1])


def run(script, tmp_path, data, *words):
    size = ["--image_size", "8", "--workers", "0", "--results", str(tmp_path / "runs.jsonl")]
    script.main(["--data", str(data), *size, *words])
    return last_line(tmp_path)


def test_a_grey_network_scores_grey_and_16_bit_pictures_by_their_numbers(tmp_path, capsys):
    for name, value in (("0", 20), ("1", 230)):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (9, 9), value).save(tmp_path / f"data/{name}/8bit.png")
        Image.fromarray(np.full((9, 9), value * 257, np.uint16)).save(tmp_path / f"data/{name}/16bit.png")
    line = run(main_cls, tmp_path, tmp_path / "data", "--model", "test_data_flags:by_brightness")
    assert line["metrics"]["fp32_original"]["top1"] == 100
    assert "labels: folder names are the network's outputs, counted from 0" in capsys.readouterr().out
    (tmp_path / "swapped.txt").write_text("1\n0")
    words = ("--model", "test_data_flags:by_brightness", "--classes", str(tmp_path / "swapped.txt"))
    assert run(main_cls, tmp_path, tmp_path / "data", *words)["metrics"]["fp32_original"]["top1"] == 0


def test_the_key_of_a_checkpoint_reaches_the_network(tmp_path, capsys):
    good, bad = by_brightness().state_dict(), {key: -value for key, value in by_brightness().state_dict().items()}
    torch.save({"state_dict": bad, "ema": good}, tmp_path / "w.pth")
    for name, value in (("0", 20), ("1", 230)):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (9, 9), value).save(tmp_path / f"data/{name}/a.png")
    words = ["--model", "test_data_flags:by_brightness", "--weights", str(tmp_path / "w.pth")]
    scores = [
        run(main_cls, tmp_path, tmp_path / "data", *words, *more)["metrics"]["fp32_original"]["top1"]
        for more in ((), ("--checkpoint_key", "ema"), ("--checkpoint_key", "state_dict"))
    ]
    assert scores == [100, 100, 0]
    assert "taken from 'ema' (averaged), not 'state_dict'; for that pass --checkpoint_key" in capsys.readouterr().out


def test_binary_masks_score_as_they_are_said_to_be(tmp_path):
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / "voc" / folder).mkdir(parents=True)
    (tmp_path / "voc/ImageSets/Segmentation/val.txt").write_text("a\n")
    (tmp_path / "names.txt").write_text("dark\nbright\n")
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, 4:] = 255
    Image.fromarray(np.repeat(pixels[..., None], 3, 2)).save(tmp_path / "voc/JPEGImages/a.png")
    Image.fromarray(pixels).save(tmp_path / "voc/SegmentationClass/a.png")
    words = ("--model", "test_data_flags:bright_pixels", "--classes", str(tmp_path / "names.txt"))
    with pytest.raises(UserError, match="pass --mask_values 0=0,255=1"):
        run(main_seg, tmp_path, tmp_path / "voc", *words)
    assert (
        run(main_seg, tmp_path, tmp_path / "voc", *words, "--mask_values", "0=0,255=1")["metrics"]["fp32_original"][
            "miou"
        ]
        == 100
    )
    swapped = run(main_seg, tmp_path, tmp_path / "voc", *words, "--mask_values", "0=1,255=0")
    assert swapped["metrics"]["fp32_original"]["miou"] == 0
    run(main_seg, tmp_path, tmp_path / "voc", *words, "--void", "255")
