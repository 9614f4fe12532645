"""Class masks as people have them, as class indices."""

import re
import warnings
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.core.errors import UserError
from utils.core.unpickling import reason
from utils.tasks.metrics import VOID

_CHECKED = 1000  # masks that are looked through for what 255 means, at most
_VALUES = 2**16  # that a pixel of a mask can have
MOST_CLASSES = 255  # classes: the labels of a mask's pixels are 8 bits, and VOID is one of them


@dataclass(frozen=True)
class MaskValues:
    """What the values of a mask's pixels mean.

    classes: of the network. mapping: the class (or VOID) of each value; None: values are classes. void: the value of
    pixels that do not count, None where all do; a value of the mapping means what the mapping says.
    """

    classes: int
    mapping: Mapping[int, int] | None = None
    void: int | None = VOID

    def __post_init__(self) -> None:
        beyond = [index for index in (self.mapping or {}).values() if index >= self.classes and index != VOID]
        if beyond:
            raise UserError(
                f"--mask_values names class {beyond[0]}, but the network has {self.classes}, 0 to {self.classes - 1}"
            )

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


def parse_void(text: str) -> int | None:
    """What --void says: a value, or None for none."""
    if text != "none" and not (re.fullmatch("[0-9]+", text) and int(text) < _VALUES):
        raise ArgumentTypeError(f"{text!r} is neither a value of a mask, 0 to {_VALUES - 1}, nor none")
    return None if text == "none" else int(text)


def parse_mask_values(text: str) -> dict[int, int]:
    """What --mask_values says, as "0=0,255=1" or "7=void": the class, or VOID, of each value."""
    pairs = [re.fullmatch(r"\s*([0-9]{1,5})\s*=\s*([0-9]{1,3}|void)\s*", pair) for pair in text.split(",")]
    values = {int(pair[1]): VOID if pair[2] == "void" else int(pair[2]) for pair in pairs if pair}
    if len(values) != len(pairs) or max(values) >= _VALUES or max(values.values()) > VOID:
        raise ArgumentTypeError(f"{text!r} is no list of different values and their classes, such as 0=0,255=1,7=void")
    return values


def check_binary(masks: list[Path], folder: str) -> None:
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
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except Exception as error:  # PIL raises some ten kinds on damaged bytes
        raise ValueError(f"cannot be read: {reason(error)}") from None
    if values.ndim != 2 or values.dtype.kind == "f":
        raise ValueError(
            f"is a colour picture ({mode}); a mask holds one class index for each pixel, in a palette or greyscale PNG"
        )
    return values.astype(np.int64)
