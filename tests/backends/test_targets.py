"""Every target's file computes what its simulation says, and keeps its engine's rules."""

import os
import subprocess
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
import torch
from networks import NETWORKS, SPEC, Branches, Residual, chain, randomise, relu_chain, settle
from onnx import helper, numpy_helper

import main_cls
from dfq import Recipe, quantize_data_free
from utils.backends import base
from utils.backends.base import load_engine
from utils.backends.lowering import lower_to_integers
from utils.backends.onnxruntime import export as exporting
from utils.backends.onnxruntime.export import build, check_parity, export
from utils.backends.onnxruntime.session import OnnxNetwork
from utils.backends.tensorrt.rules import RULES, check_tensorrt
from utils.backends.torch_export import export_program
from utils.core.errors import UserError
from utils.experiment.records import read_lines
from utils.graph.capture import capture
from utils.graph.nodes import outputs_of, weighted_nodes
from utils.passes.exactness import probed_outputs as run
from utils.quantization.target import TARGETS

FULL = Recipe(quantize=True, equalize=True, correction=True)
needs_openvino = pytest.mark.skipif(
    find_spec("openvino") is None, reason="OpenVINO is not installed: pip install openvino"
)


@cache
def captured(network):
    torch.manual_seed(0)
    return capture(settle(randomise(network())), SPEC)


@cache
def made(network, target, **settings):
    result = quantize_data_free(captured(network), SPEC, replace(FULL, target=target, **settings))
    return result, build(result, SPEC, {}, target=TARGETS[target])


def agreement(first, second):
    return (first.argmax(1) == second.argmax(1)).float().mean()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_computes_layer_by_layer_what_the_simulation_does(name, target):
    result, model = made(NETWORKS[name], target)
    assert check_parity(model, result.simulated, SPEC.probe(6), target=TARGETS[target]).agreement == 1
    images = SPEC.probe(64, seed=9)
    expected = run(lower_to_integers(result.simulated), images)[0]
    assert agreement(run(OnnxNetwork(model.SerializeToString()), images)[0], expected) >= 0.98
    assert agreement(run(result.float, images)[0], expected) >= 0.9


# --------------------------------------------------------------------------------------- TensorRT


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_files_for_tensorrt_keep_its_rules(name, relu):
    result, model = made(NETWORKS[name], "tensorrt", relu=relu)
    check_tensorrt(model)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kinds = {values.dtype for name, values in constants.items() if name.endswith("_zero_point")}
    assert kinds == {np.dtype(np.int8)}
    for node in weighted_nodes(result.simulated):
        assert constants[f"{node.name}_weight_scale"].size == constants[f"{node.name}_weight_int8"].shape[0]
        assert constants[f"{node.name}_bias"].dtype == np.float32
    adds = [node for node in model.graph.node if node.op_type == "Add"]
    assert len(adds) == (1 if name == "residual" else 0)


@pytest.mark.parametrize("place", range(4))
def test_a_layer_kept_in_float_has_its_float_weights_in_a_file_for_tensorrt(place):
    names = [node.target for node in weighted_nodes(captured(chain))]
    result, model = made(chain, "tensorrt", float_layers=(names[place],))
    parity = check_parity(model, result.simulated, SPEC.probe(6), target=TARGETS["tensorrt"])
    assert parity.agreement == 1 and parity.max_steps < 0.1
    kept = next(node for node in weighted_nodes(result.simulated) if node.target == names[place])
    stored = next(one for one in model.graph.initializer if one.name == f"{kept.name}_weight")
    assert np.array_equal(numpy_helper.to_array(stored), result.float.get_submodule(names[place]).weight.detach())


def test_a_file_for_another_target_breaks_them():
    _, model = made(chain, "onnxruntime")
    with pytest.raises(UserError, match=r"TensorRT would not take this file: QuantizeLinear .* int8"):
        check_tensorrt(model)


