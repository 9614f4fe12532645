"""Pictures of every mode, size and shape reach the network with the right values, or are named."""

import numpy as np
import pytest
import torch
from PIL import Image

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision
from utils.tasks.data import BadSample, image_folder
from utils.tasks.images import check_channels, classification_transform, cover, load_image

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(tmp_path, image, suffix=".png", **options):
    file = tmp_path / f"image{suffix}"
    image.save(file, **options)
    return file


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_is_scaled_not_cut_off(suffix, channels, tmp_path):
    file = saved(tmp_path, Image.fromarray(GREY.astype(np.uint16) * 257), suffix)
    pixels = np.asarray(load_image(file, channels)).reshape(16, 16, channels)
    assert (pixels[..., :3] == GREY[..., None]).all()
    assert channels < 4 or (pixels[..., 3] == 255).all()


@pytest.mark.parametrize(("kind", "full"), [(np.int32, 65535), (np.float32, 1.0)])
def test_deeper_tiffs_are_scaled_and_those_beyond_are_named(kind, full, tmp_path):
    file = saved(tmp_path, Image.fromarray((GREY / 255 * full).astype(kind)), ".tif")
    assert (np.asarray(load_image(file, 1)) == GREY).all()
    with pytest.raises(ValueError, match="its pixels reach from 0 to"):
        load_image(saved(tmp_path, Image.fromarray((GREY / 255 * full * 3).astype(kind)), ".tif"))


def test_16_bit_colour_is_scaled(tmp_path):
    file = tmp_path / "deep.ppm"
    deep = np.repeat(GREY[..., None].astype(">u2") * 257, 3, axis=2)
    file.write_bytes(b"P6 16 16 65535\n" + deep.tobytes())
    assert (np.asarray(load_image(file)) == GREY[..., None]).all()


HALF = (200, 100, 50, 128)  # over black: 128/255 of it
OVER_BLACK = (100, 50, 25)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_alpha_lies_over_black(suffix, tmp_path):
    options = {"lossless": True, "exact": True} if suffix == ".webp" else {}
    pixels = np.array([[HALF, (200, 100, 50, 0)], [(200, 100, 50, 255)] * 2], np.uint8)
    file = saved(tmp_path, Image.fromarray(pixels), suffix, **options)
    over_black = np.asarray(load_image(file))
    assert np.abs(over_black[0, 0].astype(int) - OVER_BLACK).max() <= 1
    assert over_black[0, 1].tolist() == [0, 0, 0] and over_black[1, 0].tolist() == [200, 100, 50]
    assert (np.asarray(load_image(file, 4)) == pixels).all()


def test_grey_with_alpha_and_palettes(tmp_path):
    pixels = np.array([[(200, 0), (200, 255)]], np.uint8)
    assert np.asarray(load_image(saved(tmp_path, Image.fromarray(pixels, "LA")), 1)).tolist() == [[0, 200]]

    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert np.asarray(load_image(saved(tmp_path, palette))).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    palette.info["transparency"] = 0
    file = saved(tmp_path, palette, transparency=0)
    assert np.asarray(load_image(file)).tolist() == [[[0, 0, 0], [40, 50, 60]]]


def test_one_bit_is_black_and_white(tmp_path):
    file = saved(tmp_path, Image.fromarray(np.array([[True, False]])))
    assert np.asarray(load_image(file)).tolist() == [[[255] * 3, [0] * 3]]
    assert np.asarray(load_image(file, 1)).tolist() == [[255, 0]]


def test_cmyk_is_converted(tmp_path):
    file = saved(tmp_path, Image.new("CMYK", (8, 8), (255, 0, 0, 0)), ".tif")
    assert np.asarray(load_image(file))[0, 0].tolist() == [0, 255, 255]


