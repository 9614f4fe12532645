"""The demo: the same seed draws the same scenes, the formats agree, and damage is noticed."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import demo
from demo import render, weights
from demo.scenes import CLASSES, VOID, draw_scene
from demo.training import __main__ as training
from demo.training import data, tasks
from modeling import build_model
from modeling.classification import build_classifier
from modeling.detection import build_detector
from modeling.segmentation import build_segmenter
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in render.KINDS:
        monkeypatch.setitem(render.KINDS, kind, replace(render.KINDS[kind], images=10))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---- scenes


def test_a_seed_draws_the_same_scene_and_another_seed_another():
    one, again, other = (render.scene("voc", seed, 3) for seed in (1, 1, 2))
    assert one.image.tobytes() == again.image.tobytes()
    assert one.owner.tobytes() == again.owner.tobytes()
    assert (one.classes, one.shown) == (again.classes, again.shown)
    assert one.image.tobytes() != other.image.tobytes()


def test_training_and_evaluation_share_no_scene():
    training, evaluation = (
        render.scene("classification", seed, 0).image for seed in (render.TRAINING_SEED, render.EVALUATION_SEED)
    )
    assert np.abs(training.astype(int) - evaluation).mean() > 5


def test_every_class_is_as_frequent():
    assert Counter(render.scene("classification", 0, index).classes[0] for index in range(10)) == dict.fromkeys(
        range(10), 1
    )
    several = Counter(index for number in range(30) for index in render.scene("voc", 5, number).classes)
    assert set(several) == set(range(10))
    assert max(several.values()) < 3 * min(several.values())


@pytest.mark.parametrize("index", range(10))
def test_every_shape_is_seen_and_of_the_size_asked_for(index: int):
    scene = draw_scene((7, index), (64, 80), (index,), (0.3, 0.3), clutter=0)
    assert scene.shown[0] > 0.75
    x1, y1, x2, y2 = scene.boxes()[1]
    assert 10 < x2 - x1 <= 0.6 * 64 + 1
    assert 10 < y2 - y1 <= 0.6 * 64 + 1


def test_an_object_stands_out_from_the_ground():
    scene = draw_scene((3,), (64, 64), (4,), (0.3, 0.3), clutter=0)
    on, off = scene.image[scene.owner == 1].astype(float), scene.image[scene.owner == 0].astype(float)
    assert np.abs(on.mean(axis=0) - off.mean(axis=0)).max() > 5


@pytest.mark.parametrize("number", range(8))
def test_boxes_bound_the_mask(number: int):
    scene = render.scene("voc", 11, number)
    mask = scene.mask()
    assert set(np.unique(mask)) <= {0, VOID, *(1 + index for index in scene.classes)}
    for item, (x1, y1, x2, y2) in scene.boxes().items():
        seen = scene.owner == item
        assert seen[y1 : y2 + 1, x1 : x2 + 1].sum() == seen.sum()
        assert seen[y1].any() and seen[y2].any() and seen[:, x1].any() and seen[:, x2].any()
        labels = mask[seen & (mask != VOID)]
        assert (labels == 1 + scene.classes[item - 1]).all()


def test_void_lies_along_every_outline_and_nowhere_else():
    scene = draw_scene((5,), (64, 64), (0,), (0.3, 0.3), clutter=0)
    mask, inside = scene.mask(), scene.owner == 1
    assert not (mask[:, 1:][inside[:, 1:] != inside[:, :-1]] != VOID).any()
    assert (mask == VOID).sum() < 0.4 * inside.sum()


# ---- formats and cache


def test_image_folder_holds_its_classes(few_scenes: None, tmp_path: Path):
    folder = render.rendered("classification", str(tmp_path))
    assert sorted(path.name for path in (folder / "val").iterdir()) == sorted(CLASSES)
    assert all(len(list((folder / "val" / name).iterdir())) == 1 for name in CLASSES)


def test_voc_folder_agrees_with_itself(few_scenes: None, tmp_path: Path):
    folder = render.rendered("voc", str(tmp_path))
    names = (folder / "ImageSets/Main/val.txt").read_text().split()
    assert names == (folder / "ImageSets/Segmentation/val.txt").read_text().split()
    assert len(names) == 10
    labels = (folder / "labels.txt").read_text().strip().split(",")
    for name in names:
        mask = Image.open(folder / f"SegmentationClass/{name}.png")
        assert mask.mode == "P"
        mask = np.asarray(mask)
        picture = Image.open(folder / f"JPEGImages/{name}.jpg")
        assert picture.size == mask.shape[::-1]
        objects = ElementTree.parse(folder / f"Annotations/{name}.xml").findall("object")
        assert objects
        for item in objects:
            x1, y1, x2, y2 = (int(item.findtext(f"bndbox/{tag}")) for tag in ("xmin", "ymin", "xmax", "ymax"))
            assert 1 <= x1 <= x2 <= mask.shape[1] and 1 <= y1 <= y2 <= mask.shape[0]
            area = mask[y1 - 1 : y2, x1 - 1 : x2]
            label = 1 + labels.index(item.findtext("name"))
            assert (area == label).any() or (area == VOID).mean() > 0.5  # a sliver is all outline


def test_rendering_twice_gives_the_same_bytes(few_scenes: None, tmp_path: Path):
    for kind in render.KINDS:
        one, other = (files_of(render.rendered(kind, str(tmp_path / name))) for name in ("one", "other"))
        assert one == other


def test_a_whole_cache_is_kept(few_scenes: None, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = render.rendered("classification", str(tmp_path))
    written = {file: file.stat().st_mtime_ns for file in folder.rglob("*.jpg")}
    capsys.readouterr()
    assert render.rendered("classification", str(tmp_path)) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.jpg")} == written
    assert capsys.readouterr().err == ""
    assert [path.name for path in folder.parent.iterdir()] == ["classification"]


def break_image(folder: Path) -> None:
    next(folder.rglob("*.jpg")).write_bytes(b"")


def lose_image(folder: Path) -> None:
    next(folder.rglob("*.jpg")).unlink()


def add_image(folder: Path) -> None:
    (folder / "val" / CLASSES[0] / "x.jpg").write_bytes(b"x")


def garble_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1]")


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def age(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": "old"}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (break_image, "damaged"),
        (lose_image, "damaged"),
        (add_image, "damaged"),
        (garble_manifest, "manifest"),
        (lose_manifest, "manifest"),
        (age, "outdated"),
    ],
)
def test_a_damaged_cache_is_rendered_anew_and_said(
    damage, said: str, few_scenes: None, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = render.rendered("classification", str(tmp_path))
    whole = files_of(folder)
    damage(folder)
    capsys.readouterr()
    render.rendered("classification", str(tmp_path))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("demo:")]
    assert len(lines) == 1 and said in lines[0]
    assert files_of(folder) == whole


def test_files_of_others_are_left_alone(few_scenes: None, tmp_path: Path):
    mine = tmp_path / "demo" / "classification" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        render.rendered("classification", str(tmp_path))
    assert mine.read_text() == "mine"


def test_an_interrupted_rendering_leaves_nothing(few_scenes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(folder: Path, drawn: object) -> None:
        (folder / "val").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setitem(render.WRITERS, "classification", interrupt)
    with pytest.raises(KeyboardInterrupt):
        render.rendered("classification", str(tmp_path))
    assert not list((tmp_path / "demo").iterdir())


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="DFQ_CACHE") as caught:
        render.rendered("classification", str(tmp_path / "file"))
    assert "\n" not in str(caught.value)


def test_the_cache_moves_with_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("DFQ_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert render.cache_folder() == tmp_path / "dfq"
    monkeypatch.setenv("DFQ_CACHE", str(tmp_path / "own"))
    assert render.cache_folder() == tmp_path / "own"
    assert render.cache_folder(str(tmp_path / "argument")) == tmp_path / "argument"


# ---- weights


BUILDERS = {"classification": build_classifier, "segmentation": build_segmenter, "detection": build_detector}


@pytest.mark.parametrize("task", BUILDERS)
def test_the_demo_opens(task: str, few_scenes: None, tmp_path: Path):
    flags = demo.open(task, str(tmp_path)).flags
    assert os.path.getsize(flags["weights"]) <= 4_000_000
    assert Path(flags["data"]).is_dir()
    network = build_model(flags["model"], flags["weights"], BUILDERS[task])
    (side,) = flags["image_size"]
    with torch.inference_mode():
        network.model(torch.zeros(1, 3, side, side))


def test_stored_weights_come_back_and_damaged_ones_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    monkeypatch.setattr(weights, "HASHES", tmp_path / "SHA256SUMS")
    model, log = torch.nn.BatchNorm2d(3), tmp_path / "log"
    log.write_text("{}\n")
    training.store("detection", model, log)
    training.store("classification", model, log)

    file = weights.checked("classification")
    tensors = torch.load(file, weights_only=True)
    assert tensors["weight"].dtype == torch.float16
    torch.testing.assert_close(tensors["weight"].float(), model.weight.detach())
    with file.open("ab") as damaged:
        damaged.write(b"x")
    with pytest.raises(UserError, match="damaged"):
        weights.checked("classification")
    file.unlink()
    with pytest.raises(UserError, match="not there"):
        weights.checked("classification")
    assert weights.checked("detection").name == "detection.pth"


# ---- training


def examples_of_masks() -> data.Examples:
    """Scenes whose images are their masks, so that what happens to one must happen to the other."""
    rows = [data._example("voc", 160, index) for index in range(3)]
    images, masks, classes, boxes = (np.stack(column) for column in zip(*rows, strict=True))
    return data.Examples(np.repeat(masks[..., None], images.shape[-1], axis=-1), masks, classes, boxes)


def pixels(images: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """[N, H, W] grey levels of normalised images."""
    return images[:, 0] * spec.std[0] * 255 + spec.mean[0] * 255


def test_a_mask_is_cropped_and_turned_as_its_image():
    images, masks = tasks.segmentation_batch(examples_of_masks(), np.arange(3), np.random.default_rng(0))
    torch.testing.assert_close(pixels(images, InputSpec()), masks.float(), atol=0.01, rtol=0)


def test_priors_are_given_the_mirrored_objects():
    examples = examples_of_masks()
    for seed in range(4):
        images, (labels, offsets) = tasks.detection_batch(examples, np.arange(3), np.random.default_rng(seed))
        grey, boxes = pixels(images, tasks.SSD_SPEC), tasks._coder().boxes(offsets)
        for image in range(3):
            for prior in (labels[image] > 0).nonzero().flatten():
                x1, y1, x2, y2 = (boxes[image, prior] * grey.shape[1]).round().int().clamp(0, grey.shape[1]).tolist()
                inside = grey[image, y1:y2, x1:x2].round() == labels[image, prior]
                assert inside.float().mean() > 0.1


@torch.enable_grad()
def test_a_training_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    task = tasks.TRAININGS["classification"]
    rows = [data._example("classification", demo.RESIZED, index) for index in range(8)]
    examples = data.Examples(*(np.stack(column) for column in zip(*rows, strict=True)))
    monkeypatch.setattr(training, "training_set", lambda *_: examples)
    schedule = replace(task.schedule, scenes=8, batch=4, epochs=2, warm_up=1)
    task = replace(task, schedule=schedule, score=lambda model: {})

    def stop(model: torch.nn.Module) -> dict[str, float]:
        if (tmp_path / "b" / "x.jsonl").exists():
            raise KeyboardInterrupt
        return {}

    device = torch.device("cpu")
    whole = training.train("x", task, 0, device, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        training.train("x", replace(task, score=stop), 0, device, tmp_path / "b")
    resumed = training.train("x", task, 0, device, tmp_path / "b")
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict())
