"""YOLO's raw heads: boxes from distributions of distances, class scores without a background, and ultralytics' networks."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from networks import randomise, settle
from PIL import Image
from torch import Tensor, nn

import main_det
from dfq import quantize_data_free
from modeling import build_model
from modeling.detection import box_coder, build_detector
from utils.backends.onnxruntime.export import export
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.experiment.evaluation import evaluate
from utils.quantization.recipe import Recipe
from utils.tasks.boxes import BoxCoder, Coder, box_convert
from utils.tasks.data import Batches
from utils.tasks.detection import TASK, class_labels, coder_as_data, coder_from, count_classes
from utils.tasks.distribution_focal import DistributionFocalCoder

SIZE, STRIDES, BINS = (32, 64), (8, 16), 4
SPEC = InputSpec(size=SIZE, resize=32, mean=(0.0,) * 3, std=(1.0,) * 3)
CODER = DistributionFocalCoder(strides=STRIDES, size=SIZE, reg_max=BINS)


class Head(nn.Module):
    """A stride's convolution with BatchNorm before its map of distances and classes."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(inputs, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU()
        self.boxes, self.classes = nn.Conv2d(8, 4 * BINS, 1), nn.Conv2d(8, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x)))
        return torch.cat([self.boxes(x), self.classes(x)], 1)


class TinyYolo(nn.Module):
    """A detector with YOLO's raw heads at strides 8 and 16, and its coder."""

    def __init__(self, classes: int = 2):
        super().__init__()
        widths = (3, 4, 8, 8, 8)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.SiLU())
            for a, b in pairwise(widths)
        )
        self.heads = nn.ModuleList(Head(8, classes) for _ in STRIDES)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return [head(x) for head, x in zip(self.heads, maps[2:], strict=True)]

    def coder(self, size: tuple[int, int]) -> Coder:
        return DistributionFocalCoder(strides=STRIDES, size=size, reg_max=BINS)


def tiny_yolo() -> nn.Module:
    return randomise(TinyYolo())


