"""Rendered scenes to train on, kept in the cache as arrays."""

import hashlib
import io
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from demo.render import TRAINING_SEED, cache_folder, jpeg, scene
from utils.core.input_spec import InputSpec

MOST_OBJECTS = 5  # in a scene


@dataclass(frozen=True)
class Examples:
    """Rendered scenes. images: [N, H, W, 3] uint8; masks: [N, H, W] uint8, as Scene.mask();
    classes: [N, MOST_OBJECTS] int8, -1 where there is no object; boxes: [N, MOST_OBJECTS, 4] x1, y1,
    x2, y2 in pixels, the last ones excluded."""

    images: ndarray
    masks: ndarray
    classes: ndarray
    boxes: ndarray


def normalise(images: ndarray) -> Tensor:
    """[N, H, W, 3] uint8 -> [N, 3, H, W] float32 with ImageNet's mean and deviation."""
    spec = InputSpec()
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    return (torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255 - mean) / std


def training_set(kind: str, short_side: int, count: int) -> Examples:
    """Scenes of demo.render, drawn by all cores once and kept in the cache as arrays."""
    first = hashlib.sha256(scene(kind, TRAINING_SEED, 0).image.tobytes()).hexdigest()[:8]  # tells renderers apart
    folder = cache_folder() / "demo" / "training" / f"{kind}-{short_side}-{count}-{first}"
    names = Examples.__dataclass_fields__
    if not (folder / "done").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor() as pool:
            drawn = pool.map(partial(_example, kind, short_side), range(count), chunksize=32)
            columns = zip(
                *tqdm(drawn, desc="rendering scenes to train on (once)", total=count, unit="image"), strict=True
            )
            for name, column in zip(names, columns, strict=True):
                np.save(folder / f"{name}.npy", np.stack(column))
        (folder / "done").touch()
    return Examples(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names))


def _example(kind: str, short_side: int, index: int) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """One row of Examples, its image as JPEG and resizing leave it."""
    one = scene(kind, TRAINING_SEED, index)
    image = Image.open(io.BytesIO(jpeg(one.image)))
    if min(image.size) != short_side:
        image = image.resize(
            [round(side * short_side / min(image.size)) for side in image.size], Image.Resampling.BILINEAR
        )
    classes, boxes = np.full(MOST_OBJECTS, -1, np.int8), np.zeros((MOST_OBJECTS, 4), np.float32)
    for row, (number, (x1, y1, x2, y2)) in enumerate(one.boxes().items()):
        classes[row], boxes[row] = one.classes[number - 1], (x1, y1, x2 + 1, y2 + 1)
    return np.asarray(image), one.mask(), classes, boxes
