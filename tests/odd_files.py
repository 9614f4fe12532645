"""Files as people have them: each function gives a row of bad_inputs.py what makes its files and reads them."""

import contextlib
import io
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from modeling.checkpoint import fit, read_checkpoint  # noqa: E402
from utils.core.errors import UserError  # noqa: E402
from utils.core.input_spec import InputSpec  # noqa: E402
from utils.tasks.data import BadSample, image_folder  # noqa: E402
from utils.tasks.detection import voc_detection  # noqa: E402
from utils.tasks.masks import MaskValues  # noqa: E402
from utils.tasks.segmentation import voc_segmentation  # noqa: E402
from utils.tasks.voc import open_voc  # noqa: E402

SPEC = InputSpec(size=(8, 8), resize=8, mean=(0.0,) * 3, std=(1.0,) * 3)


@dataclass(frozen=True)
class Row:
    """An input in words, what happens, and what makes it happen: a folder to work in -> what came of it."""

    given: str
    happens: str
    run: Callable[[Path], str]


def outcome(row: Row, folder: Path) -> str:
    """What really happens, in the words of the page."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            said = row.run(folder)
    except UserError as error:
        said = f"refused: {error}"
    except SystemExit:
        said = f"refused: {printed.getvalue().strip().partition('error: ')[2].removesuffix(' (see --help)')}"
    return said.replace(f"{folder}/", "").replace(str(folder), ".")


# ------------------------------------------------------------------------------------ what makes files


def classes(*names: str, outputs: int = 2, split: str = "val", given: str | None = None, **texts: str):
    """Class folders of one image each; texts: of other files by name, with _ for a dot."""

    def run(folder: Path) -> str:
        for name in names:
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9)).save(folder / name / "1.png")
        for name, text in texts.items():
            (folder / name.replace("_", ".")).write_text(text)
        samples, by_output = image_folder(str(folder), split, SPEC, outputs, given and str(folder / given))
        pairs = ", ".join(f"{name} = {output}" for output, name in sorted(by_output.items())[:3])
        return f"{'; '.join(samples.notes)}: {pairs}"

    return run


def picture(make: Callable[[Path], object], suffix: str = ".png", channels: int = 3, size=(8, 8), resize=8):
    """One picture: the value of its centre in 255ths, or why it is none."""

    def run(folder: Path) -> str:
        (folder / "a").mkdir()
        make(folder / f"a/1{suffix}")
        spec = InputSpec(size, resize, mean=(0.0,) * channels, std=(1.0,) * channels)
        sample = image_folder(str(folder), "val", spec, 1)[0][0]
        if isinstance(sample, BadSample):
            return f"bad image: {sample.reason}"
        image = (sample[0] * 255).round().int()
        low = image.amin().item()
        return f"read as {image[:, size[0] // 2, size[1] // 2].tolist()}" + (
            f", lowest {low}" if size != (8, 8) else ""
        )

    return run


def array(values, kind, mode=None, **options):
    return lambda file: Image.fromarray(np.full((8, 8, *np.shape(values)), values, kind), mode).save(file, **options)


def raw(content: bytes):
    return lambda file: file.write_bytes(content)


def cut(share: float):
    def make(file: Path) -> None:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file)
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return make


def palette(file: Path) -> None:
    image = Image.new("P", (9, 9), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(file, transparency=0)


def turned(file: Path) -> None:
    image = Image.new("RGB", (40, 20), (9, 9, 9))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file, exif=exif)


def mask(
    left: int,
    right: int,
    outputs: int = 2,
    values: MaskValues | None = None,
    kind=np.uint8,
    labels="no,yes",
    shape=(8, 8),
):
    """A segmentation folder of one image and mask: the classes of its left and right half."""

    def run(folder: Path) -> str:
        voc(folder, "Segmentation")
        pixels = np.full(shape, left, kind)
        pixels[:, 4:] = right
        Image.fromarray(pixels).save(folder / "SegmentationClass/a.png")
        (folder / "labels.txt").write_text(labels)
        sample = voc_segmentation(str(folder), None, SPEC, outputs, values)[0][0]
        return (
            f"bad image: {sample.reason}"
            if isinstance(sample, BadSample)
            else f"classes {sample[1][0, [0, 7]].tolist()}"
        )

    return run


def voc(folder: Path, task: str, lines: str = "a\n", names=("a.png",)) -> None:
    for name in ("JPEGImages", "SegmentationClass", "Annotations", f"ImageSets/{task}"):
        (folder / name).mkdir(parents=True)
    for name in names:
        (folder / "JPEGImages" / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / "JPEGImages" / name)
    (folder / f"ImageSets/{task}/val.txt").write_text(lines)


def listed(lines: str, *names: str):
    def run(folder: Path) -> str:
        voc(folder, "Main", lines, names)
        split = open_voc(str(folder), "Main")
        return "; ".join([f"read as {', '.join(str(file.relative_to(folder)) for file in split.images)}", *split.notes])

    return run


def box(*corners, size=(200, 100), skip: bool = False, text: str | None = None, name: str = "cat"):
    """An annotation with one box: its edges in the image's own pixels, counted from 0."""

    def run(folder: Path) -> str:
        voc(folder, "Main", "a\nb\n", ("a.png", "b.png"))
        for image, four in (("a", corners or (1, 1, 5, 5)), ("b", (1, 1, 5, 5))):
            Image.new("RGB", (200, 100)).save(folder / f"JPEGImages/{image}.png")
            sides = "".join(
                f"<{side}>{x}</{side}>" for side, x in zip(("xmin", "ymin", "xmax", "ymax"), four, strict=True)
            )
            stated = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
            entry = f"<object><name>{name if image == 'a' else 'cat'}</name><bndbox>{sides}</bndbox></object>"
            (folder / f"Annotations/{image}.xml").write_text(
                f"<annotation>{stated if image == 'a' else ''}{entry}</annotation>"
            )
        if text is not None:
            (folder / "Annotations/a.xml").write_text(text)
        (folder / "labels.txt").write_text("cat")
        samples, _ = voc_detection(open_voc(str(folder), "Main", skip_bad=skip), SPEC, 2, skip)
        if isinstance(samples[0], BadSample):
            return f"skipped and counted: {samples[0].reason}"
        edges = (samples[0][1].boxes[0] * torch.tensor([200, 100, 200, 100])).round().int().tolist()
        return "; ".join([f"box {edges}", *samples.notes])

    return run


