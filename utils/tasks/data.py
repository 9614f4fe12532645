"""Data sets in the formats that people have them in, and the batches that evaluation takes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Subset, default_collate

from utils.core import distributed
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision


@dataclass(frozen=True)
class Batch:
    """images: [N, 3, H, W]; targets: what the task's metric takes; bad: images that could not be read."""

    images: Tensor
    targets: Any
    bad: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadSample:
    """Stands for a sample that could not be read, since an exception does not cross processes whole."""

    reason: str


class Guarded(Dataset):
    """A data set whose unreadable samples come as BadSample instead of an exception.

    paths: the file of each sample, to name it.
    """

    def __init__(self, samples: Dataset, paths: list[str]):
        self.samples, self.paths = samples, paths

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.samples[index]
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises on broken files
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return BadSample(f"{self.paths[index]} ({reason})")


def image_folder(root: str, split: str, spec: InputSpec, outputs: int) -> tuple[Guarded, dict[int, str]]:
    """Images in one folder per class, labelled for a network with this many outputs; and each output's folder.

    root: the folder that holds the class folders, or one with a sub-folder named by split.
    Folders named by ImageNet's WordNet ids get ImageNet's class indices, however many of the 1,000
    are there; a network with as many outputs as there are folders takes their sorted order.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(
            f"no data folder at {root!r}; pass --data with a folder that holds one folder of images per class"
        )
    folder = folder / split if (folder / split).is_dir() else folder
    try:
        samples = torchvision.datasets.ImageFolder(
            folder, transform=classification_transform(spec), loader=load_rgb, allow_empty=True
        )
    except FileNotFoundError:
        raise UserError(
            f"{str(folder)!r} has no class folders; pass --data with a folder that holds one folder of images per class"
        ) from None
    if not samples.samples:
        raise UserError(
            f"the class folders of {str(folder)!r} hold no images ({', '.join(torchvision.datasets.folder.IMG_EXTENSIONS)})"
        )

    label = torch.tensor(class_indices(samples.classes, outputs, str(folder)))
    samples.target_transform = lambda index: int(label[index])
    names = dict(zip(label.tolist(), samples.classes, strict=True))
    return Guarded(samples, [path for path, _ in samples.samples]), names


def class_indices(folders: list[str], outputs: int, root: str) -> list[int]:
    """The network's output for each class folder (sorted by name)."""
    if len(folders) == outputs:
        return list(range(outputs))
    known = {name: index for index, name in enumerate(imagenet_ids())}
    strange = [name for name in folders if name not in known]
    if outputs == len(known) and not strange:
        return [known[name] for name in folders]
    why = f"and {strange[0]!r} is no ImageNet WordNet id" if outputs == len(known) else "which is not ImageNet's 1,000"
    raise UserError(
        f"the network has {outputs} outputs, but {root!r} has {len(folders)} class folders ({why}); pass data of the network's own classes"
    )


def imagenet_ids() -> list[str]:
    """The WordNet ids of ImageNet's 1,000 classes, in class order."""
    from timm.data import ImageNetInfo  # slow to import

    return ImageNetInfo("imagenet-1k").label_names()


def classification_transform(spec: InputSpec) -> Callable[[Image.Image], Tensor]:
    """Short side to spec.resize, centre crop, normalise."""
    transforms = torchvision.transforms
    return transforms.Compose(
        [
            transforms.Resize(spec.resize, transforms.InterpolationMode(spec.interpolation)),
            transforms.CenterCrop(spec.size),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )


def load_rgb(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def evenly(samples: Dataset, limit: int | None) -> Dataset:
    """At most `limit` samples, evenly spread over the data set."""
    if limit is None or limit >= len(samples):
        return samples
    return Subset(samples, [i * len(samples) // limit for i in range(limit)])


class Batches:
    """The batches of a data set in order, this process's share of them; decoded once where they fit into memory.

    collate: list of the data set's samples -> (images, targets). room: bytes of images to keep for
    further readings.
    """

    def __init__(
        self,
        samples: Dataset,
        batch_size: int,
        workers: int,
        seed: int,
        collate: Callable = default_collate,
        room: int = 0,
    ):
        whole = list(BatchSampler(range(len(samples)), batch_size, drop_last=False))
        self.samples, self.indices = samples, distributed.shard(whole)
        self.workers, self.seed, self.collate, self.room = workers, seed, collate, room
        self._kept: list[Batch] = []  # the first ones

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        yield from self._kept
        for batch in self._load(self.indices[len(self._kept) :]):
            self.room -= batch.images.nbytes
            if self.room >= 0:
                self._kept.append(batch)
            yield batch

    def _load(self, indices: list[list[int]]) -> Iterable[Batch]:
        if not indices:
            return []
        generator = torch.Generator().manual_seed(self.seed)  # of the worker processes
        return DataLoader(
            self.samples,
            batch_sampler=indices,
            num_workers=min(self.workers, len(indices)),
            collate_fn=partial(_gather, self.collate),
            generator=generator,
        )


def _gather(collate: Callable, loaded: list) -> Batch:
    good = [sample for sample in loaded if not isinstance(sample, BadSample)]
    images, targets = collate(good) if good else (torch.empty(0), [])
    return Batch(images, targets, tuple(sample.reason for sample in loaded if isinstance(sample, BadSample)))
