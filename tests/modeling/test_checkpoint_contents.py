"""What training scripts save beside and around the tensors: it loads, nothing in it runs, and the choice is said."""

import argparse
import datetime
import os
import pathlib
import pickle
import sys
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn

from modeling import build_model
from modeling.checkpoint import fit, read_checkpoint
from modeling.mobilenet_v2 import mobilenet_v2, to_torchvision_layout
from modeling.segmentation import build_segmenter
from utils.core.errors import UserError
from utils.core.torchvision_compat import torchvision

TENSORS = {"conv.weight": torch.arange(6.0).reshape(1, 6, 1, 1), "conv.bias": torch.tensor([2.5])}


def saved(tmp_path, content, **options) -> str:
    torch.save(content, tmp_path / "weights.pth", **options)
    return str(tmp_path / "weights.pth")


def same(tensors, expected=TENSORS) -> bool:
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)


# --------------------------------------------------------------------------------- beside the tensors

scores = defaultdict(list)
scores["val"].append(0.5)
BESIDE = {
    "numpy scalar": np.float64(0.71),
    "numpy int": np.int64(7),
    "numpy bool": np.bool_(True),
    "numpy array": np.arange(6).reshape(2, 3),
    "numpy array of objects": np.array(["a", None], dtype=object),
    "numpy array of text": np.array(["a", "bc"]),
    "numpy dtype": np.dtype("float16"),
    "numpy random state": np.random.RandomState(0).get_state(),
    "namespace": argparse.Namespace(lr=0.1, data=pathlib.Path("data"), gpus=[0]),
    "path": pathlib.PurePosixPath("a/b"),
    "windows path": pathlib.PureWindowsPath("a/b"),
    "datetime": datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
    "date and duration": [datetime.date(2020, 1, 2), datetime.timedelta(3)],
    "ordered dict": OrderedDict(a=1),
    "defaultdict": scores,
    "deque": deque([1, 2], maxlen=5),
    "counter": Counter("aab"),
    "sets": [{1, 2}, frozenset([3])],
    "others": [range(3), 1j, b"bytes", slice(1, 2), Ellipsis is None],
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("kind", BESIDE)
def test_what_stands_beside_the_tensors_does_not_hinder(kind, zipped, tmp_path):
    content = {"best_pred": BESIDE[kind], "state_dict": TENSORS}
    assert same(read_checkpoint(saved(tmp_path, content, _use_new_zipfile_serialization=zipped)))


@pytest.mark.parametrize(
    "place",
    ["easydict.EasyDict", "yacs.config.CfgNode", "pytorch_lightning.utilities.parsing.AttributeDict"],
)
def test_dicts_of_other_libraries_are_read_without_them(place, tmp_path, monkeypatch):
    module, _, name = place.rpartition(".")
    kind = type(name, (dict,), {"__module__": module})
    parts = module.split(".")
    for i in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(parts[i]))
    setattr(sys.modules[module], name, kind)
    file = saved(tmp_path, {"hyper_parameters": kind(lr=0.1, inner=kind(a=1)), "state_dict": TENSORS})
    monkeypatch.undo()
    assert same(read_checkpoint(file))


def test_a_checkpoint_is_downloaded_once(tmp_path, monkeypatch):
    torch.save(TENSORS, tmp_path / "published.pth")
    asked = []

    def download(url, file, *args, **kwargs):
        asked.append(url)
        pathlib.Path(file).write_bytes((tmp_path / "published.pth").read_bytes())

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    for _ in range(2):
        assert same(read_checkpoint("https://example.org/some/net.pth?download=1"))
    assert asked == ["https://example.org/some/net.pth?download=1"]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f2", "<f8", "<i8", "|u1", "|b1"])
def test_numpy_arrays_among_the_tensors_are_read(kind, order, tmp_path):
    array = np.asarray(np.arange(12).reshape(3, 4) % 2, dtype=kind, order=order)
    found = read_checkpoint(saved(tmp_path, {"layer.weight": array, "layer.bias": torch.ones(3)}))
    assert found["layer.weight"].tolist() == array.tolist()


