"""Segmentation: VOC folders, masks, mIoU, pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from modeling import build_model
from modeling.segmentation import build_segmenter
from utils.core.errors import UserError
from utils.core.files import make_folder
from utils.core.input_spec import InputSpec
from utils.experiment.evaluation import evaluate
from utils.tasks.data import BadSample, Batches, evenly
from utils.tasks.metrics import VOID, ConfusionMatrix, iou, upsampled
from utils.tasks.pictures import denormalise, voc_palette
from utils.tasks.segmentation import draw as segmentation_pictures
from utils.tasks.segmentation import voc_segmentation
from utils.tasks.voc import open_voc

CPU = torch.device("cpu")
SPEC = InputSpec(size=(32, 48), resize=32)
CLASSES = ("sky", "road", "car")


def make_voc(
    folder: Path, count: int = 3, size: tuple[int, int] = (48, 32), labels: str | None = ",".join(CLASSES)
) -> Path:
    """A VOC folder of images [width, height]; gradients whose left, middle and right third are classes 0, 1, 2."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    names = [f"{i:04}" for i in range(count)]
    (folder / "ImageSets/Segmentation/val.txt").write_text("".join(f"{name}\n" for name in names))
    if labels:
        (folder / "labels.txt").write_text(labels)
    width, height = size
    thirds = np.tile(np.arange(width) * 3 // width, (height, 1)).astype(np.uint8)
    for name in names:
        Image.fromarray(np.repeat(thirds[..., None] * 100, 3, axis=2)).save(folder / f"JPEGImages/{name}.png")
        mask = Image.fromarray(thirds, "P") if name == "0000" else Image.fromarray(thirds)
        if mask.mode == "P":
            mask.putpalette(voc_palette().tobytes())
        mask.save(folder / f"SegmentationClass/{name}.png")
    return folder


def write_mask(folder: Path, array: np.ndarray, name: str = "0001") -> None:
    Image.fromarray(array.astype(np.uint8)).save(folder / f"SegmentationClass/{name}.png")


def test_palette_and_greyscale_masks_are_class_indices(tmp_path):
    samples, names = voc_segmentation(str(make_voc(tmp_path)), None, SPEC, 3)
    assert names == CLASSES and len(samples) == 3
    assert torch.equal(samples[0][1], samples[1][1])
    assert samples[0][1].unique().tolist() == [0, 1, 2]
    image = Image.open(tmp_path / "JPEGImages/0000.png")
    assert np.array_equal(np.asarray(denormalise(samples[0][0], SPEC)), np.asarray(image)), (
        "an image of the input's size is not resampled"
    )


@pytest.mark.parametrize("size", [(32, 48), (24, 24), (40, 20), (64, 96), (20, 60)])
def test_image_and_mask_are_scaled_to_cover_the_input_and_cropped_alike(tmp_path, size):
    samples, _ = voc_segmentation(str(make_voc(tmp_path, count=1)), "val", replace(SPEC, size=size), 3)
    image, mask = samples[0]
    assert image.shape[1:] == mask.shape == size
    seen = (np.asarray(denormalise(image, SPEC))[..., 0] / 100).round()
    assert (seen == mask.numpy()).mean() > 0.94, "but for the columns where classes meet"
    assert (mask == 1).float().mean() >= 0.32, "the middle third stays in the middle"


def test_scaled_masks_hold_no_label_that_was_not_there(tmp_path):
    root = make_voc(tmp_path, count=2)
    write_mask(root, np.random.default_rng(0).choice([0, 2, VOID], (32, 48)))
    for size in ((48, 72), (24, 36)):
        samples, _ = voc_segmentation(str(root), None, replace(SPEC, size=size), 3)
        assert samples[1][1].unique().tolist() == [0, 2, VOID]


def test_years_folders_and_labels_beside_them(tmp_path):
    make_voc(tmp_path / "VOCdevkit/VOC2007", labels=None)
    make_voc(tmp_path / "VOCdevkit/VOC2012", labels=None)
    lists = tmp_path / "VOCdevkit/VOC2007/ImageSets/Segmentation"
    (lists / "test.txt").write_text("0001\n\n0000\n")
    for root in ("", "VOCdevkit", "VOCdevkit/VOC2012"):
        voc = open_voc(str(tmp_path / root), "Segmentation")
        assert (voc.year, voc.split, voc.labels, len(voc.names)) == (2012, "val", None, 3)
    for voc in (
        open_voc(str(tmp_path / "VOCdevkit/VOC2007"), "Segmentation"),
        open_voc(str(tmp_path), "Segmentation", "test"),
    ):
        assert (voc.year, voc.split, voc.names) == (2007, "test", ["0001", "0000"])
    (tmp_path / "VOCdevkit/labels.txt").write_text("a, b\nc")
    assert open_voc(str(tmp_path), "Segmentation").labels == ("a", "b", "c")


def test_classes_are_those_of_voc_or_of_labels_with_or_without_background(tmp_path):
    root = make_voc(tmp_path, labels=None)
    assert voc_segmentation(str(root), None, SPEC, 21)[1][:2] == ("background", "aeroplane")
    (root / "labels.txt").write_text("helmet,head")
    assert voc_segmentation(str(root), None, SPEC, 3)[1] == ("background", "helmet", "head")
    assert voc_segmentation(str(root), None, SPEC, 2)[1] == ("helmet", "head")


def _remove(name):
    return lambda root: (root / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "split", "outputs", "message"),
    [
        (lambda root: root.rename(root.parent / "gone"), None, 3, "no data folder at"),
        (_remove("ImageSets/Segmentation/val.txt"), None, 3, "no VOC folder at .* ImageSets/Segmentation"),
        (
            lambda root: (root / "ImageSets/Segmentation").rename(root / "ImageSets/Main"),
            None,
            3,
            "there is ImageSets/Main, for another task",
        ),
        (lambda root: None, "train", 3, "no split 'train' .* --split can be val"),
        (lambda root: (root / "ImageSets/Segmentation/val.txt").write_text(" \n\n"), None, 3, "split 'val' is empty"),
        (_remove("JPEGImages/0002.png"), None, 3, "names 1 image.* first '0002'"),
        (lambda root: (root / "JPEGImages").rename(root / "Images"), None, 3, "no folder JPEGImages"),
        (_remove("SegmentationClass/0001.png"), None, 3, "1 of 3 images .* no annotation.*0001.png"),
        (lambda root: None, None, 21, "the network has 21 classes, but there are 3 .*labels.txt"),
        (_remove("labels.txt"), None, 3, "the network has 3 classes, but there are 21 .*no labels.txt"),
        (lambda root: (root / "labels.txt").write_text(" ,"), None, 3, "names no class"),
    ],
)
def test_unusable_folder_is_one_line(tmp_path, spoil, split, outputs, message):
    root = make_voc(tmp_path / "data")
    spoil(root)
    with pytest.raises(UserError, match=message) as error:
        voc_segmentation(str(root), split, SPEC, outputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda root: write_mask(root, np.full((32, 48), 7)),
            r"0001.png' holds the label 7; the network has 3 classes, 0 to 2, and 255 is void",
        ),
        (lambda root: write_mask(root, np.zeros((32, 47))), r"0001.png' is 47x32, the image 48x32"),
        (lambda root: write_mask(root, np.zeros((32, 48, 3))), r"0001.png' is a colour picture \(RGB\)"),
        (
            lambda root: (root / "SegmentationClass/0001.png").write_bytes(b"no picture"),
            r"mask '.*0001.png' cannot be read: cannot identify",
        ),
        (lambda root: (root / "JPEGImages/0001.png").write_bytes(b"no picture"), r"0001.png \(cannot identify"),
    ],
)
def test_unusable_mask_names_its_file_and_can_be_skipped(tmp_path, spoil, reason):
    root = make_voc(tmp_path)
    spoil(root)
    samples, _ = voc_segmentation(str(root), None, SPEC, 3)
    assert isinstance(samples[1], BadSample)
    model, metric = nn.Conv2d(3, 3, 1), ConfusionMatrix("abc")
    with pytest.raises(UserError, match=reason) as error:
        evaluate({"x": model}, Batches(samples, 3, 0, 0), {"x": metric}, CPU)
    assert "\n" not in str(error.value)
    evaluate({"x": model}, Batches(samples, 2, 0, 0), {"x": metric}, CPU, skip_bad_images=True)
    assert len(metric.records) == 2


