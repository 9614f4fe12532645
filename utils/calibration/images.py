"""The user's own unlabelled images, in the place of distilled ones."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from utils.core.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FLAG = "--images"


@dataclass(frozen=True)
class UserImages:
    """calibration, judging: [N, C, H, W], ready for the network: ranges and corrections see the first half, and
    whatever is judged by images the second. files: how many pictures they are. skipped: why others are not."""

    calibration: Tensor
    judging: Tensor
    files: int
    skipped: tuple[str, ...] = ()


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder and all its sub-folders, by name; hidden ones aside. No picture is a UserError."""
    if not folder.is_dir():
        raise UserError(f"{FLAG}: there is no folder {str(folder)!r}; pass a folder of pictures, labelled or not")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not files:
        raise UserError(
            f"{FLAG}: {str(folder)!r} holds no pictures ({', '.join(EXTENSIONS)}); pass a folder of at least 2"
        )
    return files


def load_images(
    folder: Path,
    transform: Callable[[Image.Image], Tensor],
    count: int | None = None,
    skip_bad_images: bool = False,
    mode: str = "RGB",
) -> UserImages:
    """Any folder of pictures, brought to the network's input as the evaluation brings its own.

    transform: the evaluation's, from a PIL image to [C, H, W]. count: take so many, evenly spread over the folder; None:
    all. mode: PIL's, "L" for networks of one channel. Fewer than 2 pictures is a UserError; so is one that cannot
    be read, unless skip_bad_images, which leaves it out and says so.
    """
    files = picture_files(folder)
    wanted = files if count is None else [files[i * len(files) // count] for i in range(min(count, len(files)))]
    images, skipped = [], []
    for file in wanted:
        try:
            with Image.open(file) as picture:
                images.append(transform(picture.convert(mode)))
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises on broken files
            reason = f"{file} ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            if not skip_bad_images:
                raise UserError(f"{FLAG}: cannot read picture {reason}; mend it, or pass --skip_bad_images") from None
            print(f"skipped {reason}", file=sys.stderr)
            skipped.append(reason)
    if len(images) < 2:
        unread = f" ({len(skipped)} cannot be read)" if skipped else ""
        raise UserError(
            f"{FLAG}: {str(folder)!r} gives {len(images)} picture{unread}; pass at least 2, since one half is judged on the "
            "other; 8 and more are better"
        )
    return UserImages(*halves(torch.stack(images)), len(images), tuple(skipped))


def halves(images: Tensor) -> tuple[Tensor, Tensor]:
    """Every other image, for calibration and for judging: folders are sorted, so that both halves are of all kinds."""
    return images[::2], images[1::2]
