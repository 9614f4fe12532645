"""Inputs as people have them, and what happens: the rows of docs/bad_inputs.md, made by `python tests/bad_inputs.py`.

Every row makes its files, reads them as the scripts do, and says what came of it; tests/test_bad_inputs.py compares that
with what the page says ("…" stands for anything).
"""

import argparse
import contextlib
import io
import os
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

import main_cls  # noqa: E402
import main_det  # noqa: E402
import main_seg  # noqa: E402
from modeling.checkpoint import fit, read_checkpoint  # noqa: E402
from utils.core.errors import UserError  # noqa: E402
from utils.core.input_spec import InputSpec  # noqa: E402
from utils.tasks.data import BadSample, image_folder  # noqa: E402
from utils.tasks.detection import voc_detection  # noqa: E402
from utils.tasks.masks import MaskValues  # noqa: E402
from utils.tasks.segmentation import voc_segmentation  # noqa: E402
from utils.tasks.voc import open_voc  # noqa: E402

PAGE = ROOT / "docs" / "bad_inputs.md"
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


HALF = {key: value + 1 for key, value in TENSORS.items()}
KIT = "<annotation><size>"

ROWS: dict[str, list[Row]] = {
    "Folders of classes": [
        Row(
            "folders 9, 10 for 12 outputs",
            "labels: folder names are the network's outputs, counted from 0: 9 = 9, 10 = 10",
            classes("9", "10", outputs=12),
        ),
        Row(
            "folders 1, 2, 3 for 3 outputs",
            "labels: folder names are the network's outputs, counted from 1: 1 = 0, 2 = 1, 3 = 2",
            classes("1", "2", "3", outputs=3),
        ),
        Row(
            "folders 30, 4 for 2 outputs",
            "labels: folder names in the order of their numbers: 4 = 0, 30 = 1",
            classes("30", "4"),
        ),
        Row(
            "folders 1 and 01", "refused: two class folders of '.' have the same number; rename one", classes("1", "01")
        ),
        Row(
            "folders 0 and 12 for 12 outputs",
            "refused: the network has 12 outputs, but '.' has 2 class folders numbered up to 12; pass data of the network's own classes, or --classes FILE with the network's classes in order",
            classes("0", "12", outputs=12),
        ),
        Row(
            "WordNet ids, 2 of 1,000",
            "labels: ImageNet's WordNet ids: n01440764 = 0, n02102040 = 217",
            classes("n02102040", "n01440764", outputs=1000),
        ),
        Row(
            "as many names as outputs",
            "labels: folder names in alphabetical order: ant = 0, bee = 1",
            classes("bee", "ant"),
        ),
        Row(
            "another number of names",
            "refused: the network has 3 outputs, but '.' has 2 class folders (which is not ImageNet's 1,000); …",
            classes("bee", "ant", outputs=3),
        ),
        Row(
            "classes.txt beside the folders",
            "labels: in the order of classes.txt: bee = 0, ant = 1",
            classes("bee", "ant", classes_txt="bee\nant\n"),
        ),
        Row(
            "--classes FILE with numbers and further words",
            "labels: in the order of l.txt: ant = 0, bee = 1",
            classes("bee", "ant", given="l.txt", l_txt="1 bee busy\n0 ant black\n"),
        ),
        Row(
            "a list that lacks a folder",
            "refused: class folder 'bee' of '.' is not named in 'classes.txt'; --classes FILE takes another list",
            classes("bee", "ant", classes_txt="ant\ncat"),
        ),
        Row(
            "a list of another length",
            "refused: 'classes.txt' names 1 classes, but the network has 2 outputs; …",
            classes("bee", "ant", classes_txt="ant"),
        ),
        Row(
            "--classes with no file",
            "refused: no file at --classes 'l.txt'; it must name the network's classes, one a line, in order",
            classes("bee", "ant", given="l.txt"),
        ),
        Row(
            "train/ and test/ in --data",
            "refused: no split 'val' in '.'; pass --split with one that is there: test, train",
            classes("train/a", "train/b", "test/a"),
        ),
        Row(
            "--split test, not there",
            "refused: no split 'test' in '.'; leave out --split to take the folder as it is",
            classes("a", "b", split="test"),
        ),
        Row(
            ".ipynb_checkpoints and train/ beside classes",
            "labels: folder names in alphabetical order (left out, as no class: .ipynb_checkpoints, train): a = 0, b = 1",
            classes("a", "b", ".ipynb_checkpoints", "train"),
        ),
        Row(
            "hidden copies in a class folder",
            "labels: folder names in alphabetical order; 1 file(s) of the class folders are no images or hidden, and left out: a = 0, b = 1",
            classes("a", "b", "a/.ipynb_checkpoints"),
        ),
        Row(
            "an empty folder",
            "refused: '.' has no class folders; pass --data with a folder that holds one folder of images per class",
            classes(),
        ),
    ],
    "Pictures": [
        Row("16-bit grey PNG of 25700", "read as [100, 100, 100]", picture(array(25700, np.uint16))),
        Row("16-bit grey TIFF of 25700", "read as [100, 100, 100]", picture(array(25700, np.uint16), ".tif")),
        Row("float TIFF of 0.4", "read as [102, 102, 102]", picture(array(0.4, np.float32), ".tif")),
        Row(
            "float TIFF of 400",
            "bad image: a/1.tif (its pixels reach from 400 to 400; pixels of mode F must be in 0 to 1)",
            picture(array(400, np.float32), ".tif"),
        ),
        Row(
            "RGBA, half transparent (laid over black)",
            "read as [100, 50, 25]",
            picture(array((200, 100, 50, 128), np.uint8)),
        ),
        Row(
            "RGBA for a network of 4 channels",
            "read as [200, 100, 50, 128]",
            picture(array((200, 100, 50, 128), np.uint8), channels=4),
        ),
        Row("RGB for a network of 1 channel", "read as [76]", picture(array((255, 0, 0), np.uint8), channels=1)),
        Row(
            "a network of 5 channels",
            "refused: the network takes images of 5 channels, but pictures have 1 (grey), 3 (red, green, blue) or 4 (with alpha); …",
            picture(array((255, 0, 0), np.uint8), channels=5),
        ),
        Row("palette with a transparent colour", "read as [40, 50, 60]", picture(palette)),
        Row(
            "CMYK TIFF",
            "read as [0, 255, 255]",
            picture(lambda file: Image.new("CMYK", (9, 9), (255, 0, 0, 0)).save(file), ".tif"),
        ),
        Row("1-bit PNG", "read as [255, 255, 255]", picture(array(True, bool))),
        Row("a turn in EXIF (ignored, as torchvision does)", "read as [9, 9, 9]", picture(turned, ".jpg")),
        Row(
            "200x1 white for a 24x48 input (covered, then cropped)",
            "read as [255, 255, 255], lowest 255",
            picture(lambda file: Image.new("L", (200, 1), 255).save(file), size=(24, 48), resize=24),
        ),
        Row(
            "--resize below the crop (covered, then cropped)",
            "read as [255, 255, 255], lowest 255",
            picture(lambda file: Image.new("L", (60, 50), 255).save(file), size=(32, 32), resize=16),
        ),
        Row("a file cut off", "bad image: a/1.png (…)", picture(cut(0.5))),
        Row("an empty file", "bad image: a/1.png (cannot identify image file …)", picture(raw(b""))),
        Row("text named .jpg", "bad image: a/1.jpg (cannot identify image file …)", picture(raw(b"hello"), ".jpg")),
    ],
    "Masks": [
        Row(
            "0 and 255 for 2 classes",
            "refused: the masks of '.' hold 0 and 255 alone, and the network has 2 classes; pass --mask_values 0=0,255=1 if 255 is the second class, or --void 255 if such pixels do not count",
            mask(0, 255),
        ),
        Row(
            "the same with --mask_values 0=0,255=1",
            "classes [0, 1]",
            mask(0, 255, values=MaskValues(2, {0: 0, 255: 1})),
        ),
        Row("the same with --void 255", "classes [0, 255]", mask(0, 255, values=MaskValues(2))),
        Row("0 and 255 for 3 classes (255 is void)", "classes [0, 255]", mask(0, 255, 3, labels="a,b,c")),
        Row(
            "255 with --void none",
            "bad image: JPEGImages/a.png (mask 'SegmentationClass/a.png' holds the label 255; the network has 2 classes, 0 to 1, and no value is void)",
            mask(0, 255, values=MaskValues(2, void=None)),
        ),
        Row("16-bit values", "classes [0, 1]", mask(0, 1, kind=np.uint16)),
        Row("1-bit", "classes [0, 1]", mask(False, True, kind=bool)),
        Row(
            "a label beyond the classes",
            "bad image: JPEGImages/a.png (mask 'SegmentationClass/a.png' holds the label 7; the network has 2 classes, 0 to 1, and 255 is void)",
            mask(0, 7),
        ),
        Row(
            "a colour picture",
            "bad image: JPEGImages/a.png (mask 'SegmentationClass/a.png' is a colour picture (RGB); …)",
            mask(0, 1, shape=(8, 8, 3)),
        ),
        Row(
            "a mask of another size",
            "bad image: JPEGImages/a.png (mask 'SegmentationClass/a.png' is 8x9, the image 8x8)",
            mask(0, 1, shape=(9, 8)),
        ),
        Row(
            "a network of 1 class",
            "refused: the network has 1 class(es) a pixel; a segmentation network must have 2 to 255, one score each",
            mask(0, 1, 1),
        ),
    ],
    "VOC folders": [
        Row(
            "lines with suffix and folder",
            "read as JPEGImages/a.png, JPEGImages/b.png",
            listed("a.png\nJPEGImages/b.png\n", "a.png", "b.png"),
        ),
        Row("lines with sub-folders, .webp", "read as JPEGImages/day/a.webp", listed("day/a\n", "day/a.webp")),
        Row("lines of a class, with 1 or -1", "read as JPEGImages/a.png", listed("a  -1\n", "a.png")),
        Row(
            "an image named twice",
            "read as JPEGImages/a.png; 1 line(s) of val.txt name an image again; every image counts once",
            listed("a\na\n", "a.png"),
        ),
        Row(
            "a.jpg and a.png for a line a",
            "refused: 'a' is there as a.jpg and a.png in 'JPEGImages'; name it with its suffix in the list",
            listed("a\n", "a.jpg", "a.png"),
        ),
        Row(
            "an image that is not there",
            "refused: split 'val' of '.' names 1 image(s) that JPEGImages does not hold, first 'b'; mend it, or pass --skip_bad_images",
            listed("a\nb\n", "a.png"),
        ),
        Row("<size> of zeros (the picture's is taken)", "box [0, 0, 4, 4]", box(1, 1, 5, 5, size=(0, 0))),
        Row(
            "a box one pixel outside",
            "box [0, 0, 199, 99]; 1 box(es) reached a pixel outside their image and are clipped",
            box(0, 0, 201, 101),
        ),
        Row("swapped corners", "box [0, 9, 99, 49]; 1 box(es) had swapped corners", box(100, 50, 1, 10)),
        Row(
            "a box far outside",
            "refused: annotation 'Annotations/a.xml', object 1 (cat): box 1, 1, 300, 50 (xmin, ymin, xmax, ymax) reaches outside the image of 200x100; mend it, or pass --skip_bad_images",
            box(1, 1, 300, 50),
        ),
        Row(
            "the same with --skip_bad_images",
            "skipped and counted: JPEGImages/a.png (annotation 'Annotations/a.xml', object 1 (cat): box … reaches outside the image of 200x100)",
            box(1, 1, 300, 50, skip=True),
        ),
        Row(
            "an empty box",
            "refused: annotation 'Annotations/a.xml', object 1 (cat): box 5, 5, 5, 9 (xmin, ymin, xmax, ymax) is empty; mend it, or pass --skip_bad_images",
            box(5, 5, 5, 9),
        ),
        Row(
            "XML cut off",
            "refused: annotation 'Annotations/a.xml' is no valid XML: …; mend it, or pass --skip_bad_images",
            box(text=KIT),
        ),
        Row(
            "a class that labels.txt lacks",
            "refused: annotation 'Annotations/a.xml', object 1 (dog): unknown class; the classes are cat (labels.txt in the folder, or --classes, names others)",
            box(1, 1, 5, 5, name="dog", skip=True),
        ),
    ],
    "Checkpoints": [
        Row(
            "numpy numbers, a namespace and paths beside the tensors",
            "loaded, 3 channels, mean weight 1; weights of w.pth: taken from 'state_dict'",
            content({"state_dict": TENSORS, "best_pred": np.float64(0.7), "args": argparse.Namespace(out=Path("x"))}),
        ),
        Row(
            "state_dict and ema",
            "loaded, 3 channels, mean weight 1; weights of w.pth: taken from 'ema' (averaged), not 'state_dict'; for that pass --checkpoint_key",
            content({"state_dict": HALF, "ema": TENSORS}),
        ),
        Row(
            "the same with --checkpoint_key state_dict",
            "loaded, 3 channels, mean weight 2; weights of w.pth: taken from 'state_dict', not 'ema'; for that pass --checkpoint_key",
            checkpoint(lambda file: {"state_dict": HALF, "ema": TENSORS}, "state_dict"),
        ),
        Row(
            "--checkpoint_key with no such entry",
            "refused: 'w.pth' holds no state dict under --checkpoint_key 'x'; there is ema",
            checkpoint(lambda file: {"ema": TENSORS}, "x"),
        ),
        Row(
            "two sets under names of one's own",
            "refused: 'w.pth' holds several state dicts; pass --checkpoint_key with one of a, b",
            content({"a": TENSORS, "b": HALF}),
        ),
        Row(
            "prefixes and bookkeeping",
            "loaded, 3 channels, mean weight 1; weights of w.pth: prefix 'module.' removed",
            content(
                {f"module._orig_mod.{key}": value for key, value in TENSORS.items()} | {"n_averaged": torch.tensor(3)}
            ),
        ),
        Row(
            "weights of 4 input channels",
            "loaded, 4 channels, mean weight 1",
            content({"0.weight": torch.ones(4, 4, 1, 1), "0.bias": torch.ones(4)}),
        ),
        Row(
            "integers for weights",
            "refused: checkpoint 'w.pth' does not fit this network: 1 not of floating point (0.weight is int8); check --model",
            content({"0.weight": TENSORS["0.weight"].char(), "0.bias": torch.ones(4)}),
        ),
        Row(
            "names of another network",
            "refused: checkpoint 'w.pth' does not fit this network: 2 missing (0.weight, 0.bias); 2 unexpected (a.0.weight, a.0.bias); check --model",
            content({f"a.{key}": value for key, value in TENSORS.items()}),
        ),
        Row(
            "a pickle that calls a function",
            "refused: 'w.pth' holds the object 'posix.mkdir', which is no tensor and could run code, so it is not loaded; save model.state_dict() and pass that",
            content({"state_dict": TENSORS, "x": Hostile(os.mkdir, "ran")}),
        ),
        Row(
            "a whole module, torch.save(model)",
            "refused: 'w.pth' holds the object 'torch.nn.modules.linear.Linear', which is no tensor and could run code, so it is not loaded; save model.state_dict() and pass that",
            content(nn.Linear(2, 2)),
        ),
        Row(
            "a record tampered with",
            "refused: 'w.pth' holds the object 'posix.mkdir', which is no tensor and could run code, so it is not loaded; …",
            checkpoint(tampered),
        ),
        Row(
            "a flipped bit in the weights",
            "refused: 'w.pth' is damaged (Bad CRC-32 for file …); save model.state_dict() and pass that",
            checkpoint(flipped),
        ),
        Row(
            "TorchScript",
            "refused: 'w.pth' is a TorchScript program, not a file of tensors; save model.state_dict() and pass that",
            checkpoint(script),
        ),
        Row(
            "an empty file",
            "refused: cannot read 'w.pth' (…); save model.state_dict() and pass that",
            checkpoint(lambda file: file.touch()),
        ),
        Row(
            "no tensors at all",
            "refused: 'w.pth' holds no state dict; save model.state_dict() and pass that",
            content({"epoch": 3}),
        ),
    ],
    "Flags": [
        Row(
            "--load with --resize",
            "refused: --load takes the network, its input and its passes from the file; leave out --resize",
            flags(main_cls, "--load", "f", "--resize", "9"),
        ),
        Row(
            "--load with --model",
            "refused: --load takes the network, its input and its passes from the file; leave out --model",
            flags(main_det, "--load", "f", "--model", "x"),
        ),
        Row(
            "--checkpoint_key without --weights",
            "refused: --checkpoint_key needs --weights",
            flags(main_seg, "--checkpoint_key", "ema"),
        ),
        Row(
            "--mask_values 0=0,0=1",
            "refused: argument --mask_values: '0=0,0=1' is no list of different values and their classes, such as 0=0,255=1,7=void",
            flags(main_seg, "--mask_values", "0=0,0=1"),
        ),
    ],
}


def page() -> str:
    """The page: every row by group."""
    parts = [
        "# Bad and odd inputs, and what happens\n\nMade by `python tests/bad_inputs.py` from the rows that "
        "`tests/test_bad_inputs.py` runs; do not edit. A refusal is one line on standard error and exit code 2. A bad image "
        'is refused by its name, or counted and skipped with `--skip_bad_images`. "…" stands for text that is left out.\n\n'
        "What is fixed: transparent pixels are laid over black where the network takes no alpha; an EXIF rotation is ignored, "
        "as torchvision does; 16-bit and float pixels are scaled to 8 bits; images are scaled to cover the input and cropped. "
        "Boxes are matched without the +1 of VOC's development kit; `--pixel_inclusive` matches as the kit does."
    ]
    for group, rows in ROWS.items():
        lines = [f"| {row.given} | {row.happens} |".replace("\n", " ") for row in rows]
        parts.append("\n".join([f"## {group}\n", "| given | what happens |", "|---|---|", *lines]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
