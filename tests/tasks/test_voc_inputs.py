"""VOC folders as people have them: masks of other values, lists of other forms, annotations with small mistakes."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.tasks.boxes import BoxCoder, Detections
from utils.tasks.data import BadSample
from utils.tasks.detection import read_annotation, voc_detection
from utils.tasks.metrics import VOID, MeanAveragePrecision, match
from utils.tasks.segmentation import MaskValues, voc_segmentation
from utils.tasks.voc import open_voc

SPEC = InputSpec(size=(8, 8), resize=8)


def make(root, names=("a", "b"), task="Segmentation", suffix=".png"):
    """A VOC folder of 8x8 images without annotations; a name may have sub-folders."""
    for folder in ("JPEGImages", "SegmentationClass", "Annotations", f"ImageSets/{task}"):
        (root / folder).mkdir(parents=True)
    for name in names:
        file = root / "JPEGImages" / f"{name}{suffix}"
        file.parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (8, 8)).save(file)
    write_list(root, "\n".join(names), task)
    return root


def write_list(root, text, task="Segmentation"):
    (root / f"ImageSets/{task}/val.txt").write_text(text)


# ------------------------------------------------------------------------------------------- masks


def masks(root, *values, labels="no,yes"):
    """One mask for each array of values, 8x8 of one mode."""
    make(root, [f"{i}" for i in range(len(values))])
    for i, value in enumerate(values):
        image = value if isinstance(value, Image.Image) else Image.fromarray(value)
        image.save(root / f"SegmentationClass/{i}.png")
    (root / "labels.txt").write_text(labels)
    return str(root)


def split_mask(left, right, kind=np.uint8):
    mask = np.full((8, 8), left, kind)
    mask[:, 4:] = right
    return mask


BINARY = [split_mask(0, 255), split_mask(0, 0)]


def classes_of(root, outputs=2, values=None):
    """Left and right class of the first mask."""
    samples, _ = voc_segmentation(root, None, SPEC, outputs, values)
    sample = samples[0]
    if isinstance(sample, BadSample):
        raise ValueError(sample.reason)
    return sample[1][0, [0, 7]].tolist()


@pytest.mark.parametrize("first", [0, 1])
def test_masks_of_0_and_255_are_refused_for_two_classes_with_what_to_pass(first, tmp_path):
    root = masks(tmp_path, *(BINARY if first else BINARY[::-1]))
    with pytest.raises(UserError, match=r"pass --mask_values 0=0,255=1 .* or --void 255"):
        voc_segmentation(root, None, SPEC, 2)


def test_masks_of_0_and_255_mean_what_is_passed(tmp_path):
    root = masks(tmp_path, *BINARY)
    assert classes_of(root, values=MaskValues(2, {0: 0, 255: 1})) == [0, 1]
    assert classes_of(root, values=MaskValues(2, {0: 1, 255: 0})) == [1, 0]
    assert classes_of(root, values=MaskValues(2)) == [0, VOID]


def test_masks_with_a_1_or_without_255_have_void_as_ever(tmp_path):
    assert classes_of(masks(tmp_path / "a", split_mask(0, 255), split_mask(1, 255))) == [0, VOID]
    assert classes_of(masks(tmp_path / "b", split_mask(0, 0))) == [0, 0]
    assert classes_of(masks(tmp_path / "c", split_mask(0, 255), labels="a,b,c"), 3) == [0, VOID]


MASKS = {
    "1-bit": (Image.fromarray(split_mask(False, True, bool)), None, [0, 1]),
    "16-bit": (split_mask(0, 1, np.uint16), None, [0, 1]),
    "16-bit values": (split_mask(500, 1000, np.uint16), MaskValues(2, {500: 1, 1000: 0}), [1, 0]),
    "another void": (split_mask(1, 99), MaskValues(2, void=99), [1, VOID]),
    "void that is mapped": (split_mask(7, 255), MaskValues(2, {7: 0, 255: 1}), [0, 1]),
    "void beside a mapping": (split_mask(7, 255), MaskValues(2, {7: 0, 9: 1}), [0, VOID]),
    "a value mapped to void": (split_mask(7, 9), MaskValues(2, {7: 1, 9: VOID}), [1, VOID]),
}


@pytest.mark.parametrize("kind", MASKS)
def test_values_of_masks(kind, tmp_path):
    mask, values, expected = MASKS[kind]
    assert classes_of(masks(tmp_path, mask), values=values) == expected


@pytest.mark.parametrize(
    ("mask", "values", "message"),
    [
        (split_mask(0, 2), None, "holds the label 2; the network has 2 classes, 0 to 1, and 255 is void"),
        (split_mask(0, 255), MaskValues(2, void=None), "holds the label 255; .* and no value is void"),
        (split_mask(0, 3), MaskValues(2, {0: 0, 5: 1}), "holds the label 3; --mask_values names 0, 5"),
        (split_mask(0, 65535, np.uint16), None, "holds the label 65535"),
        (np.zeros((8, 8, 3), np.uint8), None, r"is a colour picture \(RGB\)"),
        (np.zeros((8, 8, 4), np.uint8), None, r"is a colour picture \(RGBA\)"),
    ],
)
def test_values_without_a_meaning_are_named(mask, values, message, tmp_path):
    with pytest.raises(ValueError, match=rf"mask '.*0\.png' {message}"):
        classes_of(masks(tmp_path, mask), values=values)


@pytest.mark.parametrize(
    ("outputs", "remedy"),
    [(1, ", one score for object or not; let it return a score"), (256, "; .* must have 2 to 255")],
)
def test_networks_of_one_or_too_many_classes_are_refused(outputs, remedy, tmp_path):
    with pytest.raises(UserError, match=rf"has {outputs} class\(es\) a pixel{remedy}"):
        voc_segmentation(masks(tmp_path, *BINARY), None, SPEC, outputs)


def test_a_file_of_class_names_takes_the_place_of_labels_txt(tmp_path):
    root = masks(tmp_path / "voc", split_mask(0, 1), labels="a,b,c")
    (tmp_path / "names.txt").write_text("nothing\nsomething\n")
    assert voc_segmentation(root, None, SPEC, 2, classes=str(tmp_path / "names.txt"))[1] == ("nothing", "something")
    with pytest.raises(UserError, match="no file at --classes"):
        voc_segmentation(root, None, SPEC, 2, classes=str(tmp_path / "absent.txt"))


# ------------------------------------------------------------------------------------------- lists

LINES = {
    "with suffix": "{}.png",
    "with the folder": "JPEGImages/{}.png",
    "of a list of pairs": "/JPEGImages/{0}.png /SegmentationClass/{0}.png",
    "of a class": "{} -1",
    "of a class, present": "{}  1",
    "of Windows": "JPEGImages\\{}.png\r",
    "with a dot": "./{}",
}


NAMES = [("a", "b"), ("day/a", "night/a"), ("x.y", "x.z"), ("a b", "c d")]


@pytest.mark.parametrize(
    ("kind", "names"),  # columns and names with blanks cannot be told apart
    [(kind, names) for kind, line in LINES.items() for names in NAMES if " " not in line or " " not in names[0]],
)
def test_lines_of_lists(kind, names, tmp_path):
    make(tmp_path, names)
    write_list(tmp_path, "\n".join(LINES[kind].format(name) for name in names))
    voc = open_voc(str(tmp_path), "Segmentation")
    assert voc.names == list(names) and not voc.notes
    assert voc.images == [tmp_path / "JPEGImages" / f"{name}.png" for name in names]


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".png", ".webp", ".bmp", ".tif"])
def test_images_of_every_format(suffix, tmp_path):
    voc = open_voc(str(make(tmp_path, suffix=suffix)), "Segmentation")
    assert [file.name for file in voc.images] == [f"a{suffix}", f"b{suffix}"]


def test_an_image_named_twice_counts_once_and_one_of_two_files_is_not_guessed(tmp_path):
    make(tmp_path)
    write_list(tmp_path, "a\nb\na.png\n")
    voc = open_voc(str(tmp_path), "Segmentation")
    assert voc.names == ["a", "b"] and voc.notes == (
        "1 line(s) of val.txt name an image again; every image counts once",
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "JPEGImages/a.jpg")
    with pytest.raises(UserError, match=r"'a' is there as a.jpg and a.png .*; name it with its suffix in the list"):
        open_voc(str(tmp_path), "Segmentation")
    write_list(tmp_path, "a.png\na.jpg")
    assert [file.name for file in open_voc(str(tmp_path), "Segmentation").images] == ["a.png", "a.jpg"]


@pytest.mark.parametrize("flat", [True, False])
def test_annotations_lie_in_sub_folders_or_not(flat, tmp_path):
    make(tmp_path, ("day/a", "night/b"))
    files = [tmp_path / "SegmentationClass" / (name[-1] if flat else name) for name in ("day/a", "night/b")]
    files = [file.with_name(f"{file.name}.png") for file in files]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert open_voc(str(tmp_path), "Segmentation").annotations("SegmentationClass", ".png") == files


# ------------------------------------------------------------------------------------- annotations

LABELS = {"cat": 1}


def entry(box, name="cat", difficult=0):
    sides = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"


def xml(*objects, size=(200, 100)):
    stated = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"<annotation>{stated}{''.join(objects)}</annotation>"


@pytest.fixture
def detection(tmp_path):
    """A VOC folder of three pictures, 200x100, each with one box."""
    make(tmp_path, ("a", "b", "c"), "Main")
    for name in "abc":
        Image.new("RGB", (200, 100)).save(tmp_path / f"JPEGImages/{name}.png")
        (tmp_path / f"Annotations/{name}.xml").write_text(xml(entry((11, 11, 111, 61))))
    (tmp_path / "labels.txt").write_text("cat")
    return tmp_path


def opened(root, **options):
    skip = options.get("skip_bad", False)
    return voc_detection(open_voc(str(root), "Main", skip_bad=skip), SPEC, 2, **options)[0]


BOXES = {
    "counted from 0": ((0, 0, 199, 99), [0, 0, 198 / 200, 98 / 100], "1 box(es) reached a pixel outside their image"),
    "a pixel over": ((1, 1, 201, 101), [0, 0, 199 / 200, 99 / 100], "1 box(es) reached a pixel outside their image"),
    "a pixel under": ((-1, 11, 101, 51), [0, 0.1, 0.5, 0.5], "1 box(es) reached a pixel outside their image"),
    "the whole image": ((1, 1, 200, 100), [0, 0, 199 / 200, 99 / 100], ""),
    "swapped": ((101, 51, 1, 11), [0, 0.1, 0.5, 0.5], "1 box(es) had swapped corners"),
    "swapped in x": ((101, 11, 1, 51), [0, 0.1, 0.5, 0.5], "1 box(es) had swapped corners"),
    "fractions": ((1.5, 11, 101, 51.0), [0.5 / 200, 0.1, 0.5, 0.5], ""),
}


@pytest.mark.parametrize("kind", BOXES)
def test_small_mistakes_of_boxes_are_put_right_and_counted(kind, detection):
    box, expected, said = BOXES[kind]
    (detection / "Annotations/b.xml").write_text(xml(entry(box)))
    samples = opened(detection)
    torch.testing.assert_close(samples[1][1].boxes, torch.tensor([expected], dtype=torch.float32))
    assert said in " ".join(samples.notes) and bool(said) == bool(samples.notes)


@pytest.mark.parametrize("size", [(0, 0), ("", ""), ("x", 100), None, (200, 0), (-1, -1)])
def test_a_size_that_is_not_stated_is_the_pictures(size, detection):
    (detection / "Annotations/b.xml").write_text(xml(entry((11, 11, 111, 61)), size=size))
    assert opened(detection)[1][1].boxes.equal(opened(detection)[0][1].boxes)


BAD = {
    "no XML": "<annotation><size>",
    "empty": "",
    "no box": xml("<object><name>cat</name></object>"),
    "no number": xml(entry((1, "x", 5, 9))),
    "empty box": xml(entry((5, 5, 5, 9))),
    "far outside": xml(entry((5, 5, 500, 9))),
    "unknown encoding": '<?xml version="1.0" encoding="no-such"?><annotation/>',
    "another size": xml(entry((1, 1, 5, 9)), size=(100, 200)),
    "entities that multiply": "<!DOCTYPE a [<!ENTITY a0 'xxxxxxxxxx'>"
    + "".join(f"<!ENTITY a{i + 1} '{f'&a{i};' * 10}'>" for i in range(12))
    + "]><annotation>&a12;</annotation>",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_annotations_are_refused_in_a_line_or_skipped(kind, detection):
    (detection / "Annotations/b.xml").write_text(BAD[kind])
    if kind != "another size":
        with pytest.raises(UserError, match=r"b\.xml.*; mend it, or pass --skip_bad_images") as error:
            opened(detection)
        assert str(error.value).isprintable()
    samples = opened(detection, skip_bad=True)
    assert isinstance(samples[1], BadSample) and samples[1].reason.isprintable()
    assert len(samples[0][1].labels) == len(samples[2][1].labels) == 1


@pytest.mark.parametrize("missing", ["Annotations/b.xml", "JPEGImages/b.png"])
def test_missing_files_are_refused_or_skipped(missing, detection):
    (detection / missing).unlink()
    with pytest.raises(UserError, match="mend it, or pass --skip_bad_images"):
        opened(detection)
    samples = opened(detection, skip_bad=True)
    assert isinstance(samples[1], BadSample) and len(samples) == 3


def test_a_line_with_a_whole_path_that_is_not_there_is_skipped(detection):
    write_list(detection, "a\n/no/such/place/b.jpg 1\nc", "Main")
    samples = opened(detection, skip_bad=True)
    assert [isinstance(samples[i], BadSample) for i in range(3)] == [False, True, False]


def test_an_unknown_class_is_no_bad_image(detection):
    (detection / "Annotations/b.xml").write_text(xml(entry((1, 1, 5, 9), name="dog")))
    with pytest.raises(UserError, match=re.escape("object 1 (dog): unknown class; the classes are cat (labels.txt")):
        opened(detection, skip_bad=True)


# -------------------------------------------------------------------- the development kit's pixels


def kits_overlap(one, other):
    """Intersection over union of boxes of whole pixels, corners included, as VOC's development kit has it."""
    width = min(one[2], other[2]) - max(one[0], other[0]) + 1
    height = min(one[3], other[3]) - max(one[1], other[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


@pytest.mark.parametrize("inclusive", [True, False])
def test_boxes_are_matched_with_or_without_the_pixels_of_their_far_edges(inclusive, tmp_path):
    generator = np.random.default_rng(0)
    differ = 0
    for _ in range(200):
        x, y = generator.integers(1, 50, 2)
        width, height, dx, dy = generator.integers(1, 6, 4)
        truth, found = (
            (x, y, x + width, y + height),
            (x + dx // 2, y + dy // 2, x + dx // 2 + width, y + dy // 2 + height),
        )
        (tmp_path / "a.xml").write_text(xml(entry(truth)))
        objects = read_annotation(tmp_path / "a.xml", LABELS, pixel_inclusive=inclusive).objects
        box = (torch.tensor(found, dtype=torch.float) - 1) / torch.tensor([200, 100, 200, 100])
        hits, _ = match(Detections(box[None], torch.tensor([1]), torch.tensor([0.9])), objects, 0.45)
        kit = kits_overlap(truth, found) > 0.45
        differ += bool(hits[0]) != kit
        if inclusive:
            assert bool(hits[0]) == kit
    assert inclusive or differ > 5


def test_the_flag_for_the_kits_pixels_reaches_the_score(detection):
    for name in "abc":
        (detection / f"Annotations/{name}.xml").write_text(xml(entry((11, 11, 14, 14))))
    found = Detections(
        torch.tensor([[11.0, 11, 14, 14]]).sub(1).div(torch.tensor([200, 100, 200, 100])),
        torch.tensor([1]),
        torch.tensor([0.9]),
    )
    shifted = Detections(found.boxes + torch.tensor([1 / 200, 0, 1 / 200, 0]), found.labels, found.scores)
    scores = {}
    for inclusive in (False, True):
        metric = MeanAveragePrecision(LABELS, BoxCoder(torch.empty(0, 4)))
        samples = opened(detection, pixel_inclusive=inclusive)
        for i, detections in enumerate((found, found, shifted)):
            metric.add(detections, samples[i][1])
        scores[inclusive] = metric.compute()["map_voc12"]
    assert scores[False] == pytest.approx(200 / 3), "an overlap of 6 of 12 is no more than a half"
    assert scores[True] == pytest.approx(100), "12 of 20 is"