# ----------------------------------------------------------------------------------------- metric


def one_hot(classes: Tensor, count: int) -> Tensor:
    return F.one_hot(classes, count).movedim(-1, 1).float()


def test_miou_by_hand():
    truth = torch.tensor([[[0, 0, 0, 1], [1, 1, VOID, VOID]]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 0, 1, 1], [1, 2, 2, 0]]])
    metric = ConfusionMatrix("abcd")
    metric.update(one_hot(predicted, 4), truth)
    expected = [2 / 3, 2 / 4, 0 / 1]  # class 2 is never right; class 3 is nowhere and does not count
    assert iou(metric.counts)[:3].tolist() == pytest.approx(expected) and iou(metric.counts)[3].isnan()
    assert metric.compute() == pytest.approx({"miou": 100 * sum(expected) / 3, "pixel_accuracy": 100 * 4 / 6})
    assert next(iter(metric.compute())) == "miou" and len(metric.records) == 1
    assert metric.per_image == pytest.approx([metric.compute()["miou"]])


def test_confusion_matrix_is_that_of_all_pixels_however_batched():
    predicted, truth = torch.randint(5, (6, 9, 7)), torch.randint(5, (6, 9, 7)).to(torch.uint8)
    truth[torch.rand(truth.shape) < 0.2] = VOID
    whole, streamed = ConfusionMatrix("abcde"), ConfusionMatrix("abcde")
    whole.update(one_hot(predicted, 5), truth)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        streamed.update(one_hot(predicted[part], 5), truth[part])
    valid = (truth != VOID).numpy()
    pairs = 5 * truth.numpy()[valid].astype(int) + predicted.numpy()[valid]
    assert np.array_equal(streamed.counts.numpy(), np.bincount(pairs, minlength=25).reshape(5, 5))
    assert torch.equal(whole.counts, streamed.counts) and whole.per_image == streamed.per_image
    single = ConfusionMatrix("abcde")
    single.update(one_hot(predicted[2:3], 5), truth[2:3])
    assert single.compute()["miou"] == pytest.approx(streamed.per_image[2])


