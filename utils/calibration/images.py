"""The user's own unlabelled images, in the place of distilled ones."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from utils.core.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FLAG = "--images"


@dataclass(frozen=True)
class Images:
    """What stands in for data.

    calibration, judging: [N, C, H, W], ready for the network: ranges and corrections see the first, and whatever is
    judged by images the second. real: the user's pictures; otherwise distilled from the network. skipped: why some of
    the pictures are not among them.
    """

    calibration: Tensor
    judging: Tensor
    real: bool = False
    skipped: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """A line on how many there are."""
        skipped = f"; {len(self.skipped)} cannot be read, and are skipped" if self.skipped else ""
        return (
            f"{len(self.calibration) + len(self.judging)} {'pictures' if self.real else 'distilled images'}: "
            f"{len(self.calibration)} for calibration, {len(self.judging)} for judging{skipped}"
        )


def whose(real: bool) -> str:
    """What reports call images."""
    return "your images" if real else "distilled images"


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder and all its sub-folders, by name; hidden ones aside. No picture is a UserError."""
    if not folder.is_dir():
        what = f"{str(folder)!r} is a file" if folder.is_file() else f"there is no folder {str(folder)!r}"
        raise UserError(f"{FLAG}: {what}; pass a folder of pictures, labelled or not")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not files:
        raise UserError(
            f"{FLAG}: {str(folder)!r} holds no pictures ({', '.join(EXTENSIONS)}); pass a folder of at least 2"
        )
    return files


def load_images(
    folder: Path,
    read: Callable[[Path], Tensor],
    count: int | None = None,
    skip_bad_images: bool = False,
) -> Images:
    """Any folder of pictures, brought to the network's input as the evaluation brings its own.

    read: a picture's file -> [C, H, W], as the evaluation reads it; an OSError or ValueError where it cannot. count:
    take so many, evenly spread over the folder; None: all. Fewer than 2 pictures is a UserError; so is one that cannot
    be read, unless skip_bad_images, which leaves it out and says so.
    """
    files = picture_files(folder)
    count = min(len(files), count or len(files))
    wanted = [files[i * len(files) // count] for i in range(count)]
    images, skipped = [], []
    for file in wanted:
        try:
            images.append(read(file))
        except (OSError, ValueError, MemoryError) as error:
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
    return Images(*halves(torch.stack(images)), real=True, skipped=tuple(skipped))


def halves(images: Tensor) -> tuple[Tensor, Tensor]:
    """Every other image, for calibration and for judging: folders are sorted, so that both halves are of all kinds."""
    return images[::2], images[1::2]


def held_out(images: Images) -> Images:
    """With an eighth of the images to calibrate on to judge by, in the place of those that may be of another kind.

    An even number where there are as many, as a distilled leaf and the same as it was rendered follow on each other.
    """
    count = max(1, min(2 * max(1, len(images.calibration) // 16), len(images.calibration) // 2))
    return replace(images, calibration=images.calibration[:-count], judging=images.calibration[-count:])
