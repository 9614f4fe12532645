"""Checkpoints in the layouts that people own load as they are; those that do not fit say why."""

import os
import re
from urllib.error import URLError

import pytest
import torch
from torch import nn

from modeling import build_model
from modeling.checkpoint import check_finite, fit, read_checkpoint
from modeling.mobilenet_v2 import mobilenet_v2
from utils.core.errors import UserError
from utils.core.torchvision_compat import torchvision


def tonylins(tensors):
    """torchvision's MobileNetV2 state dict under the names of tonylins' network."""

    def rename(key):
        if match := re.fullmatch(r"features\.(\d+)\.conv\.(0\.0|0\.1|1\.0|1\.1|1|2|3)\.(\w+)", key):
            block, place, tensor = match.groups()
            first = {"0.0": "0", "0.1": "1", "1": "3", "2": "4"}
            other = {"0.0": "0", "0.1": "1", "1.0": "3", "1.1": "4", "2": "6", "3": "7"}
            return f"features.{block}.conv.{(first if block == '1' else other)[place]}.{tensor}"
        return key.replace("classifier.1.", "classifier.")

    return {rename(key): value for key, value in tensors.items()}


@pytest.fixture
def small():
    """A MobileNetV2 of a quarter of the width, for seven classes, with statistics of its own."""
    model = mobilenet_v2(width=0.25, classes=7).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) * 0.1)
    return model


WRAPPINGS = {
    "bare": lambda tensors: tensors,
    "under state_dict": lambda tensors: {"epoch": 3, "state_dict": tensors},
    "with module prefixes": lambda tensors: {"state_dict": {f"module.{key}": value for key, value in tensors.items()}},
    "tonylins": tonylins,
    "tonylins with prefixes": lambda tensors: {f"module.{key}": value for key, value in tonylins(tensors).items()},
    "without counters": lambda tensors: {key: value for key, value in tensors.items() if "num_batches" not in key},
    "with counters of other layers": lambda tensors: {**tensors, "features.0.0.num_batches_tracked": torch.tensor(1)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_mobilenet_v2_loads_from_every_layout(wrapping, small, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(WRAPPINGS[wrapping](small.state_dict()), file)
    network = build_model("mobilenet_v2", str(file))
    images = network.spec.probe(1)
    torch.testing.assert_close(network.model(images), small(images), rtol=0, atol=0)


def test_number_of_classes_follows_from_the_checkpoint(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(torchvision.models.resnet18(num_classes=4).state_dict(), file)
    assert build_model("resnet18", str(file)).model.fc.out_features == 4
    assert build_model("torchvision:resnet18", str(file)).model.fc.out_features == 4
    assert build_model("timm:resnet18", str(file)).model.fc.out_features == 4


def test_efficientnet_lite0_has_its_weights_from_a_package():
    network = build_model("efficientnet_lite0")
    assert network.model.classifier.out_features == 1000
    assert network.spec.range() == pytest.approx((-127 / 128, 1.0), abs=1e-6)


class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"holds the object '(posix|nt)\.mkdir', which is no tensor and could run code"):
        read_checkpoint(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken zip", b"\x80\x02}q\x00."])
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"file\.pth"):
        read_checkpoint(str(tmp_path / "file.pth"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no weights file at"):
        read_checkpoint(str(tmp_path / "absent.pth"))


def test_what_does_not_fit_is_counted_and_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 2))
    tensors = {"0.weight": torch.zeros(5, 3, 1, 1), "0.bias": torch.zeros(4), "2.weight": torch.zeros(1)}
    with pytest.raises(UserError) as caught:
        fit(model, tensors, "some.pth")
    assert "2 missing (1.weight, 1.bias)" in str(caught.value)
    assert "1 unexpected (2.weight)" in str(caught.value)
    assert "0.weight is (5, 3, 1, 1) instead of (4, 3, 1, 1)" in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_the_layer(bad):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[1].running_var[2] = bad
    with pytest.raises(UserError, match=r"'1\.running_var'"):
        check_finite(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mobilenetv2", "did you mean mobilenet_v2"),
        ("torchvision:resnet81", "torchvision has no classification network 'resnet81'"),
        ("timm:resnet81", "timm has no network 'resnet81'"),
        ("no_such_module:build", "cannot import 'no_such_module'"),
        ("networks:no_such_function", "'networks' has no function 'no_such_function'"),
        ("networks:SPEC", "has no function 'SPEC'"),
        ("math:inf", "has no function 'inf'"),
        ("builtins:list", "returned list; it must return a torch.nn.Module"),
        ("builtins:range", "failed: TypeError"),
    ],
)
def test_unknown_models_are_refused(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build_model(name)


def test_a_users_own_network_loads():
    assert isinstance(build_model("networks:chain").model, nn.Sequential)


def test_without_a_network_the_official_weights_are_refused_with_what_to_pass(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("torch.hub.get_dir", lambda: "/nonexistent")
    monkeypatch.setattr("os.makedirs", lambda *args, **kwargs: None)
    for name in ("resnet18", "torchvision:mnasnet0_5"):
        with pytest.raises(UserError, match=r"no route to host.*pass --weights with a checkpoint file"):
            build_model(name)
