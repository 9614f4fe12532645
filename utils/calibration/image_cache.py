"""Distilled images kept in a folder, by the network, its input and how they are made."""

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, fx, nn

from utils.calibration.distillation import Distillation, distill, from_bytes, to_bytes
from utils.core import distributed
from utils.core.errors import UserError
from utils.core.hashing import weights_hash
from utils.core.input_spec import InputSpec

EDITION = 2  # of how images are made: those that another made are not read


def distilled(
    model: nn.Module,
    spec: InputSpec,
    settings: Distillation,
    device: torch.device,
    folder: Path,
    captured: fx.GraphModule | None = None,
) -> Tensor:
    """distill(), kept in a folder by the network's weights, its input and the settings.

    captured: capture(model, spec), where it is at hand. A damaged file is made anew, and that is said; a folder that
    cannot be written to is a UserError.
    """
    key = hashlib.sha256(f"{weights_hash(model)} {spec} {settings} {EDITION}".encode()).hexdigest()[:16]
    file = folder / f"{key}.pt"
    network = model if captured is None else captured
    images = distributed.all_gather(_read(file, spec, settings.images) if distributed.is_main_process() else None)[0]
    if images is None and distributed.is_main_process():
        with _kept(file) as handle:
            images = distill(network, spec, settings, device)
            torch.save(to_bytes(images, spec), handle)
    return distill(network, spec, settings, device) if images is None else images


@contextmanager
def _kept(file: Path) -> Iterator[BinaryIO]:
    """A file to write to, which is there once the block is done, and refused before it starts."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{os.getpid()}")  # several runs may distil the same images at once
        with fresh.open("wb") as handle:
            yield handle
        fresh.replace(file)
    except OSError as error:
        raise UserError(
            f"cannot keep distilled images in {str(file.parent)!r} ({error.strerror}); pass --distill_cache with another folder"
        ) from None


def _read(file: Path, spec: InputSpec, count: int) -> Tensor | None:
    if not file.exists():
        return None
    try:
        pixels = torch.load(file, weights_only=True)
        if pixels.dtype == torch.uint8 and pixels.shape == spec.shape(count):
            return from_bytes(pixels, spec)
    except Exception:  # whatever unpickling raises on damaged bytes
        pass
    print(f"{str(file)!r} is damaged; distilling anew", file=sys.stderr)
    return None