TENSORS = {"0.weight": torch.ones(4, 3, 1, 1), "0.bias": torch.ones(4)}


def checkpoint(make: Callable[[Path], object], key: str | None = None):
    """A checkpoint for a network of one convolution: what is said, and the sum of what is loaded."""

    def run(folder: Path) -> str:
        content = make(folder / "w.pth")
        if content is not None:
            torch.save(content, folder / "w.pth")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            tensors = read_checkpoint(str(folder / "w.pth"), key)
            model = fit(nn.Sequential(nn.Conv2d(3, 4, 1)), tensors, "w.pth")
        assert not (folder / "ran").exists()
        loaded = f"loaded, {model[0].in_channels} channels, mean weight {model[0].weight.mean():g}"
        return "; ".join([loaded, *printed.getvalue().splitlines()])

    return run


def content(value):
    return checkpoint(lambda file: value)


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def flipped(file: Path) -> None:
    torch.save(TENSORS, file)
    data = bytearray(file.read_bytes())
    data[data.find(TENSORS["0.weight"].numpy().tobytes()) + 2] ^= 1
    file.write_bytes(data)


def tampered(file: Path) -> None:
    torch.save(TENSORS, file)
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in records.items():
            archive.writestr(
                name, b"\x80\x02cposix\nmkdir\nX\x03\x00\x00\x00ran\x85R." if name.endswith("data.pkl") else data
            )


def script(file: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(file)


def flags(main, *words: str):
    return lambda folder: str(main.parse_args(["--data", "x", *words]))
