"""--images: the user's own pictures, from the command line to the record."""

import json

import pytest
from test_cli import failure, flags, images, tiny, without_batchnorm  # noqa: F401 (a fixture, and networks by name)

import main_cls
from utils.experiment import cli, records
from utils.tasks.classification import TASK


def recorded(tmp_path) -> dict:
    return json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("network", ["tiny", "without_batchnorm"])
def test_pictures_serve_and_are_counted_and_recorded(network, images, tmp_path, capsys):  # noqa: F811
    more = ["--quantize", "--equalize", "--correction", "--images", str(images), "--images_count", "9"]
    main_cls.main(flags(images, tmp_path, *more, model=f"test_cli:{network}"))
    printed, line = capsys.readouterr().out, recorded(tmp_path)
    assert printed.count("gives 9 pictures: 5 for calibration, 4 for judging") == 1
    assert "on 4 held-out images (yours): output" in printed and "distilled" not in printed
    assert line["images"] == {"calibration": 5, "judging": 4, "skipped": []}
    assert line["flags"]["images"] == str(images) and line["flags"]["images_count"] == 9
    assert line["fidelity"]["images"] == 4 and line["fidelity"]["agreement"] >= 75


def test_recipes_that_need_images_use_them(images, tmp_path, capsys):  # noqa: F811
    more = ["--quantize", "--equalize", "--correction", "--distill_correction", "--distill_range"]
    main_cls.main(flags(images, tmp_path, *more, "--images", str(images), "--report", str(tmp_path / "page")))
    assert "gives 20 pictures: 10 for calibration, 10 for judging" in capsys.readouterr().out
    assert "Your images" in (tmp_path / "page" / "report.html").read_text()


def test_distilled_images_are_judged_on_others(images, tmp_path, capsys):  # noqa: F811
    small = ["--distill_images", "8", "--distill_steps", "2", "--distill_cache", str(tmp_path / "cache")]
    main_cls.main(flags(images, tmp_path, "--quantize", "--fidelity", *small))
    assert "on 2 held-out images (distilled): output" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert "images" not in recorded(tmp_path)


def test_lines_without_the_flag_keep_their_identity():
    defaults = cli.defaults(TASK)
    line = {"task": "classification", "weights_sha256": "0", "data": "d", "engine": "simulate"}
    new = line | {"flags": dict(defaults)}
    old = line | {"flags": {key: value for key, value in defaults.items() if not key.startswith("images")}}
    with_pictures = line | {"flags": defaults | {"images": "pictures"}}
    assert records.identity(old, defaults) == records.identity(new, defaults)
    assert records.identity(with_pictures, defaults) != records.identity(new, defaults)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images", "absent"], "--images: there is no folder 'absent'"),
        (["--images", "{empty}"], "holds no pictures"),
        (["--images", "{one}"], "gives 1 picture; pass at least 2"),
        (["--images", "{bad}"], "cannot read picture {bad}/b.png"),
        (["--images", "{bad}", "--skip_bad_images"], "gives 1 picture (1 cannot be read); pass at least 2"),
        (
            ["--images", "x", "--distill_images", "64"],
            "--images takes the place of distilled images; leave out --distill",
        ),
        (["--images", "x", "--distill_steps", "3"], "leave out --distill_steps, or --images"),
        (["--images", "x", "--distill_batch", "3"], "leave out --distill_batch, or --images"),
        (["--images_count", "8"], "--images_count needs --images"),
        (["--distill_images", "8"], "--distill_images needs what looks at images: --auto, --fidelity or a --distill_"),
        (["--images", "x", "--images_count", "1"], "'1' is not a whole number of at least 2"),
    ],
)
def test_mistakes_are_one_line(more, message, images, tmp_path, capsys):  # noqa: F811
    folders = {name: tmp_path / name for name in ("empty", "one", "bad")}
    for name, folder in folders.items():
        folder.mkdir()
        if name != "empty":
            (folder / "a.png").write_bytes((images / "a" / "0.png").read_bytes())
    (folders["bad"] / "b.png").write_bytes(b"no picture")
    words = [word.format(**folders) for word in more]
    assert message.format(**folders) in failure(flags(images, tmp_path, "--quantize", *words), capsys)
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_use_is_needed_and_named(images, tmp_path, capsys):  # noqa: F811
    assert "--images needs --quantize, --equalize or --auto" in failure(
        flags(images, tmp_path, "--images", "x"), capsys
    )
    refused = failure(flags(images, tmp_path, "--quantize", model="test_cli:without_batchnorm"), capsys)
    assert "no BatchNorm, whose statistics --quantize would need; pass --images DIR" in refused
