"""Inputs as people have them, and what happens: the rows of docs/bad_inputs.md, made by `python tests/bad_inputs.py`.

Every row makes its files, reads them as the scripts do, and says what came of it; tests/test_bad_inputs.py compares that
with what the page says ("…" stands for anything).
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from odd_files import (
    ROOT,
    TENSORS,
    Hostile,
    Row,
    array,
    box,
    checkpoint,
    classes,
    content,
    cut,
    flags,
    flipped,
    listed,
    mask,
    palette,
    picture,
    raw,
    script,
    tampered,
    turned,
)
from PIL import Image
from torch import nn

import main_cls
import main_det
import main_seg
from utils.tasks.masks import MaskValues

PAGE = ROOT / "docs" / "bad_inputs.md"
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
            "labels: folder names in alphabetical order (skipped, as no class: .ipynb_checkpoints, train): a = 0, b = 1",
            classes("a", "b", ".ipynb_checkpoints", "train"),
        ),
        Row(
            "hidden copies in a class folder",
            "labels: folder names in alphabetical order; 1 file(s) of the class folders are no images or hidden, and skipped: a = 0, b = 1",
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
            "refused: the network has 1 class(es) a pixel, one score for object or not; let it return a score for the background too: torch.cat([-logits, logits], 1), or torch.cat([1 - p, p], 1) after a sigmoid",
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
            "refused: cannot read 'w.pth' as what torch.save writes (…); save model.state_dict() and pass that",
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
            "--auto with passes",
            "refused: --auto chooses the passes itself; leave out --equalize, or --auto",
            flags(main_cls, "--auto", "--equalize"),
        ),
        Row(
            "--auto with --table",
            "refused: --auto quantizes one network anew; leave out --table, or --auto",
            flags(main_seg, "--auto", "--table"),
        ),
        Row(
            "--max_noise without --auto",
            "refused: --max_noise needs --auto",
            flags(main_cls, "--quantize", "--max_noise", "30"),
        ),
        Row(
            "--doctor with --export",
            "refused: --doctor quantizes nothing; leave out --export, or --doctor",
            flags(main_det, "--doctor", "--export", "x.onnx"),
        ),
        Row(
            "--float_layers without --quantize",
            "refused: --float_layers needs --quantize",
            flags(main_cls, "--float_layers", "features.0.0"),
        ),
        Row(
            "--checkpoint_key without --weights",
            "refused: --checkpoint_key needs --weights",
            flags(main_seg, "--checkpoint_key", "ema"),
        ),
        Row(
            "--target of an engine that is not known",
            "refused: argument --target: invalid choice: 'tflite' (choose from …onnxruntime…openvino…tensorrt…)",
            flags(main_cls, "--quantize", "--target", "tflite"),
        ),
        Row(
            "--asymmetric for TensorRT, which has no zero points",
            "refused: --target tensorrt has no weights with zero points; leave out --asymmetric",
            flags(main_cls, "--quantize", "--target", "tensorrt", "--asymmetric"),
        ),
        Row(
            "a zero point for every channel of 8 bits, which engines are slow with",
            "refused: --asymmetric with --per_channel is for fewer than 8 bits of weights: of 8 engines compute a zero point for every channel slowly; leave out --asymmetric, or --per_channel",
            flags(main_cls, "--quantize", "--per_channel", "--asymmetric"),
        ),
        Row(
            "bits that a target has no kernels for",
            "refused: --target openvino has no kernels for --bits_weight 4, only for 8 or 7; leave it out",
            flags(main_seg, "--quantize", "--target", "openvino", "--bits_weight", "4"),
        ),
        Row(
            "--engine openvino for another target",
            "refused: --engine openvino runs what --target openvino makes, and this is for tensorrt; pass --target openvino",
            flags(main_det, "--quantize", "--target", "tensorrt", "--engine", "openvino"),
        ),
        Row(
            "--target without --quantize",
            "refused: --target needs --quantize",
            flags(main_cls, "--target", "tensorrt"),
        ),
        Row(
            "--opset for a program of torch.export",
            "refused: --opset is of ONNX files, and net.pt2 is to be one of torch.export; leave out --opset",
            flags(main_cls, "--quantize", "--export", "net.pt2", "--opset", "17"),
        ),
        Row(
            "--weight_type that a target's files do not have",
            "refused: files for TensorRT hold weights as int8 alone; leave out --weight_type",
            flags(main_cls, "--quantize", "--target", "tensorrt", "--export", "net.onnx", "--weight_type", "uint8"),
        ),
        Row(
            "--weight_type without a file",
            "refused: --weight_type needs --export, or an --engine that is not simulate",
            flags(main_cls, "--quantize", "--weight_type", "uint8"),
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
        'is refused by its name, or counted and skipped with `--skip_bad_images`. "…" stands for text that is dropped here.\n\n'
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
