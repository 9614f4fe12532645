"""Weights of fewer than 8 bits in files: the engine's integers, how they are stored, and what is refused."""

from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from networks import SPEC, Head, Residual, chain, conv_bn, randomise, settle
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import main_cls
from dfq import Recipe, quantize_data_free
from utils.backends.lowering import lower_to_integers
from utils.backends.onnx_writer import INPUT, WITH_INT4, WITH_MIN
from utils.backends.onnxruntime.export import about_widths, build, check_parity, export
from utils.backends.onnxruntime.session import OnnxNetwork, find_kernels
from utils.core.errors import UserError
from utils.experiment.records import read_lines
from utils.graph.capture import capture
from utils.graph.nodes import weighted_nodes
from utils.passes.exactness import probed_outputs

FULL = Recipe(quantize=True, equalize=True, correction=True)
MIXED = {"bits_weight": 4, "per_channel": True, "bits_first_last": 8}


@cache
def captured(network):
    torch.manual_seed(0)
    return capture(settle(randomise(network())), SPEC)


def quantized(network, **settings):
    return quantize_data_free(captured(network), SPEC, replace(FULL, **settings))


@pytest.mark.parametrize("opset", [None, WITH_INT4, WITH_MIN])
@pytest.mark.parametrize("weight_type", ["int8", "uint8"])
@pytest.mark.parametrize(
    "settings",
    [
        {"bits_weight": 6},
        {"bits_weight": 4},
        MIXED,
        {**MIXED, "asymmetric": True},
        {"bits_weight": 3, "asymmetric": True},
        {"bits_weight": 2, "relu": True},
    ],
)
@pytest.mark.parametrize("network", [chain, Residual])
def test_weights_of_fewer_bits_run_on_integers(network, settings, weight_type, opset):
    result = quantized(network, **settings)
    model = build(result, SPEC, {}, opset, weight_type=weight_type)
    parity = check_parity(model, result.simulated, SPEC.probe(6))
    assert parity.agreement == 1 and not any(layer.off or layer.far for layer in parity.layers)
    assert not find_kernels(model, result.simulated).floating
    images = SPEC.probe(16, seed=9)
    found = probed_outputs(OnnxNetwork(model.SerializeToString()), images)[0]
    expected = probed_outputs(lower_to_integers(result.simulated), images)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def stored(model, layer):
    """A layer's weights as the file's constants say them, by ONNX's own reading, and the type that they are held in."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kind = next(kind for kind in ("int4", "uint4", "int8", "uint8") if f"{layer}_weight_{kind}" in constants)
    steps = torch.from_numpy(constants[f"{layer}_weight_{kind}"].astype(np.int64))
    along = [-1] + [1] * (steps.dim() - 1)
    scale, zero = (torch.tensor(constants[f"{layer}_weight_{part}"]) for part in ("scale", "zero_point"))
    if (own := constants.get(f"{layer}_weight_own_zero_point")) is not None:
        zero = torch.tensor(own).flatten() + (128 if kind == "uint4" else 0)
    return (steps - zero.long().reshape(along)) * scale.double().reshape(along), kind


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("weight_type", ["int8", "uint8"])
@pytest.mark.parametrize(("opset", "bits"), [(20, 8), (WITH_INT4, 4)])
def test_a_file_holds_the_weights_of_the_simulation(opset, bits, weight_type, asymmetric):
    result = quantized(Residual, **MIXED, asymmetric=asymmetric)
    model, kinds = build(result, SPEC, {}, opset, weight_type=weight_type), []
    for node in weighted_nodes(result.simulated):
        weight, held = stored(model, node.name)
        layer = result.simulated.get_submodule(node.target)
        torch.testing.assert_close(weight, layer.weight.double(), rtol=1e-6, atol=0)
        kinds.append(held)
    small = weight_type.replace("8", str(bits))
    assert kinds == [weight_type, small, small, weight_type]


@pytest.mark.parametrize(("weight_type", "middle"), [("int8", 0), ("uint8", 128)])
@pytest.mark.parametrize(("bits", "opset"), [(2, None), (4, None), (4, WITH_INT4), (7, WITH_INT4)])
def test_no_kernel_is_told_of_zero_points_of_channels(bits, opset, weight_type, middle):
    """Weights of fewer bits are counted from zero in 8, whatever their zero points, which kernels are slow with."""
    result = quantized(Residual, bits_weight=bits, per_channel=True, asymmetric=True)
    layers = [result.simulated.get_submodule(node.target) for node in weighted_nodes(result.simulated)]
    assert len(torch.cat([layer.weight_qparams.zero_point for layer in layers]).unique()) > 1
    model = build(result, SPEC, {}, opset, weight_type=weight_type)
    zeros = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("weight_zero_point")]
    assert len(zeros) == len(layers) and all((zero == middle).all() for zero in zeros)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_file_means_the_same_to_the_reference_of_onnx(asymmetric):
    result = quantized(chain, bits_weight=4, per_channel=True, asymmetric=asymmetric)
    model, images = build(result, SPEC, {}, WITH_INT4), SPEC.probe(2)
    (found,) = ReferenceEvaluator(model).run(None, {INPUT: images.numpy()})
    expected = probed_outputs(lower_to_integers(result.simulated), images)[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def large():
    return nn.Sequential(conv_bn(3, 64), conv_bn(64, 128), conv_bn(128, 128))


def test_opset_21_halves_weights_of_4_bits_and_the_summary_says_so(tmp_path):
    result = quantized(large, bits_weight=4)
    files = [tmp_path / name for name in ("eight.onnx", "four.onnx")]
    told = [export(result, SPEC, file, {}, opset=opset) for file, opset in zip(files, (None, WITH_INT4), strict=True)]
    count = sum(layer.weight.numel() for layer in map(result.simulated.get_submodule, ("0.0", "1.0", "2.0")))
    assert abs(told[0].size - told[1].size - count / 2) < 1000
    assert "3 layers' weights of 4 bits or fewer are stored in 8" in str(told[0]) and "--opset 21" in str(told[0])
    assert "3 layers' weights are stored in 4 bits, which ONNX Runtime 1.23 or newer reads" in str(told[1])
    images = SPEC.probe(4, seed=2)
    assert torch.equal(*(OnnxNetwork(file)(images) for file in files))
    assert not about_widths(build(quantized(large), SPEC, {}, WITH_INT4), quantized(large))


class Kinds(nn.Module):
    """Layers of odd sizes, and of the kinds that ONNX writes otherwise: transposed, dilated with groups, on tokens."""

    def __init__(self):
        super().__init__()
        self.stem, self.up = (
            conv_bn(3, 5),
            nn.Sequential(nn.ConvTranspose2d(5, 7, 3, stride=2), nn.BatchNorm2d(7), nn.ReLU()),
        )
        self.groups = nn.Sequential(nn.Conv2d(7, 7, 3, groups=7, dilation=2), nn.BatchNorm2d(7), nn.ReLU())
        self.tokens, self.head = nn.Linear(7, 9), Head(9, 3)

    def forward(self, x):
        x = self.groups(self.up(self.stem(x)))
        return self.head(torch.relu(self.tokens(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2))


@pytest.mark.parametrize("weight_type", ["int8", "uint8"])
@pytest.mark.parametrize("settings", [{}, {"per_channel": True, "asymmetric": True}])
def test_all_kinds_of_layers_are_stored_in_4_bits(settings, weight_type):
    result = quantized(Kinds, bits_weight=4, **settings)
    model = build(result, SPEC, {}, WITH_INT4, weight_type=weight_type)
    kind = {"int8": onnx.TensorProto.INT4, "uint8": onnx.TensorProto.UINT4}[weight_type]
    assert sum(tensor.data_type == kind for tensor in model.graph.initializer) == 5
    check_parity(model, result.simulated, SPEC.probe(4))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--export", "net.onnx", "--bits_activation", "4"],
            "--export is for integer engines, and ONNX Runtime has no kernels for --bits_activation 4, only for 8; this "
            "can only be simulated: leave out --export, or --bits_activation",
        ),
        (["--engine", "onnxruntime", "--bits_activation", "4"], "leave out --engine onnxruntime, or --bits_activation"),
        (["--export", "net.onnx", "--bits_weight", "9"], "no kernels for --bits_weight 9, only for 2 to 8;"),
        (["--export", "net.onnx", "--bits_first_last", "4"], "no kernels for --bits_first_last 4, only for 8;"),
        (["--engine", "onnxruntime", "--bits_bias", "16"], "no kernels for --bits_bias 16, only for 32;"),
        (["--target", "openvino", "--bits_weight", "4"], "no kernels for --bits_weight 4, only for 8 or 7;"),
        (["--target", "tensorrt", "--bits_weight", "4"], "no kernels for --bits_weight 4, only for 8;"),
        (
            ["--target", "tensorrt", "--bits_weight", "4", "--export", "net.onnx"],
            "--target tensorrt has no kernels for --b",
        ),
        (["--target", "openvino", "--bits_first_last", "7"], "no kernels for --bits_first_last 7, only for 8;"),
    ],
)
def test_widths_without_kernels_are_refused_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main_cls.parse_args(["--quantize", *flags])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and ended.value.code == 2


def test_a_network_that_can_only_be_simulated_is_refused_by_its_layer(tmp_path):
    result = quantized(chain, bits_weight=4, bits_activation=4)
    with pytest.raises(UserError, match=r"have 4 bits, and ONNX Runtime has no kernels .* only for 8; .* be simulated"):
        export(result, SPEC, tmp_path / "net.onnx", {})
    assert not list(tmp_path.iterdir())


def test_the_demo_runs_with_weights_of_4_bits_from_files_of_both_kinds(tmp_path, capsys):
    few = ["--limit", "8", "--workers", "0", "--results", str(tmp_path / "runs.jsonl")]
    bits = ["--bits_weight", "4", "--per_channel", "--bits_first_last", "8"]
    kept, first, second = (str(tmp_path / name) for name in ("net.dfq", "first.onnx", "second.onnx"))
    main_cls.main(
        [*few, "--quantize", "--equalize", *bits, "--save", kept, "--export", first, "--engine", "onnxruntime"]
    )
    main_cls.main([*few, "--load", kept, "--engine", "onnxruntime", "--opset", "21"])
    main_cls.main(["--load", kept, "--export", second, "--opset", "21"])
    printed = capsys.readouterr().out
    assert printed.count("runs 53 of 53 layers on integers") == 4
    assert (
        "51 layers' weights of 4 bits or fewer are stored in 8" in printed
        and "51 layers' weights are stored" in printed
    )
    lines = read_lines(tmp_path / "runs.jsonl")
    assert lines[0]["metrics"]["quantized"] == lines[1]["metrics"]["quantized"] and lines[0]["agreement"] == 100
    assert OnnxNetwork(tmp_path / "second.onnx").session.get_inputs()[0].name == INPUT
    assert (tmp_path / "second.onnx").stat().st_size < 0.7 * (tmp_path / "first.onnx").stat().st_size
