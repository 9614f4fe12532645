"""DeepLabV3+, its checkpoints, and other segmentation networks that can be built."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import randomise
from torch import Tensor, fx, nn

from modeling import build_model
from modeling.deeplab import STAGES, DeepLab
from modeling.segmentation import build_segmenter
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.networks import scored
from utils.core.torchvision_compat import torchvision
from utils.tasks.segmentation import TASK


def upstream_tensors(classes: int = 5, channels: int = 8, reduced: int = 4) -> dict[str, Tensor]:
    """A random checkpoint of width 0.25 with the names and shapes of jfzhang95's DeepLabV3+."""
    tensors = {}

    def conv(name: str, outputs: int, inputs: int, kernel: int) -> None:
        tensors[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel) * (inputs * kernel**2) ** -0.5

    def norm(name: str, size: int) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.rand(size) + 0.5, torch.randn(size)
        tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"] = (
            torch.randn(size) * 0.3,
            torch.rand(size) + 0.5,
        )
        tensors[f"{name}.num_batches_tracked"] = torch.tensor(1)

    def conv_norm(conv_name: str, norm_name: str, outputs: int, inputs: int, kernel: int = 1) -> None:
        conv(conv_name, outputs, inputs, kernel)
        norm(norm_name, outputs)

    conv_norm("backbone.features.0.0", "backbone.features.0.1", 8, 3, 3)
    inputs, index = 8, 1
    for (expansion, _, count, _), outputs in zip(STAGES, (8, 8, 8, 16, 24, 40, 80), strict=True):
        for _ in range(count):
            block, hidden = f"backbone.features.{index}.conv", inputs * expansion
            first = 0 if expansion == 1 else 3
            if first:
                conv_norm(f"{block}.0", f"{block}.1", hidden, inputs)
            conv_norm(f"{block}.{first}", f"{block}.{first + 1}", hidden, 1, 3)
            conv_norm(f"{block}.{first + 3}", f"{block}.{first + 4}", outputs, hidden)
            inputs, index = outputs, index + 1
    for branch, kernel in enumerate((1, 3, 3, 3), start=1):
        conv_norm(f"aspp.aspp{branch}.atrous_conv", f"aspp.aspp{branch}.bn", channels, inputs, kernel)
    conv_norm("aspp.global_avg_pool.1", "aspp.global_avg_pool.2", channels, inputs)
    conv_norm("aspp.conv1", "aspp.bn1", channels, 5 * channels)
    conv_norm("decoder.conv1", "decoder.bn1", reduced, 8)
    conv_norm("decoder.last_conv.0", "decoder.last_conv.1", channels, channels + reduced, 3)
    conv_norm("decoder.last_conv.4", "decoder.last_conv.5", channels, channels, 3)
    conv("decoder.last_conv.8", classes, channels, 1)
    tensors["decoder.last_conv.8.bias"] = torch.randn(classes)
    for key, value in list(tensors.items()):
        if key.startswith("backbone.features."):
            block = key.split(".")[2]
            tensors[key.replace("features", "low_level_features" if int(block) < 4 else "high_level_features")] = value
    return tensors