def test_a_published_file_of_jfzhang95s_trainer_loads(tmp_path):
    model = mobilenet_v2(width=0.25, classes=3).eval()
    content = {"epoch": 30, "state_dict": model.state_dict(), "optimizer": {"state": {}}, "best_pred": np.float64(0.7)}
    network = build_model("mobilenet_v2", saved(tmp_path, content))
    assert same(network.model.state_dict(), model.state_dict())


# -------------------------------------------------------------------------------------------- hostile


class Reduce:
    """Asks the unpickler to call a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Build:
    """Asks for a state to be set on an object of a class of this file."""

    def __reduce__(self):
        return object.__new__, (Build,), {"ran": True}


HOSTILE = {
    "reduce": lambda mark: Reduce(os.mkdir, mark),
    "system": lambda mark: Reduce(os.system, f"mkdir {mark}"),
    "eval": lambda mark: Reduce(eval, f"__import__('os').mkdir({mark!r})"),
    "exec": lambda mark: Reduce(exec, f"import os; os.mkdir({mark!r})"),
    "getattr": lambda mark: Reduce(getattr, mark, "upper"),
    "import": lambda mark: Reduce(__import__, "this"),
    "open": lambda mark: Reduce(open, mark, "w"),
    "torch.load": lambda mark: Reduce(torch.load, mark),
    "torch.hub": lambda mark: Reduce(torch.hub.load, "some/repository", "model"),
    "numpy load": lambda mark: Reduce(np.load, mark, None, True),
    "build": lambda mark: Build(),
    "module": lambda mark: nn.Linear(2, 2),
    "nested": lambda mark: {"a": [{"b": (1, Reduce(os.mkdir, mark))}]},
    "in a namespace": lambda mark: argparse.Namespace(run=Reduce(os.mkdir, mark)),
    "in a defaultdict": lambda mark: defaultdict(list, {"run": [Reduce(os.mkdir, mark)]}),
    "in an array": lambda mark: np.array([Reduce(os.mkdir, mark)], dtype=object),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_are_refused_in_a_line_and_do_not_run(kind, zipped, tmp_path, capsys):
    mark = tmp_path / "ran"
    content = {"state_dict": TENSORS, "extra": HOSTILE[kind](str(mark))}
    file = saved(tmp_path, content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"so it is not loaded; save model.state_dict\(\) and pass that") as error:
        read_checkpoint(file)
    assert str(error.value).isprintable()
    assert not mark.exists() and not capsys.readouterr().out


def rewritten(file, change) -> None:
    """The zip file with other bytes in its pickle, under a sound checksum."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (b"\x80\x02cposix\nmkdir\nX\x03\x00\x00\x00ran\x85R.", "holds the object 'posix.mkdir'"),
        (b"\x80\x02cevil\x1b[31m.mod\nna\x07me\n)R.", r"holds the object 'evil\?\[31m\.mod\.na\?me'"),
        (b"\x80\x02X\x07\x00\x00\x00evil_idQ.", "asks to do more than to hold tensors"),
        (b"\x80\x02X\x04\x00\x00\x00evil\x85Q.", "asks to do more than to hold tensors"),
        (b"\x80\x02}X\x01\x00\x00\x00ab.", "asks to do more than to hold tensors"),
        (b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00}\x94.", "written with a pickle protocol that is not read"),
    ],
)
def test_a_tampered_record_is_refused(program, reason, tmp_path):
    file = saved(tmp_path, TENSORS)
    rewritten(file, lambda content: program)
    with pytest.raises(UserError, match=reason) as error:
        read_checkpoint(file)
    assert str(error.value).isprintable()


