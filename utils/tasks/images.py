"""Pictures as people have them, as the network takes them."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision
from utils.core.unpickling import reason

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of a picture, by the channels of the network's input
_LONGEST = 16  # sides of a picture, as a multiple of the other: what is beyond is cropped before scaling


def check_channels(spec: InputSpec) -> None:
    """Refuse a network that pictures cannot be made for."""
    if spec.channels not in MODES:
        raise UserError(
            f"the network takes images of {spec.channels} channels, but pictures have 1 (grey), 3 (red, green, blue) "
            "or 4 (with alpha); without --data, --export and --save write the network alone"
        )


def load_image(path: str | Path, channels: int = 3) -> Image.Image:
    """A picture file with that many channels: 8-bit grey, RGB or RGBA.

    16-bit and float pixels are scaled to 8 bits. What is transparent is laid over black where the network takes no
    alpha. A rotation in EXIF is ignored, as torchvision does. A file that is no picture is a ValueError of one line.
    """
    try:
        # PIL warns about damaged metadata, which is none of the pixels
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            image.load()
            return _to_mode(_to_eight_bits(image), MODES[channels])
    except Exception as error:  # PIL raises some ten kinds on damaged bytes
        raise ValueError(reason(error)) from None


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel; deeper pixels are scaled, where PIL would cut them off at 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    full = 1.0 if image.mode == "F" else 65535
    if not (low >= 0 and high <= full):
        raise ValueError(
            f"its pixels reach from {low:g} to {high:g}; pixels of mode {image.mode} must be in 0 to {full:g}"
        )
    return Image.fromarray(np.rint(pixels.astype(np.float64) * (255 / full)).astype(np.uint8))


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """The picture in 8-bit grey, RGB or RGBA; without alpha, what is transparent is laid over black."""
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if mode == "RGBA" or not transparent:
        return image.convert(mode)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB").convert(mode)


def cover(
    image: Image.Image,
    size: tuple[int, int],
    interpolation: "torchvision.transforms.InterpolationMode",
    short: int = 0,
) -> Image.Image:
    """Scale the image until it covers size (height, width), then crop its centre.

    short: the length that its short side gets, if that covers the size. An image of that size stays as it is.
    """
    functional = torchvision.transforms.functional
    height, width = size
    longest = _LONGEST * max(height / width, width / height) * min(image.size)
    if max(image.size) > longest + 1:
        within = [min(side, int(longest)) for side in (image.height, image.width)]
        image = functional.center_crop(image, within)
    scale = short / min(image.size)
    if image.height * scale >= height and image.width * scale >= width:
        long = int(short * max(image.size) / min(image.size))
        scaled = [long, short] if image.height > image.width else [short, long]
    elif image.height * width <= image.width * height:
        scaled = [height, image.width * height // image.height]
    else:
        scaled = [image.height * width // image.width, width]
    return functional.center_crop(functional.resize(image, scaled, interpolation), [height, width])


def classification_transform(spec: InputSpec) -> Callable[[Image.Image], Tensor]:
    """Short side to spec.resize, or so that the image covers spec.size; centre crop; normalise."""
    functional = torchvision.transforms.functional
    interpolation = torchvision.transforms.InterpolationMode(spec.interpolation)

    def transform(image: Image.Image) -> Tensor:
        pixels = functional.to_tensor(cover(image, spec.size, interpolation, spec.resize))
        return functional.normalize(pixels, spec.mean, spec.std)

    return transform
