"""Images and their class masks from a VOC folder."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision
from utils.tasks.data import Guarded, load_rgb
from utils.tasks.metrics import VOID
from utils.tasks.voc import CLASSES, open_voc


class SegmentationSet(Dataset):
    """Pairs of a normalised image [3, H, W] and its mask [H, W] uint8 of class indices and VOID."""

    def __init__(self, images: list[Path], masks: list[Path], spec: InputSpec, classes: int):
        self.images, self.masks, self.spec, self.classes = images, masks, spec, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = load_rgb(str(self.images[index]))
        mask = load_mask(self.masks[index], self.classes)
        if mask.size != image.size:
            raise ValueError(f"mask {str(self.masks[index])!r} is {_wide_high(mask)}, the image {_wide_high(image)}")
        to_size, functional = self.spec.size, torchvision.transforms.functional
        image = cover(image, to_size, torchvision.transforms.InterpolationMode(self.spec.interpolation))
        mask = cover(mask, to_size, torchvision.transforms.InterpolationMode.NEAREST)
        image = functional.normalize(functional.to_tensor(image), self.spec.mean, self.spec.std)
        return image, torch.from_numpy(np.array(mask))


def voc_segmentation(root: str, split: str | None, spec: InputSpec, outputs: int) -> tuple[Guarded, tuple[str, ...]]:
    """Images and masks of a VOC folder, and the names of its classes, for a network with this many outputs.

    split: None: VOC2007's test, otherwise val. Classes are those of labels.txt, or VOC's 21.
    """
    voc = open_voc(root, "Segmentation", split)
    names = voc.labels or ("background", *CLASSES)
    if voc.labels and len(names) + 1 == outputs:  # the lists of detection leave it out
        names = ("background", *names)
    if len(names) != outputs:
        whose = "labels.txt of" if voc.labels else "VOC's classes, since there is no labels.txt in"
        raise UserError(
            f"the network has {outputs} classes, but there are {len(names)} ({whose} {str(voc.folder)!r}); pass data of the network's own classes"
        )
    masks = voc.annotations("SegmentationClass", ".png")
    return Guarded(SegmentationSet(voc.images, masks, spec, outputs), [str(path) for path in voc.images]), names


def load_mask(path: Path, classes: int) -> Image.Image:
    """The class indices of a palette or greyscale PNG, as an 8-bit greyscale image.

    A file that is no such mask, or has an index that is neither a class nor VOID, is a ValueError.
    """
    try:
        with Image.open(path) as image:
            mode, indices = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"mask {str(path)!r}: {error}") from None
    if indices.ndim != 2:
        raise ValueError(
            f"mask {str(path)!r} is a colour picture ({mode}); a mask holds one class index for each pixel, in a palette or greyscale PNG"
        )
    wrong = indices[(indices >= classes) & (indices != VOID)]
    if wrong.size:
        raise ValueError(
            f"mask {str(path)!r} holds the label {wrong[0]}; the network has {classes} classes, 0 to {classes - 1}, and {VOID} is void"
        )
    return Image.fromarray(indices.astype(np.uint8))


def cover(
    image: Image.Image, size: tuple[int, int], interpolation: "torchvision.transforms.InterpolationMode"
) -> Image.Image:
    """Scale the image until it just covers size (height, width), then crop its centre.

    To a square this scales the short side to it. An image of that size stays as it is.
    """
    height, width = size
    if image.height * width <= image.width * height:
        scaled = [height, image.width * height // image.height]
    else:
        scaled = [image.height * width // image.width, width]
    functional = torchvision.transforms.functional
    return functional.center_crop(functional.resize(image, scaled, interpolation), list(size))


def _wide_high(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
