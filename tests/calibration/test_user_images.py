"""The user's own unlabelled images."""

from functools import partial

import pytest
import torch
from networks import SPEC
from PIL import Image

from utils.calibration.images import halves, load_images
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.tasks.classification import TASK
from utils.tasks.registry import TASKS

READ = partial(TASK.read_image, spec=SPEC)


@pytest.fixture
def folder(tmp_path):
    for i in range(9):
        place = tmp_path / ("deep/er" if i % 2 else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + i, 30), (i * 20, 0, 255)).save(place / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_pictures_of_all_folders_come_as_the_evaluation_resizes_them(folder):
    loaded = load_images(folder, READ)
    assert loaded.real and not loaded.skipped
    assert loaded.description == "9 pictures: 5 for calibration, 4 for judging"
    assert loaded.calibration.shape == SPEC.shape(5) and loaded.judging.shape == SPEC.shape(4)
    expected = TASK.read_image(folder / "0.png", SPEC)
    torch.testing.assert_close(loaded.calibration[0], expected, rtol=0, atol=0)
    everything = torch.cat([loaded.calibration, loaded.judging])
    assert len({round(float(image[0].mean()), 4) for image in everything}) == 9  # none twice


def test_so_many_are_spread_over_the_folder(folder):
    assert load_images(folder, READ, count=4).judging.shape == SPEC.shape(2)
    assert load_images(folder, READ, count=40).calibration[:, 0, 0, 0].unique().shape == (5,)


def test_networks_get_pictures_of_their_channels(folder):
    grey = InputSpec(size=(8, 8), resize=8, mean=(0.5,), std=(0.5,))
    for task in TASKS.values():
        assert load_images(folder, partial(task.read_image, spec=grey)).calibration.shape == grey.shape(5)


def test_a_broken_picture_is_named_or_skipped(folder, capsys):
    (folder / "3 broken.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"cannot read picture .*3 broken.jpg .*; mend it, or pass --skip_bad_images"):
        load_images(folder, READ)
    loaded = load_images(folder, READ, skip_bad_images=True)
    assert loaded.calibration.shape == SPEC.shape(5) and "3 broken.jpg" in loaded.skipped[0]
    assert loaded.description.endswith("1 cannot be read, and are skipped")
    assert "skipped" in capsys.readouterr().err


def test_folders_that_give_too_little_are_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        load_images(tmp_path / "none", READ)
    with pytest.raises(UserError, match="holds no pictures"):
        load_images(tmp_path, READ)
    Image.new("RGB", (30, 30)).save(tmp_path / "one.png")
    with pytest.raises(UserError, match="gives 1 picture; pass at least 2"):
        load_images(tmp_path, READ)
    (tmp_path / "two.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"gives 1 picture \(1 cannot be read\)"):
        load_images(tmp_path, READ, skip_bad_images=True)


def test_halves_are_of_all_kinds():
    first, second = halves(torch.arange(5))
    assert first.tolist() == [0, 2, 4] and second.tolist() == [1, 3]