def test_a_record_that_no_longer_has_its_checksum_is_damaged(tmp_path):
    file = pathlib.Path(saved(tmp_path, TENSORS))
    content = bytearray(file.read_bytes())
    content[content.find(TENSORS["conv.weight"].numpy().tobytes()) + 6] ^= 1
    file.write_bytes(content)
    assert torch.load(file)["conv.weight"].ne(TENSORS["conv.weight"]).any(), "torch alone does not notice"
    with pytest.raises(UserError, match=r"is damaged \(Bad CRC-32"):
        read_checkpoint(str(file))


def test_a_file_without_checksums_loads(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        file = saved(tmp_path, TENSORS)
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read_checkpoint(file))


def test_what_is_saved_in_another_way_is_refused_with_what_to_do(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(UserError, match=r"is a TorchScript program.*; save model.state_dict\(\) and pass that"):
        read_checkpoint(str(tmp_path / "script.pt"))
    with pytest.raises(UserError, match="with a pickle protocol that is not read safely"):
        read_checkpoint(saved(tmp_path, TENSORS, pickle_protocol=4))
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": [1]}, protocol=2))
    with pytest.raises(UserError, match=r"plain\.pkl"):
        read_checkpoint(str(tmp_path / "plain.pkl"))
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    with pytest.raises(UserError, match=r"arrays\.npz"):
        read_checkpoint(str(tmp_path / "arrays.npz"))
    with pytest.raises(UserError, match="a folder, no weights file"):
        read_checkpoint(str(tmp_path))


# --------------------------------------------------------------------------------------------- wrappers

OTHER = {key: value + 1 for key, value in TENSORS.items()}
PLAIN = ["state_dict", "model", "model_state", "model_state_dict", "net", "network", "module", "weights", "params"]
AVERAGED = ["ema", "model_ema", "state_dict_ema", "ema_state_dict", "teacher"]


@pytest.mark.parametrize("key", [*PLAIN, *AVERAGED, "student", "my_own_name", "sample_net"])
def test_state_dicts_are_found_under_the_usual_keys(key, tmp_path, capsys):
    optimizer = {"state": {0: {"exp_avg": torch.ones(6)}}, "param_groups": []}
    assert same(read_checkpoint(saved(tmp_path, {"epoch": 3, key: TENSORS, "optimizer": optimizer})))
    assert capsys.readouterr().out == f"weights of weights.pth: taken from {key!r}\n"


def test_a_bare_state_dict_is_taken_without_a_word(tmp_path, capsys):
    assert same(read_checkpoint(saved(tmp_path, OrderedDict(TENSORS))))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("averaged", AVERAGED)
def test_of_an_averaged_and_a_plain_set_the_choice_is_said_and_the_other_is_to_be_had(averaged, tmp_path, capsys):
    file = saved(tmp_path, {"state_dict": OTHER, averaged: TENSORS})
    assert same(read_checkpoint(file))
    assert capsys.readouterr().out == (
        f"weights of weights.pth: taken from {averaged!r} (averaged), "
        "not 'state_dict'; for that pass --checkpoint_key\n"
    )
    assert same(read_checkpoint(file, "state_dict"), OTHER)
    assert same(read_checkpoint(file, averaged))


@pytest.mark.parametrize("place", ["ema.module", "state_dict.model", "checkpoint.model.state_dict"])
def test_wrappers_in_wrappers(place, tmp_path):
    content = TENSORS
    for key in reversed(place.split(".")):
        content = {key: content, "step": 4}
    assert same(read_checkpoint(saved(tmp_path, content)))
    assert same(read_checkpoint(saved(tmp_path, content), place))
    assert same(read_checkpoint(saved(tmp_path, content), place.split(".")[0]))


def test_several_sets_of_unknown_names_are_not_guessed_between(tmp_path):
    file = saved(tmp_path, {"generator": OTHER, "discriminator": TENSORS})
    with pytest.raises(UserError, match="pass --checkpoint_key with one of generator, discriminator"):
        read_checkpoint(file)
    assert same(read_checkpoint(file, "discriminator"))
    with pytest.raises(UserError, match="no state dict under --checkpoint_key 'critic'; there is generator, discrim"):
        read_checkpoint(file, "critic")
    with pytest.raises(UserError, match="holds no state dict; save"):
        read_checkpoint(saved(tmp_path, {"epoch": 3, "loss": [1.0]}))


@pytest.mark.parametrize(
    "prefix",
    ["module.", "model.", "net.", "network.", "backbone.", "encoder.", "_orig_mod.", "module._orig_mod.", "model.net."],
)
def test_prefixes_that_all_names_have_are_removed(prefix, tmp_path):
    content = {"state_dict": {f"{prefix}{key}": value for key, value in TENSORS.items()}}
    assert same(read_checkpoint(saved(tmp_path, content)))


def test_a_prefix_that_only_some_names_have_stays(tmp_path):
    tensors = {"backbone.conv.weight": torch.ones(1), "head.weight": torch.zeros(2)}
    assert same(read_checkpoint(saved(tmp_path, tensors)), tensors)
    compiled = {"backbone._orig_mod.conv.weight": torch.ones(1), "head.weight": torch.zeros(2)}
    assert same(read_checkpoint(saved(tmp_path, compiled)), tensors)


def test_bookkeeping_is_dropped(tmp_path):
    more = {
        "n_averaged": torch.tensor(5),
        "module.total_ops": torch.zeros(1),
        "module.conv.total_params": torch.zeros(1),
    }
    more |= {"module.conv.num_batches_tracked": torch.tensor(3)}
    content = {f"module.{key}": value for key, value in TENSORS.items()} | more
    assert same(read_checkpoint(saved(tmp_path, content)))


class Wrapped(nn.Module):
    """A user's network, whose own names all start with a prefix that wrappers have too."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
def test_a_network_whose_own_names_have_a_prefix_loads_with_and_without_it(prefix, tmp_path):
    original, loaded = Wrapped(), Wrapped()
    inner = {f"{prefix}{key}": value for key, value in original.model.state_dict().items()}
    fit(loaded, read_checkpoint(saved(tmp_path, inner)), "x")
    assert same(loaded.state_dict(), original.state_dict())


def test_integers_for_weights_are_refused():
    model = nn.Conv2d(3, 4, 1)
    tensors = {"weight": torch.ones(4, 3, 1, 1, dtype=torch.int8), "bias": torch.ones(4)}
    with pytest.raises(UserError, match=r"1 not of floating point \(weight is int8\)"):
        fit(model, tensors, "x")
    fit(model, {key: value.half() for key, value in tensors.items()}, "x")
    assert model.weight.dtype == torch.float32 and model.weight.eq(1).all()


# ------------------------------------------------------------------------------------------- layouts


def d_li14(width: float) -> dict[str, torch.Tensor]:
    """A random state dict with the names and shapes of d-li14's MobileNetV2."""

    def divisible(channels: float) -> int:
        divisor = 4 if width == 0.1 else 8
        near = max(divisor, int(channels + divisor / 2) // divisor * divisor)
        return near + divisor if near < 0.9 * channels else near

    tensors = {}

    def conv_norm(conv: str, norm: str, outputs: int, inputs: int, kernel: int) -> None:
        tensors[f"{conv}.weight"] = torch.randn(outputs, inputs, kernel, kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{norm}.{part}"] = torch.rand(outputs) + 0.5

    conv_norm("features.0.0", "features.0.1", inputs := divisible(32 * width), 3, 3)
    stages = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    blocks = [(expansion, divisible(channels * width)) for expansion, channels, count in stages for _ in range(count)]
    for index, (expansion, outputs) in enumerate(blocks, 1):
        block, hidden, first = f"features.{index}.conv", inputs * expansion, 0 if expansion == 1 else 3
        if first:
            conv_norm(f"{block}.0", f"{block}.1", hidden, inputs, 1)
        conv_norm(f"{block}.{first}", f"{block}.{first + 1}", hidden, 1, 3)
        conv_norm(f"{block}.{first + 3}", f"{block}.{first + 4}", outputs, hidden, 1)
        inputs = outputs
    last = divisible(1280 * width) if width > 1 else 1280
    conv_norm("conv.0", "conv.1", last, inputs, 1)
    tensors |= {"classifier.weight": torch.randn(5, last), "classifier.bias": torch.randn(5)}
    return tensors


@pytest.mark.parametrize("width", [0.1, 0.25, 0.35, 0.5, 0.75, 1.0, 1.4])
def test_d_li14s_layout_loads_at_every_width(width, tmp_path):
    tensors = d_li14(width)
    network = build_model("mobilenet_v2", saved(tmp_path, tensors)).model
    own = network.state_dict()
    assert own["features.18.0.weight"].equal(tensors["conv.0.weight"])
    assert own["features.18.1.running_var"].equal(tensors["conv.1.running_var"])
    assert own["features.5.conv.1.0.weight"].equal(tensors["features.5.conv.3.weight"])
    assert own["classifier.1.bias"].equal(tensors["classifier.bias"])
    counted = [key for key in own if not key.endswith("num_batches_tracked")]
    assert len(counted) == len(tensors) == len(to_torchvision_layout(tensors))


def test_an_unknown_width_is_refused(tmp_path):
    tensors = d_li14(0.5)
    tensors["features.17.conv.6.weight"] = torch.randn(99, 480, 1, 1)
    with pytest.raises(UserError, match=r"with 16, 8, 16, 16, 32, 48, 80, 99 channels is of no known width"):
        build_model("mobilenet_v2", saved(tmp_path, tensors))


# ------------------------------------------------------------------------------------- input channels


@pytest.mark.parametrize("channels", [1, 3, 4, 6])
@pytest.mark.parametrize("name", ["mobilenet_v2", "torchvision:resnet18", "timm:resnet18"])
def test_input_channels_follow_the_checkpoint(name, channels, tmp_path):
    model = (
        mobilenet_v2(width=0.25, classes=3) if name == "mobilenet_v2" else torchvision.models.resnet18(num_classes=3)
    )
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.weight = nn.Parameter(torch.randn(first.out_channels, channels, *first.kernel_size))
    first.in_channels = channels
    network = build_model(name, saved(tmp_path, model.state_dict()))
    assert len(network.spec.mean) == len(network.spec.std) == channels
    assert network.spec.prior()[0].shape == (channels,)
    images = network.spec.probe(1)[..., :64, :64]
    assert images.shape == (1, channels, 64, 64)
    torch.testing.assert_close(network.model(images), model.eval()(images))


def grey():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def grey_segmenter():
    return nn.Conv2d(1, 2, 1)


class HeadFirst(nn.Module):
    """Writes its parts down in another order than it runs them in."""

    def __init__(self, channels: int):
        super().__init__()
        self.head, self.stem = nn.Conv2d(8, 5, 1), nn.Conv2d(channels, 8, 3)

    def forward(self, x):
        return self.head(self.stem(x)).mean((2, 3))


def head_first():
    return HeadFirst(3)


def grey_head_first():
    return HeadFirst(1)


def gathers_pixels():
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def gathers_grey_pixels():
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class InDepth(nn.Module):
    """Its channels are the depth of a volume."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x.unsqueeze(1)).mean((2, 3, 4))


@pytest.mark.parametrize(
    ("factory", "channels"),
    {"head_first": 3, "grey_head_first": 1, "gathers_pixels": 3, "gathers_grey_pixels": 1, "InDepth": 3}.items(),
)
def test_input_channels_are_those_that_the_first_convolution_to_run_needs(factory, channels):
    network = build_model(f"{__name__}:{factory}")
    assert len(network.spec.mean) == channels
    network.model(network.spec.probe(1))


def test_input_channels_follow_a_users_network():
    assert build_model(f"{__name__}:grey").spec.mean == (0.449,)
    assert build_model(f"{__name__}:grey_segmenter", build=build_segmenter).spec.std == (0.226,)
    assert build_model("networks:chain").spec.mean == (0.485, 0.456, 0.406)
