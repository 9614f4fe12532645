"""Drawing for all tasks: a network's input as a picture, captions, sheets, boxes and class masks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset, Subset

from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision
from utils.tasks.data import BadSample

_CAPTION = 16  # height in pixels of a line of text
_GAP = 4  # between two pictures of a sheet


def denormalise(image: Tensor, spec: InputSpec) -> Image.Image:
    """The picture that a network's input [3, H, W] was made from."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    pixels = (image.cpu() * std + mean).clamp(0, 1) * 255
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)  # without alpha; grey as RGB
    return torchvision.transforms.functional.to_pil_image(pixels.round().byte())


def captioned(
    picture: Image.Image, lines: Sequence[str], colours: Sequence[str] | None = None, below: bool = False
) -> Image.Image:
    """A picture with lines of text above or below it, in their colours (default: black)."""
    height = _CAPTION * len(lines)
    sheet = Image.new("RGB", (picture.width, picture.height + height), "white")
    sheet.paste(picture, (0, 0 if below else height))
    draw = ImageDraw.Draw(sheet)
    for number, (line, colour) in enumerate(zip(lines, colours or ["black"] * len(lines), strict=True)):
        draw.text((2, 2 + number * _CAPTION + (picture.height if below else 0)), line, fill=colour)
    return sheet


def at_least_wide(picture: Image.Image, width: int) -> Image.Image:
    """The picture, enlarged to a width that captions fit below."""
    if picture.width >= width:
        return picture
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.BICUBIC)


def grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size in rows of `columns`."""
    functional = torchvision.transforms.functional
    tensors = [functional.pil_to_tensor(picture) for picture in pictures]
    sheet = torchvision.utils.make_grid(tensors, nrow=columns, padding=_GAP, pad_value=255)
    if len(tensors) > 1:  # make_grid leaves one picture as it is, and puts a margin around several
        sheet = sheet[:, _GAP:-_GAP, _GAP:-_GAP]
    return functional.to_pil_image(sheet)


def draw_boxes(picture: Image.Image, boxes: Tensor, labels: Tensor, captions: Sequence[str]) -> Image.Image:
    """A copy of the picture with captioned boxes [K, 4] (corners as fractions) in the colours of their labels [K]."""
    if not len(boxes):
        return picture.copy()
    functional = torchvision.transforms.functional
    pixels = boxes.cpu() * torch.tensor([picture.width, picture.height] * 2)
    pixels[:, 2:] = torch.maximum(pixels[:, :2], pixels[:, 2:])
    order = list(range(len(boxes)))[::-1]  # the best on top
    colours = [tuple(voc_palette()[int(labels[i])].tolist()) for i in order]
    drawn = torchvision.utils.draw_bounding_boxes(
        functional.pil_to_tensor(picture),
        pixels[order],
        [captions[i] for i in order],
        colours,
        width=2,
        label_colors="white",
        label_background_colors=colours,
        fill_labels=True,
    )
    return functional.to_pil_image(drawn)


def paint_classes(mask: Tensor) -> Image.Image:
    """Class indices [H, W] in the colours of VOC's palette."""
    return Image.fromarray(voc_palette()[mask.cpu().numpy()])


def voc_palette() -> np.ndarray:
    """[256, 3] uint8: VOC's colour of each class index.

    Bits 0, 3, 6 of the index are the highest bits of red, bits 1, 4, 7 of green, bits 2, 5 of blue.
    """
    index = np.arange(256)[:, None]
    channel = np.arange(3)
    return sum((index >> (3 * level + channel) & 1) << (7 - level) for level in range(3)).astype(np.uint8)


def scored_samples(samples: Dataset, count: int) -> Sequence[int]:
    """The samples that were scored, `count` of them: all, or those that can be read."""
    if len(samples) == count:
        return range(count)
    return [index for index in range(len(samples)) if not isinstance(samples[index], BadSample)]


def sample_name(samples: Dataset, index: int) -> str:
    """The name of a sample's file, without its ending."""
    if isinstance(samples, Subset):
        samples, index = samples.dataset, samples.indices[index]
    return Path(samples.paths[index]).stem