def test_smaller_maps_are_upsampled_bilinearly():
    logits, truth = torch.rand(2, 3, 4, 4), torch.randint(3, (2, 8, 8), dtype=torch.uint8)
    small, large = ConfusionMatrix("abc"), ConfusionMatrix("abc")
    small.update(logits, truth)
    large.update(torch.nn.functional.interpolate(logits, scale_factor=2, mode="bilinear"), truth)
    assert small.counts.equal(large.counts)
    ramp = upsampled(torch.tensor([0.0, 4.0]).expand(1, 1, 2, 2), (4, 4))
    torch.testing.assert_close(ramp[0, 0, 0], torch.tensor([0.0, 1.0, 3.0, 4.0]))


def test_metric_refuses_what_it_cannot_score():
    with pytest.raises(UserError, match="it must be as large as the image"):
        ConfusionMatrix("abc").update(torch.rand(1, 3, 8, 8), torch.zeros(1, 4, 4, dtype=torch.uint8))
    void = ConfusionMatrix("abc")
    void.update(torch.rand(1, 3, 4, 4), torch.full((1, 4, 4), VOID, dtype=torch.uint8))
    with pytest.raises(UserError, match="every pixel of the masks is void"):
        void.compute()


# --------------------------------------------------------------------------------------- pictures


