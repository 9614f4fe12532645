"""Which folder of images is which output of the network."""

import re
from collections.abc import Sequence
from pathlib import Path

from utils.core.errors import UserError

SPLITS = ("train", "training", "trainval", "val", "valid", "validation", "test", "testing", "dev", "eval", "evaluation")
DEFAULT = "val"  # split of a folder that may hold none
LISTS = ("classes.txt", "labels.txt")  # beside the data, in this order
_NO_CLASSES = ("__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that systems and tools leave behind."""
    return name.startswith(".") or name in _NO_CLASSES


def open_split(root: str, split: str) -> tuple[Path, list[str], list[str]]:
    """The folder that holds the class folders, their names, and what was skipped beside them.

    root: that folder itself, or one with a sub-folder named by split. Names of splits are never classes.
    """
    folder = Path(root)
    remedy = "pass --data with a folder that holds one folder of images per class"
    if not folder.is_dir():
        raise UserError(f"no data folder at {root!r}; {remedy}")
    inside = _folders(folder)
    own = [name for name in inside if name.lower() == split.lower()]
    others = [name for name in inside if name.lower() in SPLITS and name not in own]
    if own:
        folder = folder / (split if split in own else own[0])
        inside, others = _folders(folder), []
    visible = [name for name in inside if not is_hidden(name) and name not in others]
    if not own and others and (split != DEFAULT or not visible):
        raise UserError(
            f"no split {split!r} in {str(folder)!r}; pass --split with one that is there: {', '.join(others)}"
        )
    if not own and split != DEFAULT:
        raise UserError(f"no split {split!r} in {str(folder)!r}; leave out --split to take the folder as it is")
    if not visible:
        raise UserError(f"{str(folder)!r} has no class folders; {remedy}")
    return folder, visible, [name for name in inside if name not in visible]


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def find_list(root: Path, folder: Path, given: str | None) -> Path | None:
    """The file that names the classes in the network's order: the given one, or one beside the data."""
    if given is not None:
        return given_list(given)
    places = [folder, root] + ([root.parent] if root.name.lower() in SPLITS else [])
    return next((place / name for place in places for name in LISTS if (place / name).is_file()), None)


def given_list(path: str) -> Path:
    """The file of --classes."""
    if not Path(path).is_file():
        raise UserError(f"no file at --classes {path!r}; it must name the network's classes, one a line, in order")
    return Path(path)


def read_names(file: Path, separator: str = r"\n") -> list[str]:
    """What stands between the separators (a regular expression), without blanks and empty ones."""
    words = re.split(separator, file.read_text(encoding="utf-8-sig", errors="replace"))
    names = [word.strip() for word in words if word.strip()]
    if not names:
        raise UserError(f"{str(file)!r} names no class; it must hold the class names, separated by commas or lines")
    return names


def class_indices(folders: Sequence[str], outputs: int, root: str, listed: Path | None = None) -> tuple[list[int], str]:
    """The network's output for each class folder (sorted by name), and by which rule.

    listed: a file that names the classes in the network's order, which settles it. Otherwise folders that are all
    numbers count as numbers; ImageNet's WordNet ids have ImageNet's order; and as many folders as outputs theirs.
    """
    if listed:
        return _by_list(folders, outputs, root, listed), f"in the order of {listed.name}"
    if all(re.fullmatch(r"[0-9]+", name) for name in folders):
        return _by_number(folders, outputs, root)
    known = {name: index for index, name in enumerate(imagenet_ids())} if outputs == 1000 else {}
    strange = [name for name in folders if name not in known]
    if known and not strange:
        return [known[name] for name in folders], "ImageNet's WordNet ids"
    if len(folders) == outputs:
        return list(range(outputs)), "folder names in alphabetical order"
    why = f"and {strange[0]!r} is no ImageNet WordNet id" if known else "which is not ImageNet's 1,000"
    raise UserError(
        f"the network has {outputs} outputs, but {root!r} has {len(folders)} class folders ({why}); "
        "pass data of the network's own classes, or --classes FILE with the network's classes in order"
    )


def _by_number(folders: Sequence[str], outputs: int, root: str) -> tuple[list[int], str]:
    """Folders named by numbers: outputs counted from 0, or from 1; as many as there are outputs: in their order."""
    numbers = [int(name) for name in folders]
    if len(set(numbers)) < len(numbers):
        raise UserError(f"two class folders of {root!r} have the same number; rename one")
    if max(numbers) < outputs:
        return numbers, "folder names are the network's outputs, counted from 0"
    if min(numbers) >= 1 and max(numbers) == outputs:
        return [number - 1 for number in numbers], "folder names are the network's outputs, counted from 1"
    if len(folders) == outputs:
        ranked = sorted(numbers)
        return [ranked.index(number) for number in numbers], "folder names in the order of their numbers"
    raise UserError(
        f"the network has {outputs} outputs, but {root!r} has {len(folders)} class folders numbered up to {max(numbers)}; "
        "pass data of the network's own classes, or --classes FILE with the network's classes in order"
    )


def _by_list(folders: Sequence[str], outputs: int, root: str, listed: Path) -> list[int]:
    """Folders named in a list, one class a line: by the whole line or its first word, with or without its number."""
    lines = read_names(listed)
    places = _places(lines if len(lines) > 1 else read_names(listed, ","))
    if len(places) != outputs:
        raise UserError(
            f"{str(listed)!r} names {len(places)} classes, but the network has {outputs} outputs; "
            "pass --classes with a file that names the network's classes, one a line, in order"
        )
    first = [name.split()[0] for name in places]
    places = {
        word: place for word, place in zip(first, places.values(), strict=True) if first.count(word) == 1
    } | places
    strange = [name for name in folders if name not in places]
    if strange:
        raise UserError(
            f"class folder {strange[0]!r} of {root!r} is not named in {str(listed)!r}; --classes FILE takes another list"
        )
    labels = [places[name] for name in folders]
    if len(set(labels)) < len(labels):
        raise UserError(
            f"{str(listed)!r} gives two class folders of {root!r} one place; --classes FILE takes another list"
        )
    return labels


def _places(lines: Sequence[str]) -> dict[str, int]:
    """The place of each class by its name: the number that every line begins or ends with, or else its line's."""
    for pattern in (r"(?P<number>\d+)[\s:,;]+(?P<name>.+)", r"(?P<name>.+?)[\s:,;]+(?P<number>\d+)"):
        found = [re.fullmatch(pattern, line) for line in lines]
        if all(found) and sorted(int(line["number"]) for line in found) == list(range(len(lines))):
            return {line["name"]: int(line["number"]) for line in found}
    return {line: place for place, line in enumerate(lines)}


def imagenet_ids() -> list[str]:
    """The WordNet ids of ImageNet's 1,000 classes, in class order."""
    from timm.data import ImageNetInfo  # slow to import

    return ImageNetInfo("imagenet-1k").label_names()
