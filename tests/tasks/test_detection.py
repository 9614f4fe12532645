"""Detection: VOC annotations, evaluation, pictures and curves."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import randomise
from PIL import Image

from modeling import build_model
from modeling.detection import box_coder, build_detector
from modeling.ssd_lite import SSDLite
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.experiment.evaluation import evaluate
from utils.graph.capture import capture
from utils.tasks.data import Batches
from utils.tasks.detection import class_labels, read_annotation, stack, voc_detection
from utils.tasks.detection import draw as detection_pictures
from utils.tasks.metrics import MeanAveragePrecision
from utils.tasks.voc import open_voc

CPU = torch.device("cpu")
SPEC = InputSpec(size=(64, 64), resize=64)
LABELS = {"helmet": 1, "head": 2}
CLASSES = 3  # background included

EXTRAS = ((12, 24), (6, 16), (8, 16), (4, 8))


def annotation(*objects: str, size: str = "<size><width>200</width><height>100</height></size>") -> str:
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def entry(name: str = "helmet", box: tuple = (1, 1, 101, 51), difficult: int = 0) -> str:
    corners = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


@pytest.fixture
def voc(tmp_path) -> Path:
    """A VOC folder of four pictures, 200x100, with an annotation each."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    names = [f"{i:06d}" for i in range(4)]
    for i, name in enumerate(names):
        Image.new("RGB", (200, 100), (60 * i, 80, 200)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        (tmp_path / "Annotations" / f"{name}.xml").write_text(
            annotation(entry(), entry("head", (11, 11, 41, 91), i % 2))
        )
    (tmp_path / "ImageSets/Main/val.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "labels.txt").write_text("helmet,head")
    return tmp_path


def open_samples(folder: Path, outputs: int = CLASSES):
    return voc_detection(open_voc(str(folder), "Main"), SPEC, outputs)


def test_images_are_squeezed_and_boxes_are_fractions(voc):
    samples, labels = open_samples(voc)
    assert labels == LABELS
    image, objects = samples[1]
    assert image.shape == (3, 64, 64)
    torch.testing.assert_close(
        image * torch.tensor(SPEC.std)[:, None, None] + torch.tensor(SPEC.mean)[:, None, None],
        image.new_tensor([60, 80, 200])[:, None, None].expand(3, 64, 64) / 255,
        atol=0.01,
        rtol=0,
    )
    torch.testing.assert_close(
        objects.boxes, torch.tensor([[0, 0, 0.5, 0.5], [0.05, 0.1, 0.2, 0.9]])
    )  # VOC counts from 1
    assert objects.labels.tolist() == [1, 2]
    assert objects.difficult.tolist() == [False, True]


def test_an_image_without_objects_is_one(voc):
    (voc / "Annotations/000002.xml").write_text(annotation())
    samples, _ = open_samples(voc)
    images, objects = stack([samples[1], samples[2]])
    assert images.shape == (2, 3, 64, 64)
    assert [len(image.labels) for image in objects] == [2, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><size>", "'.*000001.xml' is no valid XML: "),
        ("", "is no valid XML: "),
        (annotation(entry(), entry("hat")), r"object 2 \(hat\): unknown class; the classes are helmet, head"),
        (annotation("<object><bndbox/></object>"), r"object 1 \(without a name\): unknown class"),
        (annotation("<object><name>head</name></object>"), r"object 1 \(head\): no <bndbox> with numbers"),
        (annotation(entry(box=(1, 1, "nan", 9))), "no <bndbox> with numbers"),
        (annotation(entry(box=(51, 1, 51, 51))), r"object 1 \(helmet\): box 51, 1, 51, 51 .* is empty"),
        (annotation(entry(box=(201, 1, 201, 51))), "is empty"),
        (annotation(entry(box=(1, 1, 300, 51))), "reaches outside the image of 200x100"),
        (annotation(entry(box=(-5, 1, 100, 51))), "reaches outside the image"),
    ],
)
def test_a_bad_annotation_is_named(voc, text, message):
    (voc / "Annotations/000001.xml").write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        open_samples(voc)
    assert "000001.xml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_box_at_the_border_is_no_mistake_whatever_pixels_are_counted_from(tmp_path):
    file = tmp_path / "edge.xml"
    for box in ((0, 0, 199, 99), (1, 1, 200, 100), (0, 0, 200, 100)):
        file.write_text(annotation(entry(box=box)))
        read = read_annotation(file, LABELS)
        assert read.size == (200, 100)
        assert len(read.objects.labels) == 1


def test_what_else_is_missing_is_named(voc):
    with pytest.raises(UserError, match="network has 21 outputs, background included, but the data have 2 classes"):
        open_samples(voc, 21)
    (voc / "JPEGImages/000003.jpg").unlink()
    with pytest.raises(UserError, match="'000003'"):
        open_samples(voc)
    (voc / "ImageSets/Main/val.txt").write_text("\n")
    with pytest.raises(UserError, match="split 'val' is empty"):
        open_samples(voc)
    (voc / "ImageSets/Main/val.txt").write_text("000000\n")
    (voc / "Annotations/000000.xml").write_text(annotation(entry(difficult=1)))
    with pytest.raises(UserError, match=r"split 'val' of .* holds no object that counts"):
        open_samples(voc)
    (voc / "Annotations/000000.xml").unlink()
    with pytest.raises(UserError, match=r"000000\.xml"):
        open_samples(voc)


def test_a_picture_of_another_size_than_its_annotation_says_is_not_scored(voc):
    Image.new("RGB", (100, 200)).save(voc / "JPEGImages/000001.jpg")
    samples, labels = open_samples(voc)
    model = randomise(small_detector_of(CLASSES))
    metric = MeanAveragePrecision(labels, model.coder(SPEC.size))
    with pytest.raises(UserError, match=r"000001\.jpg \(it is 100x200, its annotation says 200x100"):
        evaluate({"fp32": model}, Batches(samples, 2, 0, 0, stack), {"fp32": metric}, CPU)


def test_outputs_of_a_network_trained_on_coco_are_found_by_name():
    assert class_labels(("person", "sofa", "tvmonitor"), 91) == {"person": 1, "sofa": 63, "tvmonitor": 72}
    with pytest.raises(UserError, match="does not know helmet"):
        class_labels(("person", "helmet"), 91)
    assert class_labels(("BACKGROUND", "helmet", "head"), 3) == LABELS


# ----------------------------------------------------------------------------------- the whole way


def small_detector_of(classes: int) -> SSDLite:
    return SSDLite(classes, width=0.25, extras=EXTRAS)


def test_evaluation_pictures_and_curves(voc, tmp_path):
    samples, labels = open_samples(voc)
    model = randomise(small_detector_of(CLASSES))
    coder = replace(model.coder(SPEC.size), score_thresh=0.3)
    networks = {"FP32": model, "INT8": capture(model, SPEC)}
    metrics = {"FP32": MeanAveragePrecision(labels, coder)}
    metrics["INT8"] = MeanAveragePrecision(labels, coder, reference=metrics["FP32"])
    evaluate(networks, Batches(samples, 3, 0, 0, stack), metrics, CPU)
    assert len(metrics["INT8"].records) == 4
    scores = metrics["INT8"].compute()
    assert next(iter(scores)) == "map_voc12"
    assert scores["score_shift_p99"] == pytest.approx(0, abs=1e-3)

    folder = tmp_path / "report"
    folder.mkdir()
    files = detection_pictures(folder, networks, metrics, CPU, samples, coder, labels, SPEC, count=2)
    assert [file.name for file in files] == ["1_000000.png", "2_000002.png", "precision_recall.csv"]
    with Image.open(files[0]) as sheet:
        assert sheet.width > 3 * 64
        assert len(sheet.getcolors(10**6)) > 2
    with files[2].open() as text:
        rows = list(csv.DictReader(text))
    assert {row["network"] for row in rows} <= {"FP32", "INT8"}
    assert len(rows) == sum(len(curve.scores) for metric in metrics.values() for curve in metric.curves().values())


def test_the_helmet_network_scores_as_with_the_code_that_trained_it(shared):
    network = build_model("ssd_lite_mobilenet_v2", str(shared / "weights/mb2-ssd-lite-helmet.pth"), build_detector)
    samples, labels = voc_detection(open_voc(str(shared / "data/helmet-voc"), "Main", "test"), network.spec, CLASSES)
    metric = MeanAveragePrecision(labels, box_coder(network.model, network.spec), "voc07")
    # This network multiplies rounding by 100,000 in two layers, and kernels round by batch size and threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    evaluate({"fp32": network.model}, Batches(samples, 8, 0, 0, stack), {"fp32": metric}, CPU)
    torch.set_num_threads(threads)
    scores = metric.compute()
    assert (scores["map_voc07"], scores["map_voc12"]) == pytest.approx((14.5, 14.8), abs=1.0)
    assert tuple(metric.per_class().values()) == pytest.approx((16.7, 12.3), abs=1.5)


def test_a_class_named_twice_is_refused(voc):
    (voc / "labels.txt").write_text("helmet,helmet")
    with pytest.raises(UserError, match="names 'helmet' 2 times; every class must have a name of its own"):
        open_voc(str(voc), "Main")
