"""Writing files atomically: a file is there complete, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.core.errors import UserError


def check_target(file: Path, flag: str) -> None:
    """Refuse, before the work, a file that could not be written after it. flag: what asked for it."""
    folder = file.parent
    if file.is_dir():
        raise UserError(f"{flag} {file} is a folder; pass the name of a file in it")
    if not folder.is_dir():
        raise UserError(f"{flag} {file}: there is no folder {str(folder)!r}; make it first, or pass another file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {file}: the folder {str(folder)!r} cannot be written to; pass a file in another")


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """A path beside the file to write to: it takes the file's place if the block succeeds, and goes if not."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield beside
        os.replace(beside, file)
    except OSError as error:
        raise UserError(f"cannot write {str(file)!r}: {error.strerror or error}") from None
    finally:
        beside.unlink(missing_ok=True)


def make_folder(folder: Path, flag: str = "--report") -> Path:
    """Make a folder, before the work whose files go into it. flag: what asked for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {str(folder)!r} ({error.strerror}); pass {flag} with another"
        ) from None
    return folder