def test_palette_is_vocs():
    colours = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        7: (128, 128, 128),
        8: (64, 0, 0),
        15: (192, 128, 128),
        VOID: (224, 224, 192),
    }
    assert {index: tuple(voc_palette()[index].tolist()) for index in colours} == colours


class Thirds(nn.Module):
    """Right about the thirds of make_voc's images, but for those brighter than it was told."""

    def __init__(self, limit: float = 1e9):
        super().__init__()
        self.limit = limit

    def forward(self, images: Tensor) -> Tensor:
        columns = torch.arange(images.shape[3]) * 3 // images.shape[3]
        right = one_hot(columns.expand(len(images), images.shape[2], -1), 3)
        return torch.where(images.mean((1, 2, 3), keepdim=True) > self.limit, right.roll(1, dims=1), right)


def test_pictures_show_the_first_images_and_the_worst(tmp_path):
    root = make_voc(tmp_path / "data", count=5)
    bright = Image.fromarray(np.full((32, 48, 3), 255, np.uint8))
    bright.save(root / "JPEGImages/0003.png")
    (root / "JPEGImages/0001.png").write_bytes(b"no picture")
    samples = evenly(voc_segmentation(str(root), None, SPEC, 3)[0], 5)
    networks = {"FP32": Thirds(), "INT8": Thirds(limit=1.0)}
    metrics = {name: ConfusionMatrix("abc") for name in networks}
    evaluate(networks, Batches(samples, 2, 0, 0), metrics, CPU, skip_bad_images=True)
    assert metrics["FP32"].compute()["miou"] == 100 and metrics["INT8"].per_image == [100, 100, 0, 100]

    files = segmentation_pictures(
        make_folder(tmp_path / "report/pictures"), networks, metrics, CPU, samples, SPEC, count=2
    )
    assert [file.name for file in files] == [
        "first_1_0000.png",
        "first_2_0002.png",
        "worst_1_0003.png",
        "worst_2_0000.png",
    ]
    sheet = np.asarray(Image.open(files[2]))
    height, width = SPEC.size
    panels = [sheet[-height:, left : left + width] for left in range(0, sheet.shape[1], width + 4)]
    assert len(panels) == 4
    assert (panels[0] == 255).all()
    assert panels[1][0, [0, 20, 40]].tolist() == panels[2][0, [0, 20, 40]].tolist() == voc_palette()[[0, 1, 2]].tolist()
    assert panels[3][0, [0, 20, 40]].tolist() == voc_palette()[[1, 2, 0]].tolist()


def test_pictures_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make the folder .* pass --report"):
        make_folder(tmp_path / "file" / "pictures")


# -------------------------------------------------------------------------------------- real data


def test_real_checkpoint_scores_and_measures_as_it_did_upstream(shared):
    weights = shared / "weights/deeplab-mobilenet-camvid.pth.tar"
    network = build_model("deeplabv3plus_mobilenet_v2", str(weights), build_segmenter)
    samples, names = voc_segmentation(str(shared / "data/camvid-voc"), None, replace(network.spec, size=(360, 480)), 11)
    assert len(samples) == 101 and names[0] == "sky"
    inputs = []
    norm = network.model.aspp.aspp2.bn
    norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    metric = ConfusionMatrix("abcdefghijk")
    evaluate({"float": network.model}, Batches(evenly(samples, 5), 1, 0, 0), {"float": metric}, CPU)
    assert metric.compute()["miou"] == pytest.approx(41, abs=1.5)
    # What the pyramid reads is the same for every image here, so upstream's statistics of it are exact.
    shift = (inputs[0].mean((0, 2, 3)) - norm.running_mean) / norm.running_var.sqrt()
    assert shift.abs().max() < 1e-3