def upstream_forward(tensors: dict[str, Tensor], images: Tensor) -> Tensor:
    """What upstream's network computes, one operation after the other, straight from its tensors."""

    def conv(x: Tensor, name: str, **options) -> Tensor:
        return F.conv2d(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), **options)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"]
        return F.batch_norm(x, mean, variance, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def resize(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)

    low = None
    x = F.relu6(norm(conv(images, "backbone.features.0.0", stride=2, padding=1), "backbone.features.0.1"))
    for index in range(1, 18):
        block, stride, dilation = (
            f"backbone.features.{index}.conv",
            2 if index in (2, 4, 7) else 1,
            2 if index == 17 else 1,
        )
        y, first = F.pad(x, (dilation,) * 4), 0
        if index > 1:
            y, first = F.relu6(norm(conv(y, f"{block}.0"), f"{block}.1")), 3
        y = conv(y, f"{block}.{first}", stride=stride, dilation=dilation, groups=y.shape[1])
        y = norm(conv(F.relu6(norm(y, f"{block}.{first + 1}")), f"{block}.{first + 3}"), f"{block}.{first + 4}")
        x = x + y if x.shape == y.shape else y
        low = x if index == 3 else low

    branches = []
    for branch, dilation in enumerate((1, 6, 12, 18), start=1):
        y = conv(x, f"aspp.aspp{branch}.atrous_conv", padding=0 if branch == 1 else dilation, dilation=dilation)
        branches.append(F.relu(norm(y, f"aspp.aspp{branch}.bn")))
    pooled = F.relu(norm(conv(x.mean((2, 3), keepdim=True), "aspp.global_avg_pool.1"), "aspp.global_avg_pool.2"))
    branches.append(resize(pooled, x))
    x = F.relu(norm(conv(torch.cat(branches, dim=1), "aspp.conv1"), "aspp.bn1"))
    low = F.relu(norm(conv(low, "decoder.conv1"), "decoder.bn1"))
    x = torch.cat((resize(x, low), low), dim=1)
    for index in (0, 4):
        x = F.relu(norm(conv(x, f"decoder.last_conv.{index}", padding=1), f"decoder.last_conv.{index + 1}"))
    return resize(conv(x, "decoder.last_conv.8"), images)


def saved(path: Path, tensors: dict[str, Tensor]) -> str:
    torch.save(tensors, path)
    return str(path)


def load(weights: str, name: str = "deeplabv3plus_mobilenet_v2") -> nn.Module:
    return build_model(name, weights, build_segmenter).model


def test_checkpoint_of_upstream_gives_upstreams_output(tmp_path):
    tensors, images = upstream_tensors(), torch.randn(2, 3, 70, 90)
    expected = upstream_forward(tensors, images)
    assert expected.std() > 0.1
    bare = load(saved(tmp_path / "bare.pth", tensors))
    torch.testing.assert_close(bare(images), expected, rtol=1e-4, atol=1e-4)

    old = {f"module.{key}": value for key, value in tensors.items() if "num_batches_tracked" not in key}
    wrapped = load(saved(tmp_path / "wrapped.pth", {"state_dict": old, "epoch": 3}))
    assert torch.equal(wrapped(images), bare(images))


def test_checkpoint_that_lacks_a_tensor_or_has_one_too_many_is_refused(tmp_path):
    lacking = {key: value for key, value in upstream_tensors().items() if key != "aspp.bn1.weight"}
    with pytest.raises(UserError, match=r"1 missing \(aspp.bn1.weight\); check --model"):
        load(saved(tmp_path / "lacking.pth", lacking))
    with pytest.raises(UserError, match=r"1 unexpected \(aspp.aspp5.bn.weight\); check --model"):
        load(saved(tmp_path / "more.pth", upstream_tensors() | {"aspp.aspp5.bn.weight": torch.ones(8)}))


def test_deeplab_traces_for_any_image_size_with_every_module_called_once():
    model = randomise(DeepLab(classes=4, width=0.25, channels=8, reduced=4))
    traced = fx.symbolic_trace(model)
    for size in ((64, 96), (65, 33)):
        images = torch.randn(1, 3, *size)
        assert traced(images).shape == (1, 4, *size)
        assert torch.equal(traced(images), model(images))
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert len(called) == len(set(called))


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_torchvisions_networks_return_logits(tmp_path, name):
    options = {} if name.startswith("lraspp") else {"aux_loss": True}
    theirs = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **options)
    theirs = randomise(theirs)
    ours = load(saved(tmp_path / "weights.pth", theirs.state_dict()), f"torchvision:{name}")
    images = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(fx.symbolic_trace(ours)(images), theirs(images)["out"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deeplabv3plus_mobilenet", r"did you mean deeplabv3plus_mobilenet_v2\?"),
        ("deeplabv3plus_mobilenet_v2", "pass --weights"),
        ("torchvision:fcn_resnet18", "did you mean fcn_resnet101"),
        ("torchvision:x", "choose from deeplabv3_mobilenet_v3_large"),
        ("user_networks:pooling", r"must return maps of logits \[N, classes, H, W\]"),
        ("smp:unet/resnet18", "smp:unet/resnet18 has no weights of its own; pass --weights"),
        ("user_networks:failing", "fails on images of shape"),
        ("user_networks:counting", "returns int, and nothing to score"),
    ],
)
def test_unusable_network_is_one_line(tmp_path, monkeypatch, name, message):
    (tmp_path / "user_networks.py").write_text(
        "from torch import nn\n"
        "class Counting(nn.Module):\n    def forward(self, x):\n        return 3\n"
        "counting = Counting\n"
        "def pooling():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "def failing():\n    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(5, 4, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        network = build_model(name, None, build_segmenter)
        scored(network.model, network.spec, TASK.output_dims)
    assert "\n" not in str(error.value)


def test_maps_that_are_smaller_than_the_image_are_said_to_be_upsampled(capsys):
    halving = nn.Conv2d(3, 4, 3, 2, 1)
    assert scored(halving, InputSpec(size=(32, 48)), 4) is halving
    assert "maps of 16x24 are upsampled to 32x48 bilinearly, outside" in capsys.readouterr().out
    scored(nn.Conv2d(3, 4, 3, padding=1), InputSpec(size=(32, 48)), 4)
    assert capsys.readouterr().out == ""
