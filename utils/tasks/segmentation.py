"""Images and their class masks from a VOC folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision
from utils.core.unpickling import reason
from utils.tasks.data import Guarded
from utils.tasks.images import check_channels, cover, load_image
from utils.tasks.metrics import VOID
from utils.tasks.voc import CLASSES, open_voc

_CHECKED = 1000  # masks that are looked through for what 255 means, at most
_VALUES = 2**16  # that a pixel of a mask can have
_MOST = 255  # classes: the labels of a mask's pixels are 8 bits, and VOID is one of them


@dataclass(frozen=True)
class MaskValues:
    """What the values of a mask's pixels mean.

    classes: of the network. mapping: the class (or VOID) of each value; None: values are classes. void: the value of
    pixels that do not count, None where all do; a value of the mapping means what the mapping says.
    """

    classes: int
    mapping: Mapping[int, int] | None = None
    void: int | None = VOID

    def labels(self, values: np.ndarray) -> np.ndarray:
        """Class indices and VOID, uint8, of whole numbers [H, W]; a value without a meaning is a ValueError."""
        pairs = dict(self.mapping) if self.mapping is not None else {index: index for index in range(self.classes)}
        if self.void is not None and (self.mapping is None or self.void not in pairs):
            pairs[self.void] = VOID
        table = np.full(_VALUES, -1)
        table[list(pairs)] = list(pairs.values())
        inside = (values >= 0) & (values < _VALUES)
        labels = np.where(inside, table[values * inside], -1)
        if labels.min(initial=0) < 0:
            raise ValueError(f"holds the label {values[labels < 0][0]}; {self._known()}")
        return labels.astype(np.uint8)

    def _known(self) -> str:
        if self.mapping is not None:
            return f"--mask_values names {', '.join(map(str, self.mapping))}"
        void = "no value is void" if self.void is None else f"{self.void} is void"
        return f"the network has {self.classes} classes, 0 to {self.classes - 1}, and {void}"


class SegmentationSet(Dataset):
    """Pairs of a normalised image [channels, H, W] and its mask [H, W] uint8 of class indices and VOID."""

    def __init__(self, images: list[Path], masks: list[Path], spec: InputSpec, values: MaskValues):
        self.images, self.masks, self.spec, self.values = images, masks, spec, values

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = load_image(self.images[index], self.spec.channels)
        mask = load_mask(self.masks[index], self.values)
        if mask.size != image.size:
            raise ValueError(f"mask {str(self.masks[index])!r} is {_wide_high(mask)}, the image {_wide_high(image)}")
        to_size, functional = self.spec.size, torchvision.transforms.functional
        image = cover(image, to_size, torchvision.transforms.InterpolationMode(self.spec.interpolation))
        mask = cover(mask, to_size, torchvision.transforms.InterpolationMode.NEAREST)
        image = functional.normalize(functional.to_tensor(image), self.spec.mean, self.spec.std)
        return image, torch.from_numpy(np.array(mask))


def voc_segmentation(
    root: str,
    split: str | None,
    spec: InputSpec,
    outputs: int,
    values: MaskValues | None = None,
    classes: str | None = None,
    skip_bad: bool = False,
) -> tuple[Guarded, tuple[str, ...]]:
    """Images and masks of a VOC folder, and the names of its classes, for a network with this many outputs.

    split: None: VOC2007's test, otherwise val. Classes are those of the file `classes`, of labels.txt, or VOC's 21.
    values: what the masks hold; None: class indices, and 255 for void, which masks of 0 and 255 alone contradict
    where the network has two classes. skip_bad: whether images and masks may be missing.
    """
    check_channels(spec)
    if not 2 <= outputs <= _MOST:
        raise UserError(
            f"the network has {outputs} class(es) a pixel; a segmentation network must have 2 to {_MOST}, one score each"
        )
    voc = open_voc(root, "Segmentation", split, classes, skip_bad)
    names = voc.labels or ("background", *CLASSES)
    if voc.labels and len(names) + 1 == outputs:  # the lists of detection leave it out
        names = ("background", *names)
    if len(names) != outputs:
        whose = (
            f"{classes!r} for"
            if classes
            else "labels.txt of"
            if voc.labels
            else "VOC's classes, since there is no labels.txt in"
        )
        raise UserError(
            f"the network has {outputs} classes, but there are {len(names)} ({whose} {str(voc.folder)!r}); "
            "pass data of the network's own classes, or --classes FILE with their names in order"
        )
    masks = voc.annotations("SegmentationClass", ".png", skip_bad)
    if values is None and outputs == 2:
        _check_binary(masks, str(voc.folder))
    samples = SegmentationSet(voc.images, masks, spec, values or MaskValues(outputs))
    return Guarded(samples, [str(path) for path in voc.images], voc.notes), names


def _check_binary(masks: list[Path], folder: str) -> None:
    """Refuse masks of 0 and 255 alone: their second class would be taken for void, and all else be right."""
    white = False
    for file in masks[:: -(-len(masks) // _CHECKED)]:
        try:
            values = set(np.unique(read_mask(file)).tolist())
        except ValueError:
            continue  # told, or skipped, when its turn comes
        if values - {0, VOID}:
            return
        white |= VOID in values
    if white:
        raise UserError(
            f"the masks of {folder!r} hold 0 and {VOID} alone, and the network has 2 classes; pass --mask_values "
            f"0=0,{VOID}=1 if {VOID} is the second class, or --void {VOID} if such pixels do not count"
        )


def load_mask(path: Path, values: MaskValues) -> Image.Image:
    """The class indices and VOID of a mask, as an 8-bit greyscale image; what is no such mask is a ValueError."""
    try:
        return Image.fromarray(values.labels(read_mask(path)))
    except ValueError as error:
        raise ValueError(f"mask {str(path)!r} {error}") from None


def read_mask(path: Path) -> np.ndarray:
    """The values [H, W] of a palette, greyscale or 1-bit picture; anything else is a ValueError."""
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except Exception as error:  # PIL raises some ten kinds on damaged bytes
        raise ValueError(f"cannot be read: {reason(error)}") from None
    if values.ndim != 2 or values.dtype.kind == "f":
        raise ValueError(
            f"is a colour picture ({mode}); a mask holds one class index for each pixel, in a palette or greyscale PNG"
        )
    return values.astype(np.int64)


def _wide_high(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
