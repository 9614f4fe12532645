"""Folders of images as people have them: every folder gets the output that it means, and the run says by which rule."""

import pytest
from PIL import Image

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.tasks.data import image_folder

SPEC = InputSpec(size=(8, 8), resize=8)
WORDNET = ["n01440764", "n01443537", "n02102040"]  # ImageNet's 0, 1 and 217


def make(root, *names, images=1):
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(images):
            Image.new("RGB", (9, 9)).save(root / name / f"{i}.png")
    return str(root)


def labels(root, outputs, split="val", classes=None):
    """The output of each folder by name, as samples have it, and the notes."""
    samples, names = image_folder(root, split, SPEC, outputs, classes)
    found = {}
    for i, path in enumerate(samples.paths):
        found[path.split("/")[-2]] = samples[i][1]
    assert {label: folder for folder, label in found.items()}.items() <= names.items()
    return found, " ".join(samples.notes)


NUMBERS = {
    "0 to 11": ([str(i) for i in range(12)], 12, lambda name: int(name), "counted from 0"),
    "0 to 999": ([str(i) for i in range(1000)], 1000, lambda name: int(name), "counted from 0"),
    "with zeros in front": ([f"{i:03}" for i in range(12)], 12, lambda name: int(name), "counted from 0"),
    "some of them": (["2", "10", "7"], 12, lambda name: int(name), "counted from 0"),
    "some of 1,000": (["20", "100", "3"], 1000, lambda name: int(name), "counted from 0"),
    "1 to 12": ([str(i + 1) for i in range(12)], 12, lambda name: int(name) - 1, "counted from 1"),
    "any, in order": (["30", "200", "4"], 3, ["4", "30", "200"].index, "in the order of their numbers"),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_count_as_numbers(kind, tmp_path):
    names, outputs, expected, said = NUMBERS[kind]
    found, notes = labels(make(tmp_path, *names), outputs)
    assert found == {name: expected(name) for name in names}
    assert notes.startswith("labels: ") and said in notes


@pytest.mark.parametrize(
    ("names", "outputs", "message"),
    [
        (["1", "01"], 2, "the same number"),
        (["0", "12"], 12, "2 class folders numbered up to 12.*--classes FILE"),
        (["0", "1", "x"], 12, "has 3 class folders .*--classes FILE"),
    ],
)
def test_numbers_that_cannot_be_outputs_are_refused(names, outputs, message, tmp_path):
    with pytest.raises(UserError, match=message):
        labels(make(tmp_path, *names), outputs)


def test_other_names_say_by_which_rule(tmp_path):
    assert labels(make(tmp_path / "a", "cat", "ant"), 2) == (
        {"ant": 0, "cat": 1},
        "labels: folder names in alphabetical order",
    )
    found, notes = labels(make(tmp_path / "b", *WORDNET), 1000)
    assert found == dict(zip(WORDNET, (0, 1, 217), strict=True)) and notes == "labels: ImageNet's WordNet ids"
    assert labels(make(tmp_path / "c", *WORDNET), 3)[0] == dict(zip(WORDNET, range(3), strict=True))


LISTS = {
    "lines": "dog\ncat\nant\n",
    "lines of Windows": "\ufeffdog\r\ncat\r\nant\r\n\r\n",
    "commas": "dog, cat, ant",
    "numbers in front": "0 dog\n2: ant\n1, cat",
    "numbers behind": "ant 2\ncat 1\ndog 0\n",
    "first words": "dog domestic, barks\ncat\nant (insect)\n",
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_classes_settles_the_order(kind, tmp_path):
    root = make(tmp_path / "data", "ant", "cat", "dog")
    (tmp_path / "list.txt").write_text(LISTS[kind], encoding="utf-8", newline="")
    found, notes = labels(root, 3, classes=str(tmp_path / "list.txt"))
    assert found == {"dog": 0, "cat": 1, "ant": 2}
    assert notes == "labels: in the order of list.txt"


@pytest.mark.parametrize("name", ["classes.txt", "labels.txt"])
@pytest.mark.parametrize("place", ["", "val/", "beside"])
def test_a_list_beside_the_data_is_used(name, place, tmp_path):
    make(tmp_path / "val", "10", "9")
    (tmp_path / ("" if place == "beside" else place) / name).write_text("10\n9\nother")
    root = tmp_path / "val" if place == "beside" else tmp_path
    assert labels(str(root), 3) == ({"10": 0, "9": 1}, f"labels: in the order of {name}")


def test_the_list_that_is_passed_comes_before_one_beside_the_data(tmp_path):
    root = make(tmp_path / "data", "a", "b")
    (tmp_path / "data/classes.txt").write_text("a\nb")
    (tmp_path / "other.txt").write_text("b\na")
    assert labels(root, 2)[0] == {"a": 0, "b": 1}
    assert labels(root, 2, classes=str(tmp_path / "other.txt"))[0] == {"a": 1, "b": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nc", "class folder 'b' of .* is not named in .*list.txt"),
        ("a\nb\nc", "names 3 classes, but the network has 2 outputs"),
        (" \n", "names no class"),
        (None, "no file at --classes"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(content, message, tmp_path):
    root, file = make(tmp_path / "data", "a", "b"), tmp_path / "list.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        labels(root, 2, classes=str(file))


# --------------------------------------------------------------------------- splits, hidden folders


@pytest.mark.parametrize("there", [("train", "test"), ("Train", "Test"), ("training", "validation"), ("dev", "eval")])
def test_splits_are_never_two_classes(there, tmp_path):
    for split in there:
        make(tmp_path / split, "a", "b")
    message = rf"no split 'val' in .*; pass --split with one that is there: {', '.join(sorted(there))}"
    with pytest.raises(UserError, match=message):
        labels(str(tmp_path), 2)
    assert labels(str(tmp_path), 2, split=there[1])[0] == {"a": 0, "b": 1}
    assert labels(str(tmp_path / there[0]), 2)[0] == {"a": 0, "b": 1}


def test_a_split_is_found_whatever_its_case_and_one_that_is_not_there_is_refused(tmp_path):
    make(tmp_path / "Val", "a", "b", images=3)
    assert len(image_folder(str(tmp_path), "val", SPEC, 2)[0]) == 6
    with pytest.raises(UserError, match=r"no split 'test' in .*; pass --split with one that is there: Val"):
        labels(str(tmp_path), 2, split="test")
    with pytest.raises(UserError, match=r"no split 'test' in .*leave out --split"):
        labels(make(tmp_path / "plain", "a", "b"), 2, split="test")


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir", "train"])
def test_what_is_no_class_is_left_out_and_named(name, tmp_path):
    found, notes = labels(make(tmp_path, "a", "b", name), 2)
    assert found == {"a": 0, "b": 1}
    assert notes == f"labels: folder names in alphabetical order (skipped, as no class: {name})"
    with pytest.raises(UserError, match=rf"2 class folders .*\(skipped, as no class: {name}\)"):
        labels(str(tmp_path), 3)


def test_hidden_files_in_class_folders_are_no_images(tmp_path):
    root = make(tmp_path, "a", "b", "a/.ipynb_checkpoints", "b/more")
    (tmp_path / "a/._0.png").write_bytes(b"resource fork")
    (tmp_path / "a/Thumbs.db").write_bytes(b"")
    samples, _ = image_folder(root, "val", SPEC, 2)
    assert sorted(path.removeprefix(root) for path in samples.paths) == ["/a/0.png", "/b/0.png", "/b/more/0.png"]
    assert samples.notes[1] == "3 file(s) of the class folders are no images or hidden, and skipped"