def maps(images: int = 2, classes: int = 3) -> list[Tensor]:
    return [torch.randn(images, 4 * BINS + classes, SIZE[0] // s, SIZE[1] // s) * 3 for s in STRIDES]


def decoded_by_hand(outputs: list[Tensor], image: int) -> list[tuple[list[float], list[float]]]:
    """Scores and box of each cell, with nothing but numbers."""
    found = []
    for cells, stride in zip(outputs, STRIDES, strict=True):
        for row in range(cells.shape[2]):
            for column in range(cells.shape[3]):
                values = cells[image, :, row, column].tolist()
                sides = []
                for side in range(4):
                    powers = [math.exp(value) for value in values[side * BINS : (side + 1) * BINS]]
                    sides.append(stride * sum(i * power for i, power in enumerate(powers)) / sum(powers))
                x, y = stride * (column + 0.5), stride * (row + 0.5)
                edges = (x - sides[0]) / 64, (y - sides[1]) / 32, (x + sides[2]) / 64, (y + sides[3]) / 32
                scores = [1 / (1 + math.exp(-value)) for value in values[4 * BINS :]]
                found.append((scores, [min(max(edge, 0.0), 1.0) for edge in edges]))
    return found


def test_maps_are_decoded_as_by_hand():
    outputs = maps()
    scores, boxes = CODER.decode(outputs)
    for image in range(2):
        by_hand = decoded_by_hand(outputs, image)
        torch.testing.assert_close(scores[image], torch.tensor([score for score, _ in by_hand]))
        torch.testing.assert_close(boxes[image], torch.tensor([box for _, box in by_hand]))


def test_one_bin_is_the_distance_itself():
    coder = replace(CODER, reg_max=1)
    cells = [torch.zeros(1, 6, SIZE[0] // s, SIZE[1] // s) for s in STRIDES]
    cells[0][0, :4, 2, 3] = torch.tensor([0.5, 1.0, 1.5, 0.25])  # its centre is at x 28, y 20
    box = coder.decode(cells)[1][0, 2 * 8 + 3]
    torch.testing.assert_close(box, torch.tensor([24 / 64, 12 / 32, 40 / 64, 22 / 32]))


def sure(places: dict[tuple[int, int, int], int], classes: int = 2) -> list[Tensor]:
    """Maps in which only the cells (map, row, column) show an object, of that class, two strides around their centre."""
    outputs = [torch.full((1, 4 * BINS + classes, SIZE[0] // s, SIZE[1] // s), -9.0) for s in STRIDES]
    for (level, row, column), label in places.items():
        outputs[level][0, 1 : 4 * BINS : BINS, row, column] = 30.0  # bin 1 of each side
        outputs[level][0, 4 * BINS + label, row, column] = 5.0
    return outputs


def test_detections_hold_the_first_class_which_is_no_background():
    found = replace(CODER, score_thresh=0.5).detect(sure({(0, 1, 1): 0, (1, 0, 2): 1}))[0]
    assert found.labels.tolist() == [0, 1]
    torch.testing.assert_close(found.scores, torch.full((2,), 5.0).sigmoid())
    expected = torch.tensor([[4 / 64, 4 / 32, 20 / 64, 20 / 32], [24 / 64, 0, 56 / 64, 24 / 32]])
    torch.testing.assert_close(found.boxes, expected, rtol=0, atol=1e-5)
    predicted = CODER.predictions(sure({(0, 1, 1): 0, (1, 0, 2): 1}))[0]
    assert predicted[8 + 1] == 0 and predicted[32 + 2] == 1 and (predicted >= 0).sum() == 2


def test_overlapping_boxes_of_a_class_are_one_unless_all_are_to_be_kept():
    outputs = sure({(0, 1, 1): 0})
    outputs[1][0, :, 0, 0] = outputs[0][0, :, 1, 1]  # 16 pixels around (8, 8): overlaps by less than 0.7
    outputs[0][0, :, 1, 2] = outputs[0][0, :, 1, 1]
    outputs[0][0, 0 : 4 * BINS : BINS, 1, 2], outputs[0][0, 2, 1, 2] = -9.0, 31.5  # reaches further to the left
    boxes = replace(CODER, score_thresh=0.5, nms_thresh=0.3).detect(outputs)[0].boxes
    every = replace(CODER, score_thresh=0.5, nms_thresh=1.0).detect(outputs)[0].boxes
    assert len(every) == 3 > len(boxes)


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda outputs: outputs[0], r"output \(2, 19, 4, 8\)"),
        (lambda outputs: outputs[::-1], r"output_0 \(2, 19, 2, 4\), output_1 \(2, 19, 4, 8\)"),
        (lambda outputs: [one[:, : 4 * BINS] for one in outputs], r"output_0 \(2, 16, 4, 8\)"),
        (lambda outputs: {"maps": outputs}, r"maps.output_0 \(2, 19, 4, 8\)"),
    ],
)
def test_other_outputs_are_one_line(spoil, found):
    class Spoilt(nn.Module):
        def forward(self, images: Tensor):
            return spoil(maps())

    wanted = r"must return a list of 2 maps \[N, 16 \+ classes, height, width\] of 4x8, 2x4 cells"
    with pytest.raises(UserError, match=f"returns {found}.*{wanted}"):
        count_classes(Spoilt(), SPEC, CODER)


def test_labels_start_at_0_and_cocos_have_no_gaps():
    assert class_labels(("helmet", "head"), 2, background=False) == {"helmet": 0, "head": 1}
    assert class_labels(("person", "sofa", "tvmonitor"), 80, background=False) == {
        "person": 0,
        "sofa": 57,
        "tvmonitor": 62,
    }
    with pytest.raises(UserError, match="has 3 outputs but the data have 2 classes"):
        class_labels(("helmet", "head"), 3, background=False)


@pytest.mark.parametrize("coder", [CODER, BoxCoder(torch.rand(5, 4), score_thresh=0.2, clip=True)])
def test_a_coder_survives_as_plain_data(coder):
    content = coder_as_data(coder)
    assert coder_from(content) == coder and type(coder_from(content)) is type(coder)
    del content["kind"]
    if isinstance(coder, BoxCoder):  # as files had it while it was the only one
        assert coder_from(content) == coder


# ------------------------------------------------------------------------- through the script


BOX = "<object><name>{}</name><bndbox><xmin>9</xmin><ymin>5</ymin><xmax>40</xmax><ymax>24</ymax></bndbox></object>"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Four noisy images with an object each, of two classes."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for i in range(4):
        noise = (torch.rand(32, 64, 3) * 255).to(torch.uint8).numpy()
        Image.fromarray(noise).save(tmp_path / "JPEGImages" / f"{i}.jpg")
        size = "<size><width>64</width><height>32</height></size>"
        text = f"<annotation>{size}{BOX.format(('near', 'far')[i % 2])}</annotation>"
        (tmp_path / "Annotations" / f"{i}.xml").write_text(text)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("0\n1\n2\n3\n")
    (tmp_path / "labels.txt").write_text("near\nfar\n")
    return tmp_path


class Knowing(nn.Module):
    """Shows the object's box as class 0 in every image, ever less surely."""

    def __init__(self):
        super().__init__()
        self.images = 0

    def forward(self, images: Tensor) -> list[Tensor]:
        made = []
        for _ in images:
            outputs = sure({(1, 0, 1): 0})  # centre (24, 8), one stride of 16 to each side
            outputs[1][0, BINS : BINS + 2, 0, 1] = torch.tensor([math.log(3.0), 0.0])  # a quarter of it to the top
            outputs[1][0, 4 * BINS, 0, 1] -= 0.1 * self.images
            self.images += 1
            made.append(outputs)
        return [torch.cat(level) for level in zip(*made, strict=True)]


def test_the_data_path_gives_the_map_that_is_known(voc):
    args = main_det.parse_args(["--data", str(voc), "--quantize"])
    data = TASK.open_data(args, SPEC, 2, {"coder": coder_as_data(replace(CODER, score_thresh=0.5))})
    assert data.names == {0: "near", 1: "far"}
    metric = data.metric(None)
    evaluate({"it": Knowing()}, Batches(data.samples, 3, 0, 0, data.collate), {"it": metric}, torch.device("cpu"))
    # "near" is found in images 0 and 2 of 0 to 3: right, wrong, right, wrong; "far" never
    assert metric.per_class("voc12") == pytest.approx({"near": 100 * (0.5 + 0.5 * 2 / 3), "far": 0})
    assert metric.compute()["map_voc12"] == pytest.approx(50 * (0.5 + 0.5 * 2 / 3))


def test_a_network_with_yolos_heads_is_scored_saved_and_loaded(voc, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(voc), "--results", str(tmp_path / "lines.jsonl")]
    passes = ["--quantize", "--equalize", "--correction", "--engine", "onnxruntime", "--image_size", "32", "64"]
    main_det.main(["--model", f"{__name__}:tiny_yolo", *passes, "--save", "tiny.pt", *data])
    table = capsys.readouterr().out.partition("4 images ")[2]
    assert "engine and simulation predict the same for 100.00 % of 160" in table
    main_det.main(["--load", "tiny.pt", *data])
    shifts = [text.partition("in percent: ")[2].splitlines()[0] for text in (table, capsys.readouterr().out)]
    assert shifts[0].startswith("score_shift_mean") and shifts[0] == shifts[1]


class OwnCoder(DistributionFocalCoder):
    """A user's own kind of coder."""


def test_a_users_own_coder_decodes_but_cannot_be_saved(voc, tmp_path, monkeypatch):
    monkeypatch.setattr(TinyYolo, "coder", lambda self, size: OwnCoder(strides=STRIDES, size=size, reg_max=BINS))
    words = ["--model", f"{__name__}:tiny_yolo", "--data", str(voc), "--image_size", "32", "64", "--quantize"]
    words += ["--results", str(tmp_path / "lines.jsonl")]
    main_det.main(words)
    with pytest.raises(UserError, match="--save cannot write OwnCoder"):
        main_det.main([*words, "--save", str(tmp_path / "tiny.pt")])
    assert not (tmp_path / "tiny.pt").exists()


# ------------------------------------------------------------------------- ultralytics itself


@pytest.fixture(scope="module")
def ultralytics_network(tmp_path_factory) -> tuple[nn.Module, str]:
    """YOLOv8n with random weights for two classes, and its state dict in a file."""
    tasks = pytest.importorskip("ultralytics.nn.tasks", reason="needs ultralytics, an extra (docs/libraries.md)")
    torch.manual_seed(0)
    model = tasks.DetectionModel("yolov8n.yaml", nc=2, verbose=False)
    settle(model, YOLO_SPEC, 8)
    file = tmp_path_factory.mktemp("yolo") / "yolov8n.pth"
    torch.save(model.state_dict(), file)
    return model, str(file)


YOLO_SPEC = InputSpec(size=(64, 96), resize=64, mean=(0.0,) * 3, std=(1.0,) * 3)


def test_ultralytics_boxes_and_scores_are_its_own(ultralytics_network):
    model, weights = ultralytics_network
    network = build_model("yolo:yolov8n.yaml", weights, build_detector)
    assert network.spec.size == (640, 640) and network.spec.range() == (0, 1)
    images, coder = YOLO_SPEC.probe(2), box_coder(network.model, YOLO_SPEC)
    assert count_classes(network.model, YOLO_SPEC, coder) == 2
    theirs = model(images)[0].transpose(1, 2)
    scores, boxes = coder.decode(network.model(images))
    torch.testing.assert_close(scores, theirs[..., 4:])
    sides = torch.tensor([96, 64, 96, 64])
    corners = box_convert(theirs[..., :4] / sides, "cxcywh", "xyxy").clamp(0, 1)
    torch.testing.assert_close(boxes, corners, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="multiples of 32, not 64x100"):
        network.model.coder((64, 100))


def test_ultralytics_is_quantized_whole_and_exported(ultralytics_network, tmp_path):
    network = build_model("yolo:yolov8n.yaml", ultralytics_network[1], build_detector)
    quantized = quantize_data_free(
        network.model, YOLO_SPEC, Recipe(equalize=True, quantize=True, correction=True, per_channel=True)
    )
    layers = [layer for layer in quantized.simulated.modules() if isinstance(layer, nn.Conv2d)]
    assert len(layers) == 63 and all(layer.weight_qparams is not None for layer in layers)
    predictions = box_coder(network.model, YOLO_SPEC).predictions
    exported = export(quantized, YOLO_SPEC, tmp_path / "yolo.onnx", {}, YOLO_SPEC.probe(2), predictions)
    assert sum(layer.far + layer.off for layer in exported.parity.layers) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("yolo:yolov8n.pt", "as yolo:yolov8n.yaml"),
        ("yolo:yolov99.yaml", "builds no detection network of 'yolov99.yaml'"),
    ],
)
def test_an_unknown_ultralytics_network_is_one_line(ultralytics_network, name, message):
    with pytest.raises(UserError, match=message) as error:
        build_model(name, ultralytics_network[1], build_detector)
    assert "\n" not in str(error.value)


def test_a_yolo_without_weights_is_one_line():
    with pytest.raises(UserError, match=r"yolo:yolov8n\.yaml has no weights of its own; pass --weights"):
        build_model("yolo:yolov8n.yaml", None, build_detector)
