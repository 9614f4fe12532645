"""Data sets in the folder format of the PASCAL VOC challenges, which many others use too."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from utils.core.errors import UserError
from utils.tasks.labels import given_list, is_hidden, read_names

# The challenge's classes, in the order of its annotations; index 0 of a mask is the background.
CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow")
CLASSES += ("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")

_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
_PICTURES = "JPEGImages"


@dataclass(frozen=True)
class VocSplit:
    """The images of one split of a VOC folder.

    folder: holds JPEGImages, ImageSets and the annotations. year: 2007 or 2012 where the folder is
    named VOC2007 or VOC2012. names: of the images, with sub-folders and without suffix. images: the file of each
    name. labels: what labels.txt or --classes says, None where there is neither. notes: what the user should know.
    """

    folder: Path
    year: int | None
    split: str
    names: list[str]
    images: list[Path]
    labels: tuple[str, ...] | None
    notes: tuple[str, ...] = ()

    def annotations(self, kind: str, suffix: str, skip_bad: bool = False) -> list[Path]:
        """The annotation of each image: ("SegmentationClass", ".png") or ("Annotations", ".xml").

        It may lie without the image's sub-folder. skip_bad: whether some may be missing.
        """
        whole = [self.folder / kind / (name + suffix) for name in self.names]
        flat = [self.folder / kind / (Path(name).name + suffix) for name in self.names]
        files = [own if own.is_file() else other for own, other in zip(whole, flat, strict=True)]
        absent = [own for own, file in zip(whole, files, strict=True) if not file.is_file()]
        if absent and not skip_bad:
            raise UserError(
                f"{len(absent)} of {len(files)} images of split {self.split!r} have no annotation; the first that is "
                f"missing is {str(absent[0])!r}; mend it, or pass --skip_bad_images"
            )
        return files


def open_voc(
    root: str, task: str, split: str | None = None, classes: str | None = None, skip_bad: bool = False
) -> VocSplit:
    """The images that ImageSets/<task>/<split>.txt names.

    root: a VOC folder, or one that holds VOC folders (VOCdevkit): then the latest year that has the
    split. task: "Segmentation" or "Main". split: None: VOC2007's test, otherwise val. classes: a file with the
    class names, in place of labels.txt. skip_bad: whether images may be missing.
    """
    folder = _find_folder(Path(root), task, split)
    lists = folder / "ImageSets" / task
    there = _splits(lists)
    year = _year(folder)
    split = split or _default_split(there, year)
    if split not in there:
        raise UserError(f"no split {split!r} in {str(lists)!r}; --split can be {', '.join(there)}")
    lines = _lines(lists / f"{split}.txt")
    if not lines:
        raise UserError(f"split {split!r} is empty: {lists / split}.txt names no image")

    pictures = folder / _PICTURES
    if not pictures.is_dir():
        raise UserError(f"{str(folder)!r} has no folder {_PICTURES}, so it is no VOC folder")
    by_name = _index(pictures)
    found = [_find(line, by_name, pictures) for line in lines]
    absent = [line for line, file in zip(lines, found, strict=True) if file is None]
    if absent and not skip_bad:
        raise UserError(
            f"split {split!r} of {str(folder)!r} names {len(absent)} image(s) that {_PICTURES} does not hold, "
            f"first {absent[0]!r}; mend it, or pass --skip_bad_images"
        )
    files = list(dict.fromkeys(file or pictures / line.lstrip("/") for line, file in zip(lines, found, strict=True)))
    again = len(lines) - len(files)
    notes = (f"{again} line(s) of {split}.txt name an image again; every image counts once",) if again else ()
    labels = _distinct(given_list(classes)) if classes else _labels(folder)
    return VocSplit(folder, year, split, [_name(file, pictures) for file in files], files, labels, notes)


def _index(pictures: Path) -> dict[str, list[Path]]:
    """The picture files in a folder and its sub-folders by name, with sub-folders and without suffix."""
    by_name: dict[str, list[Path]] = {}
    for file in sorted(pictures.rglob("*")):
        inside = file.relative_to(pictures)
        if file.suffix.lower() in _IMAGES and not any(is_hidden(part) for part in inside.parts):
            by_name.setdefault(_name(file, pictures), []).append(file)
    return by_name


def _name(file: Path, pictures: Path) -> str:
    inside = file.relative_to(pictures)
    return (inside.with_suffix("") if inside.suffix.lower() in _IMAGES else inside).as_posix()


def _find(line: str, by_name: Mapping[str, list[Path]], pictures: Path) -> Path | None:
    """The picture that a line of a list names: with or without suffix, sub-folder, and further columns."""
    for entry in dict.fromkeys((line, line.split()[0])):
        name = entry.replace("\\", "/").rpartition(f"{_PICTURES}/")[2].removeprefix("./")
        suffix = Path(name).suffix
        files = by_name.get(name) or [
            file
            for file in by_name.get(name.removesuffix(suffix), ())
            if suffix.lower() in _IMAGES and (file.suffix == suffix or len(by_name[name.removesuffix(suffix)]) == 1)
        ]
        if len(files) > 1:
            which = " and ".join(file.name for file in files)
            raise UserError(f"{name!r} is there as {which} in {str(pictures)!r}; name it with its suffix in the list")
        if files:
            return files[0]
    return None


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
    """Names of the splits; VOC's lists of single classes (cat_val) are skipped unless nothing else is there."""
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
            return _distinct(file)
    return None


def _distinct(file: Path) -> tuple[str, ...]:
    names = read_names(file, r"[,\n]")
    again = next((name for name in names if names.count(name) > 1), None)
    if again:
        raise UserError(
            f"{str(file)!r} names {again!r} {names.count(again)} times; every class must have a name of its own"
        )
    return tuple(names)


def _lines(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    return [line.strip() for line in lines if line.strip()]
