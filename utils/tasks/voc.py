"""Data sets in the folder format of the PASCAL VOC challenges, which many others use too."""

import re
from dataclasses import dataclass
from pathlib import Path

from utils.core.errors import UserError

# The challenge's classes, in the order of its annotations; index 0 of a mask is the background.
CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow")
CLASSES += ("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")

_IMAGES = (".jpg", ".jpeg", ".png", ".bmp")


@dataclass(frozen=True)
class VocSplit:
    """The images of one split of a VOC folder.

    folder: holds JPEGImages, ImageSets and the annotations. year: 2007 or 2012 where the folder is
    named VOC2007 or VOC2012. images: the file of each name. labels: what labels.txt says, None
    where there is none.
    """

    folder: Path
    year: int | None
    split: str
    names: list[str]
    images: list[Path]
    labels: tuple[str, ...] | None

    def annotations(self, kind: str, suffix: str) -> list[Path]:
        """The annotation of each image: ("SegmentationClass", ".png") or ("Annotations", ".xml")."""
        files = [self.folder / kind / (name + suffix) for name in self.names]
        absent = [file for file in files if not file.is_file()]
        if absent:
            raise UserError(
                f"{len(absent)} of {len(files)} images of split {self.split!r} have no annotation; the first that is missing is {str(absent[0])!r}"
            )
        return files


def open_voc(root: str, task: str, split: str | None = None) -> VocSplit:
    """The images that ImageSets/<task>/<split>.txt names.

    root: a VOC folder, or one that holds VOC folders (VOCdevkit): then the latest year that has the
    split. task: "Segmentation" or "Main". split: None: VOC2007's test, otherwise val.
    """
    folder = _find_folder(Path(root), task, split)
    lists = folder / "ImageSets" / task
    there = _splits(lists)
    year = _year(folder)
    split = split or _default_split(there, year)
    if split not in there:
        raise UserError(f"no split {split!r} in {str(lists)!r}; --split can be {', '.join(there)}")
    names = _words(lists / f"{split}.txt", r"\n")
    if not names:
        raise UserError(f"split {split!r} is empty: {lists / split}.txt names no image")

    pictures = folder / "JPEGImages"
    if not pictures.is_dir():
        raise UserError(f"{str(folder)!r} has no folder JPEGImages, so it is no VOC folder")
    files = sorted((file for file in pictures.iterdir() if file.suffix.lower() in _IMAGES), reverse=True)
    by_name = {file.stem: file for file in files}
    absent = [name for name in names if name not in by_name]
    if absent:
        raise UserError(
            f"split {split!r} of {str(folder)!r} names {len(absent)} image(s) that JPEGImages does not hold, first {absent[0]!r}"
        )
    return VocSplit(folder, year, split, names, [by_name[name] for name in names], _labels(folder))


def _find_folder(root: Path, task: str, split: str | None) -> Path:
    """The VOC folder at or under root that has the split, or at least the task."""
    if not root.is_dir():
        raise UserError(
            f"no data folder at {str(root)!r}; pass --data with a VOC folder (JPEGImages, ImageSets/{task}, ...)"
        )
    inside = [root, *sorted(root.iterdir(), reverse=True), *sorted(root.glob("VOCdevkit/*"), reverse=True)]
    folders = [folder for folder in inside if _splits(folder / "ImageSets" / task)]
    if not folders:
        tasks = sorted({lists.parent.name for folder in inside for lists in folder.glob("ImageSets/*/*.txt")})
        hint = f"; there is ImageSets/{' and '.join(tasks)}, for another task" if tasks else ""
        raise UserError(
            f"no VOC folder at {str(root)!r}: neither it nor a folder in it holds ImageSets/{task} with the lists of its splits{hint}"
        )
    having = [folder for folder in folders if split in _splits(folder / "ImageSets" / task)]
    return (having or folders)[0]


def _splits(lists: Path) -> list[str]:
    """Names of the splits; VOC's lists of single classes (cat_val) are left out unless nothing else is there."""
    names = sorted(file.stem for file in lists.glob("*.txt"))
    return [name for name in names if name.rpartition("_")[2] not in names or "_" not in name]


def _default_split(there: list[str], year: int | None) -> str:
    preferred = ("test", "val") if year == 2007 else ("val", "test")
    return next((name for name in preferred if name in there), preferred[0])


def _year(folder: Path) -> int | None:
    match = re.fullmatch(r"VOC(\d{4})", folder.resolve().name)
    return int(match[1]) if match else None


def _labels(folder: Path) -> tuple[str, ...] | None:
    """Class names from labels.txt in the folder or beside it: separated by commas or lines."""
    for file in (folder / "labels.txt", folder.resolve().parent / "labels.txt"):
        if file.is_file():
            labels = tuple(_words(file, r"[,\n]"))
            if not labels:
                raise UserError(f"{str(file)!r} names no class; it must hold the class names, separated by commas")
            return labels
    return None


def _words(file: Path, separator: str) -> list[str]:
    """What stands between the separators (a regular expression), without blanks and empty ones."""
    words = re.split(separator, file.read_text(encoding="utf-8-sig", errors="replace"))
    return [word.strip() for word in words if word.strip()]
