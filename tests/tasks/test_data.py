"""Folders of images: labels that do not shift, subsets evenly spread, bad files named."""

import numpy as np
import pytest
import torch
from PIL import Image

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.tasks.data import Batches, evenly, image_folder
from utils.tasks.labels import class_indices, imagenet_ids

SPEC = InputSpec(size=(16, 16), resize=16)


def folder(root, classes, images=2):
    generator = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(images):
            Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return str(root)


def test_wordnet_folders_keep_imagenets_indices(tmp_path):
    ids = imagenet_ids()
    assert len(ids) == 1000 and ids[0] == "n01440764" and ids[-1] == "n15075141"
    root = folder(tmp_path, [ids[3], ids[500], ids[999]], images=1)
    samples, names = image_folder(root, "val", SPEC, outputs=1000)
    assert names == {3: ids[3], 500: ids[500], 999: ids[999]}
    assert [samples[i][1] for i in range(3)] == [3, 500, 999]


def test_an_empty_class_folder_shifts_no_label(tmp_path):
    root = folder(tmp_path, ["ant", "cat"], images=1)
    (tmp_path / "bee").mkdir()
    samples, _ = image_folder(root, "val", SPEC, outputs=3)
    assert [samples[i][1] for i in range(2)] == [0, 2]


def test_as_many_folders_as_outputs_take_their_order(tmp_path):
    assert class_indices(["n02102040", "n01440764"], 2, "x")[0] == [0, 1]


def test_a_split_below_the_folder_is_found(tmp_path):
    folder(tmp_path / "val", ["a", "b"])
    folder(tmp_path / "train", ["a", "b"], images=5)
    assert len(image_folder(str(tmp_path), "val", SPEC, 2)[0]) == 4
    assert len(image_folder(str(tmp_path), "train", SPEC, 2)[0]) == 10


@pytest.mark.parametrize(("outputs", "reason"), [(1000, "'a' is no ImageNet WordNet id"), (7, "not ImageNet's 1,000")])
def test_a_wrong_number_of_classes_is_refused(tmp_path, outputs, reason):
    root = folder(tmp_path, ["a", "b"])
    with pytest.raises(UserError, match=reason):
        image_folder(root, "val", SPEC, outputs)


def test_folders_without_what_they_should_hold_are_refused(tmp_path):
    with pytest.raises(UserError, match="no data folder"):
        image_folder(str(tmp_path / "absent"), "val", SPEC, 2)
    with pytest.raises(UserError, match="no class folders"):
        image_folder(str(tmp_path), "val", SPEC, 2)
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="hold no images"):
        image_folder(str(tmp_path), "val", SPEC, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_not_raised(tmp_path, workers):
    root = folder(tmp_path, ["a", "b"], images=3)
    broken = tmp_path / "a" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    loaded = list(Batches(image_folder(root, "val", SPEC, 2)[0], 4, workers, seed=0))
    assert [reason.split(" ")[0] for batch in loaded for reason in batch.bad] == [str(broken)]
    assert sum(len(batch.images) for batch in loaded) == 5
    assert torch.cat([batch.targets for batch in loaded]).tolist() == [0, 0, 1, 1, 1]


def test_a_limit_is_evenly_spread():
    assert [int(i) for i in evenly(list(range(10)), 4)] == [0, 2, 5, 7]
    assert len(evenly(list(range(10)), 99)) == 10
    assert [int(i) for i in evenly(list(range(10)), None)] == list(range(10))


def test_images_are_normalised_as_the_spec_says(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (30, 20), (255, 127, 0)).save(tmp_path / "a" / "flat.png")
    spec = InputSpec(size=(8, 8), resize=8, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    image, _ = image_folder(str(tmp_path), "val", spec, 1)[0][0]
    torch.testing.assert_close(image[:, 3, 3], torch.tensor([1.0, 0.0, -127 / 128]), atol=1e-6, rtol=0)
