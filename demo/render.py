"""The demo's data sets: rendered once into a cache folder, in the formats that real data comes in."""

import hashlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy import ndarray
from PIL import Image
from tqdm import tqdm

from demo import scenes
from demo.scenes import CLASSES, VOID, Scene, draw_scene
from utils.core.cache import CACHE_VARIABLE, cache_folder
from utils.core.errors import UserError

EVALUATION_SEED, TRAINING_SEED = 2024, 1  # no scene of one is among those of the other
_MANIFEST = "manifest.json"
_HIDDEN = 0.4  # an object of which less is seen counts as difficult, as in VOC
_SMALLEST = 4  # pixels: what is narrower gets no box


@dataclass(frozen=True)
class SceneKind:
    """How the scenes of one data set are drawn.

    images: how many the data set has. size: height and width in pixels. objects: fewest and most in
    a scene. radius, clutter: as draw_scene takes them.
    """

    images: int
    size: tuple[int, int]
    objects: tuple[int, int]
    radius: tuple[float, float]
    clutter: int


KINDS = {
    "classification": SceneKind(images=500, size=(96, 96), objects=(1, 1), radius=(0.3, 0.48), clutter=1),
    "voc": SceneKind(images=100, size=(160, 200), objects=(1, 5), radius=(0.16, 0.34), clutter=2),
}


def scene(kind: str, seed: int, index: int) -> Scene:
    """Scene number `index` of a kind; the classes take turns, in changing company, so that all are as frequent."""
    settings = KINDS[kind]
    rng = np.random.default_rng((seed, index))
    fewest, most = settings.objects
    first, stride = index * (fewest + most) // 2, rng.choice([1, 3, 7, 9])  # strides that pass through all ten
    classes = tuple(int(first + i * stride) % len(CLASSES) for i in range(rng.integers(fewest, most + 1)))
    return draw_scene((seed, index, 1), settings.size, classes, settings.radius, settings.clutter)


def jpeg(image: ndarray) -> bytes:
    """image: [H, W, 3] uint8."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=92)
    return file.getvalue()


# ---- formats


def write_image_folder(folder: Path, drawn: Iterable[Scene]) -> None:
    """val/<class>/<number>.jpg, as torchvision's ImageFolder reads it."""
    for name in CLASSES:
        (folder / "val" / name).mkdir(parents=True)
    for number, one in enumerate(drawn):
        (folder / "val" / CLASSES[one.classes[0]] / f"{number:04}.jpg").write_bytes(jpeg(one.image))


def write_voc(folder: Path, drawn: Iterable[Scene]) -> None:
    """JPEGImages, Annotations, SegmentationClass, ImageSets/*/val.txt and labels.txt."""
    for part in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    names = []
    for number, one in enumerate(drawn):
        name = f"{number:06}"
        names.append(name)
        (folder / "JPEGImages" / f"{name}.jpg").write_bytes(jpeg(one.image))
        (folder / "Annotations" / f"{name}.xml").write_bytes(annotation(one, name))
        mask = Image.fromarray(one.mask())
        mask.putpalette(_palette())
        mask.save(folder / "SegmentationClass" / f"{name}.png")
    for task in ("Main", "Segmentation"):
        (folder / "ImageSets" / task / "val.txt").write_text("\n".join(names) + "\n")
    (folder / "labels.txt").write_text(",".join(CLASSES) + "\n")


def annotation(one: Scene, name: str) -> bytes:
    """VOC's XML of a scene; pixels count from 1."""
    height, width = one.owner.shape
    root = ElementTree.Element("annotation")
    _add(root, folder="demo", filename=f"{name}.jpg")
    _add(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
    _add(root, segmented=1)
    for number, (x1, y1, x2, y2) in one.boxes().items():
        if min(x2 - x1, y2 - y1) + 1 < _SMALLEST:
            continue
        item, shown = ElementTree.SubElement(root, "object"), one.shown[number - 1]
        cut = x1 == 0 or y1 == 0 or x2 == width - 1 or y2 == height - 1
        _add(
            item,
            name=CLASSES[one.classes[number - 1]],
            pose="Unspecified",
            truncated=int(cut),
            occluded=int(shown < 0.95),
            difficult=int(shown < _HIDDEN),
        )
        _add(ElementTree.SubElement(item, "bndbox"), xmin=x1 + 1, ymin=y1 + 1, xmax=x2 + 1, ymax=y2 + 1)
    ElementTree.indent(root)
    return ElementTree.tostring(root) + b"\n"


def _add(parent: ElementTree.Element, **texts: object) -> None:
    for tag, text in texts.items():
        ElementTree.SubElement(parent, tag).text = str(text)


def _palette() -> list[int]:
    """Red, green, blue of every label: the class's hue, black background, near-white void."""
    colours = [(0, 0, 0)] * 256
    for index in range(len(CLASSES)):
        ramp = np.clip(np.abs((index / len(CLASSES) * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
        colours[1 + index] = tuple(int(value) for value in 70 + 160 * ramp)
    colours[VOID] = (224, 224, 192)
    return [value for colour in colours for value in colour]


WRITERS: dict[str, Callable[[Path, Iterable[Scene]], None]] = {"classification": write_image_folder, "voc": write_voc}


# ---- cache


def rendered(kind: str, root: str | None = None) -> Path:
    """The folder of a data set ("classification" or "voc"), rendered now unless it is there and whole."""
    folder = cache_folder(root) / "demo" / kind
    try:
        fault = _fault(folder)
        if fault is None:
            return folder
        if folder.exists():
            _say(f"{fault} in {str(folder)!r}; rendering its scenes anew")
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=folder.parent))
        try:
            _fill(fresh, kind)
            _replace(folder, fresh)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot keep the demo's images in {str(folder)!r} ({reason}); set {CACHE_VARIABLE} to a folder that can be written"
        ) from None
    return folder


def _fill(folder: Path, kind: str) -> None:
    settings = KINDS[kind]
    indices = tqdm(
        range(settings.images), desc="rendering the demo's images (once)", unit="image", file=sys.stderr, disable=None
    )
    WRITERS[kind](folder, (scene(kind, EVALUATION_SEED, index) for index in indices))
    manifest = {
        "kind": kind,
        "images": settings.images,
        "seed": EVALUATION_SEED,
        "version": _version(),
        "sha256": _digest(folder),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _replace(folder: Path, fresh: Path) -> None:
    """Put the fresh folder in the old one's place; nobody ever sees half of it."""
    old = fresh.with_name(fresh.name + "-old")
    if folder.exists():
        folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        if _fault(folder) is not None:  # another process was first
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _fault(folder: Path) -> str | None:
    """What is wrong with a rendered data set; None: nothing."""
    if not folder.is_dir():
        return "nothing"
    content = {entry.name for entry in folder.iterdir()}
    strange = content - {_MANIFEST, "val", "JPEGImages", "Annotations", "SegmentationClass", "ImageSets", "labels.txt"}
    if strange:
        raise UserError(
            f"{str(folder)!r} holds {min(strange)!r}, which the demo did not write; move it away, or set {CACHE_VARIABLE} to another folder"
        )
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        drawn_by, digest = manifest["version"], manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return "no readable manifest"
    if drawn_by != _version():
        return "an outdated demo"
    return None if digest == _digest(folder) else "damaged files"


def _version() -> str:
    """Hash of the code that draws: other code draws other scenes."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in (scenes.__file__, __file__))).hexdigest()[:16]


def _digest(folder: Path) -> str:
    """Hash of all names and contents but the manifest's."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST):
        total.update(file.relative_to(folder).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _say(line: str) -> None:
    print(f"demo: {line}", file=sys.stderr)
