"""Data sets in the formats that people have them in, and the batches that evaluation takes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Subset, default_collate

from utils.core import distributed
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision
from utils.core.unpickling import reason
from utils.tasks.images import check_channels, classification_transform, load_image
from utils.tasks.labels import class_indices, find_list, is_hidden, open_split


@dataclass(frozen=True)
class Batch:
    """images: [N, channels, H, W]; targets: what the task's metric takes; bad: images that could not be read."""

    images: Tensor
    targets: Any
    bad: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadSample:
    """Stands for a sample that could not be read, since an exception does not cross processes whole."""

    reason: str


class Guarded(Dataset):
    """A data set whose unreadable samples come as BadSample instead of an exception.

    paths: the file of each sample, to name it. notes: what the user should know of how it was read, in lines.
    """

    def __init__(self, samples: Dataset, paths: list[str], notes: Sequence[str] = ()):
        self.samples, self.paths, self.notes = samples, paths, tuple(notes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.samples[index]
        except (OSError, ValueError, MemoryError) as error:  # load_image gives a ValueError for any broken file
            return BadSample(f"{self.paths[index]} ({reason(error)})")


class _ClassFolders(torchvision.datasets.ImageFolder):
    """torchvision's, of class folders that are already known, without hidden files and folders in them."""

    def __init__(self, folder: Path, names: Sequence[str], spec: InputSpec):
        self.names, self.left_out = list(names), 0
        super().__init__(
            str(folder),
            transform=classification_transform(spec),
            loader=partial(load_image, channels=spec.channels),
            is_valid_file=self._is_image,
            allow_empty=True,
        )

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return self.names, {name: index for index, name in enumerate(self.names)}

    def _is_image(self, file: str) -> bool:
        hidden = any(is_hidden(part) for part in Path(file).relative_to(self.root).parts[1:])
        wanted = not hidden and file.lower().endswith(torchvision.datasets.folder.IMG_EXTENSIONS)
        self.left_out += not wanted
        return wanted


def image_folder(
    root: str, split: str, spec: InputSpec, outputs: int, classes: str | None = None
) -> tuple[Guarded, dict[int, str]]:
    """Images in one folder per class, labelled for a network with this many outputs; and each output's folder.

    root: the folder that holds the class folders, or one with a sub-folder named by split. classes: a file that names
    the network's classes in order; class_indices() says what holds without one. The notes of the data set say it too.
    """
    check_channels(spec)
    folder, names, beside = open_split(root, split)
    samples = _ClassFolders(folder, names, spec)
    if not samples.samples:
        raise UserError(
            f"the class folders of {str(folder)!r} hold no images ({', '.join(torchvision.datasets.folder.IMG_EXTENSIONS)})"
        )
    listed = find_list(Path(root), folder, classes)
    try:
        labels, kind = class_indices(names, outputs, str(folder), listed)
    except UserError as error:
        raise UserError(f"{error}{_left_out(beside)}") from None
    samples.target_transform = labels.__getitem__
    notes = [f"labels: {kind}{_left_out(beside)}"]
    if samples.left_out:
        notes.append(f"{samples.left_out} file(s) of the class folders are no images or hidden, and skipped")
    return Guarded(samples, [path for path, _ in samples.samples], notes), dict(zip(labels, names, strict=True))


def _left_out(beside: Sequence[str]) -> str:
    return f" (skipped, as no class: {', '.join(beside)})" if beside else ""


def tell(samples: Guarded) -> Guarded:
    """Print the notes of a data set."""
    for note in samples.notes:
        print(note)
    return samples


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