def test_the_orientation_in_exif_is_ignored_as_torchvision_does(tmp_path):
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    file = saved(tmp_path, image, ".jpg", exif=exif)
    theirs = torchvision.datasets.folder.default_loader(str(file))
    assert load_image(file).size == theirs.size == (40, 20)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_have_as_many_channels_as_the_network_takes(channels, tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (20, 30), (255, 0, 0)).save(tmp_path / "a" / "red.png")
    spec = InputSpec(size=(8, 8), resize=8, mean=(0.0,) * channels, std=(1.0,) * channels)
    image, _ = image_folder(str(tmp_path), "val", spec, 1)[0][0]
    expected = {1: [76 / 255], 3: [1, 0, 0], 4: [1, 0, 0, 1]}[channels]
    torch.testing.assert_close(image[:, 4, 4], torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("channels", [2, 5])
def test_a_network_of_other_channels_takes_no_pictures(channels):
    with pytest.raises(UserError, match=f"takes images of {channels} channels, but pictures have 1"):
        check_channels(InputSpec(mean=(0.5,) * channels, std=(0.5,) * channels))


@pytest.mark.parametrize("kind", ["bomb", "empty", "text", "cut off"])
def test_what_is_no_picture_is_named(kind, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    file = tmp_path / "a/image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(file)
    if kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    else:
        file.write_bytes({"empty": b"", "text": b"no picture", "cut off": file.read_bytes()[:1500]}[kind])
    sample = image_folder(str(tmp_path), "val", InputSpec(size=(8, 8), resize=8), 1)[0][0]
    assert isinstance(sample, BadSample) and sample.reason.startswith(str(file)) and sample.reason.isprintable()


# --------------------------------------------------------------------------------------- sizes, crops

SIZES = [(64, 64), (30, 50), (50, 30), (9, 200), (200, 9), (1, 1)]
INPUTS = {
    "square": ((32, 32), 32),
    "square, resized": ((32, 32), 40),
    "wide": ((24, 48), 24),
    "high": ((48, 24), 24),
    "wide, resized": ((24, 48), 40),
    "resize below the crop": ((32, 32), 16),
    "resize far below": ((48, 24), 1),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("size", SIZES)
def test_no_part_of_the_input_is_filled_up(size, kind):
    (height, width), resize = INPUTS[kind]
    spec = InputSpec(size=(height, width), resize=resize, mean=(0.0,) * 3, std=(1.0,) * 3)
    image = classification_transform(spec)(Image.new("RGB", size, (255, 255, 255)))
    assert image.shape == (3, height, width) and image.eq(1).all()


@pytest.mark.parametrize("size", [(64, 64), (75, 50), (50, 75), (33, 100)])
@pytest.mark.parametrize(("crop", "resize"), [(24, 24), (24, 28), (32, 37)])
def test_square_inputs_are_scaled_and_cropped_as_torchvision_does(size, crop, resize):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    spec = InputSpec(size=(crop, crop), resize=resize)
    transforms = torchvision.transforms
    theirs = transforms.Compose(
        [
            transforms.Resize(resize),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )
    assert torch.equal(classification_transform(spec)(image), theirs(image))


def test_a_wide_input_is_covered_and_its_centre_kept():
    columns = np.tile(np.arange(100, dtype=np.uint8), (50, 1))  # 100 wide, 50 high: to 24 x 48, all of it
    nearest = torchvision.transforms.InterpolationMode.NEAREST
    covered = np.asarray(cover(Image.fromarray(columns), (24, 48), nearest, 24))
    assert covered.shape == (24, 48) and abs(int(covered[0, 0]) - 1) <= 1 and abs(int(covered[0, -1]) - 98) <= 1
    high = np.asarray(cover(Image.fromarray(columns), (48, 24), nearest, 24))
    assert high.shape == (48, 24) and abs(int(high[0, 12]) - 50) <= 2, "the middle stays in the middle"
    assert int(high[0, -1]) - int(high[0, 0]) == pytest.approx(24 * 50 / 48, abs=2)


def test_a_picture_as_thin_as_a_thread_takes_no_memory():
    image = cover(
        Image.new("RGB", (1, 60000), (9, 9, 9)), (224, 224), torchvision.transforms.InterpolationMode.BILINEAR
    )
    assert image.size == (224, 224) and image.getpixel((100, 100)) == (9, 9, 9)
