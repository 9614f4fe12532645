"""The user's own unlabelled images."""

import pytest
import torch
from networks import SPEC
from PIL import Image

from utils.calibration.images import halves, load_images
from utils.core.errors import UserError
from utils.tasks.data import classification_transform


@pytest.fixture
def folder(tmp_path):
    for i in range(9):
        place = tmp_path / ("deep/er" if i % 2 else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + i, 30), (i * 20, 0, 255)).save(place / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_pictures_of_all_folders_come_as_the_evaluation_resizes_them(folder):
    loaded = load_images(folder, classification_transform(SPEC))
    assert loaded.files == 9 and not loaded.skipped
    assert loaded.calibration.shape == SPEC.shape(5) and loaded.judging.shape == SPEC.shape(4)
    expected = classification_transform(SPEC)(Image.open(folder / "0.png"))
    torch.testing.assert_close(loaded.calibration[0], expected, rtol=0, atol=0)
    everything = torch.cat([loaded.calibration, loaded.judging])
    assert len({round(float(image[0].mean()), 4) for image in everything}) == 9  # none twice


def test_so_many_are_spread_over_the_folder(folder):
    assert load_images(folder, classification_transform(SPEC), count=4).files == 4
    assert load_images(folder, classification_transform(SPEC), count=40).files == 9


def test_grey_networks_get_grey_pictures(folder):
    shapes = []
    load_images(folder, lambda image: shapes.append(image.mode) or torch.zeros(1, 2, 2), mode="L")
    assert shapes == ["L"] * 9


def test_a_broken_picture_is_named_or_skipped(folder, capsys):
    (folder / "3 broken.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"cannot read picture .*3 broken.jpg .*; mend it, or pass --skip_bad_images"):
        load_images(folder, classification_transform(SPEC))
    loaded = load_images(folder, classification_transform(SPEC), skip_bad_images=True)
    assert loaded.files == 9 and "3 broken.jpg" in loaded.skipped[0]
    assert "skipped" in capsys.readouterr().err


def test_folders_that_give_too_little_are_one_line(tmp_path):
    transform = classification_transform(SPEC)
    with pytest.raises(UserError, match="there is no folder"):
        load_images(tmp_path / "none", transform)
    with pytest.raises(UserError, match="holds no pictures"):
        load_images(tmp_path, transform)
    Image.new("RGB", (30, 30)).save(tmp_path / "one.png")
    with pytest.raises(UserError, match="gives 1 picture; pass at least 2"):
        load_images(tmp_path, transform)
    (tmp_path / "two.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"gives 1 picture \(1 cannot be read\)"):
        load_images(tmp_path, transform, skip_bad_images=True)


def test_halves_are_of_all_kinds():
    first, second = halves(torch.arange(5))
    assert first.tolist() == [0, 2, 4] and second.tolist() == [1, 3]