def _constant(model, ending, change):
    tensor = next(one for one in model.graph.initializer if one.name.endswith(ending))
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))


def _skip(model, kind, place):
    """Make an input of the first node of that kind the float value before its quantizer."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    node = next(one for one in model.graph.node if one.op_type == kind)
    dequantize = made_by[node.input[place]]
    quantize = made_by.get(dequantize.input[0])
    node.input[place] = quantize.input[0] if quantize is not None else "floats"


def _quantize_bias(model):
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    weight = next(node for node in model.graph.node if conv.input[1] in node.output)
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["b", *weight.input[1:]], ["bias"], name="bias"))
    conv.input[2] = "bias"


def _clip_integers(model):
    quantize = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    dequantize = next(node for node in model.graph.node if quantize.output[0] in node.input)
    model.graph.node.append(helper.make_node("Min", [quantize.output[0]], ["capped"], name="Min"))
    dequantize.input[0] = "capped"


BREAKS = {
    "never uint8": lambda m: _constant(m, "images_quantizer_zero_point", lambda zero: zero.astype(np.uint8)),
    "zero points are 0": lambda m: _constant(m, "images_quantizer_zero_point", lambda zero: zero + np.int8(1)),
    "scales are constants": lambda m: _constant(m, "images_quantizer_scale", lambda scale: -scale),
    "biases are in float": _quantize_bias,
    "activations have one scale": lambda m: _constant(m, "images_quantizer_scale", lambda scale: np.repeat(scale, 3)),
    "weights have one scale": lambda m: _constant(m, "_weight_scale", lambda scale: scale[:2]),
    "a layer's input and its weights": lambda m: _skip(m, "Conv", 0),
    "both operands of a sum": lambda m: _skip(m, "Add", 1),
    "nothing stands between": _clip_integers,
}


@pytest.mark.parametrize("rule", BREAKS)
def test_each_rule_is_checked(rule):
    _, model = made(Residual, "tensorrt")
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    BREAKS[rule](broken)
    with pytest.raises(UserError, match=f"TensorRT would not take this file: .*{rule}"):
        check_tensorrt(broken)


def test_every_rule_has_its_source_and_its_test():
    assert len(RULES) == len(BREAKS)
    assert all(sum(name in rule.text for name in BREAKS) == 1 and rule.source for rule in RULES)


def test_an_export_for_tensorrt_says_that_it_was_not_run_there(tmp_path):
    result, _ = made(chain, "tensorrt")
    told = export(result, SPEC, tmp_path / "net.onnx", {}, target=TARGETS["tensorrt"])
    assert "not run on its hardware" in str(told) and "its bias is not quantized" not in str(told)
    check_tensorrt(tmp_path / "net.onnx")


# --------------------------------------------------------------------------------------- OpenVINO


@needs_openvino
@pytest.mark.parametrize("settings", [{}, {"relu": True}, {"per_channel": True}, {"bits_weight": 7}])
@pytest.mark.parametrize("network", [chain, relu_chain, Residual, Branches])
def test_openvino_computes_on_integers_what_the_simulation_does(network, settings):
    result, model = made(network, "openvino", **settings)
    parity = check_parity(model, result.simulated, SPEC.probe(6), engine="openvino", target=TARGETS["openvino"])
    assert parity.agreement == 1
    kernels = load_engine("openvino").find_kernels(model, result.simulated)
    assert not kernels.floating and len(kernels.integer) == len(weighted_nodes(result.simulated))
    images = SPEC.probe(64, seed=9)
    found = outputs_of(load_engine("openvino").network(model.SerializeToString())(images))[0]
    assert agreement(found, run(lower_to_integers(result.simulated), images)[0]) >= 0.98


@needs_openvino
def test_weights_with_zero_points_would_run_in_float():
    result, _ = made(relu_chain, "onnxruntime")
    kernels = load_engine("openvino").find_kernels(build(result, SPEC, {}), result.simulated)
    assert "OpenVINO runs it in f32" in kernels.floating.values()


@needs_openvino
def test_an_export_for_openvino_is_held_to_it(tmp_path):
    result, _ = made(Residual, "openvino")
    told = str(export(result, SPEC, tmp_path / "net.onnx", {}, target=TARGETS["openvino"]))
    assert "OpenVINO runs 4 of 4 layers on integers" in told and "note" not in told


def test_without_openvino_an_export_says_what_it_was_compared_in(tmp_path, monkeypatch):
    missing = {name: name == "openvino" for name in base.ENGINES}
    monkeypatch.setattr(exporting, "missing_package", lambda name: name if missing[name] else None)
    result, _ = made(Residual, "openvino")
    told = str(export(result, SPEC, tmp_path / "net.onnx", {}, target=TARGETS["openvino"]))
    assert "compared in ONNX Runtime: OpenVINO is not installed here (pip install openvino)" in told


def test_openvino_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda name: None if name == "openvino" else object())
    with pytest.raises(UserError, match="--engine openvino needs the package openvino; pip install openvino"):
        load_engine("openvino")


@needs_openvino
def test_the_demo_runs_in_openvino(tmp_path):
    flags = ["--quantize", "--equalize", "--correction", "--target", "openvino", "--engine", "openvino"]
    main_cls.main([*flags, "--limit", "24", "--workers", "0", "--results", str(tmp_path / "r.jsonl")])
    (line,) = read_lines(tmp_path / "r.jsonl")
    assert line["engine"] == line["flags"]["target"] == "openvino" and line["agreement"] > 99


# -------------------------------------------------------------------------------------- torch.export


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_program_is_the_simulation_at_any_batch(name, target, tmp_path):
    result, _ = made(NETWORKS[name], target)
    assert "equal to the simulation" in export_program(result.simulated, SPEC, tmp_path / "net.pt2", {"recipe": "x"})
    told = {"dfq.json": ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=told).module()
    images = SPEC.probe(5, seed=3)
    assert torch.equal(outputs_of(program(images))[0], run(lower_to_integers(result.simulated), images)[0])
    assert told["dfq.json"] == '{"recipe": "x"}'


def test_the_demo_is_written_as_a_program(tmp_path, capsys):
    file = tmp_path / "net.pt2"
    flags = ["--quantize", "--bits_weight", "6", "--limit", "4", "--workers", "0", "--export", str(file)]
    main_cls.main([*flags, "--results", str(tmp_path / "r.jsonl")])
    assert file.is_file() and f"exported {file}: torch.export" in capsys.readouterr().out


# ------------------------------------------------------------------------------- older ONNX Runtime

OLD = os.environ.get("OLD_ONNXRUNTIME")
HOW = (
    "needs an environment of its own: python3.10 -m venv DIR; DIR/bin/pip install onnxruntime==1.16.3 'numpy<2'; then "
    "OLD_ONNXRUNTIME=DIR/bin/python"
)
RUN = """
import sys, numpy, onnxruntime
assert onnxruntime.__version__.startswith("1.16"), onnxruntime.__version__
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {"images": numpy.load(sys.argv[2])})[0])
"""


@pytest.mark.skipif(OLD is None, reason=HOW)
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("network", [chain, Residual, Branches])
def test_onnxruntime_1_16_computes_the_same(network, target, tmp_path):
    result, model = made(network, target)
    assert model.opset_import[0].version == 13
    onnx.save(model, tmp_path / "net.onnx")
    images = SPEC.probe(32)
    np.save(tmp_path / "in.npy", images.numpy())
    files = [str(tmp_path / name) for name in ("net.onnx", "in.npy", "out.npy")]
    subprocess.run([OLD, "-c", RUN, *files], check=True, env={})
    found = torch.from_numpy(np.load(tmp_path / "out.npy"))
    expected = run(lower_to_integers(result.simulated), images)[0]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
