"""ONNX files, the engine that runs them, and the gate that holds it to the simulation."""

import json
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import SPEC, Branches, Head, Residual, chain, conv_bn, randomise, settle
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import main_cls
import main_det
import main_seg
import utils.backends.onnxruntime.export as runtime_export
from dfq import Recipe, quantize_data_free
from utils.backends.lowering import IntegerSum, lower_to_integers
from utils.backends.onnx_writer import INPUT
from utils.backends.onnxruntime.export import _about_caps, build, check_parity, export
from utils.backends.onnxruntime.session import OnnxNetwork, find_kernels
from utils.core.errors import UserError
from utils.core.networks import scored
from utils.experiment import cli
from utils.experiment import deployment as experiment
from utils.experiment.records import read_lines
from utils.graph.capture import capture
from utils.graph.layers import WEIGHTED
from utils.graph.nodes import weighted_nodes
from utils.passes.exactness import probed_outputs
from utils.quantization import serialization
from utils.quantization.target import TARGETS

FULL = Recipe(quantize=True, equalize=True, correction=True)


@cache
def captured(network):
    torch.manual_seed(0)
    return capture(settle(randomise(network())), SPEC)


def quantized(network, recipe=FULL):
    return quantize_data_free(captured(network), SPEC, recipe)


def parity_of(result):
    model = build(result, SPEC, {})
    return model, check_parity(model, result.simulated, SPEC.probe(6))


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"per_channel": True},
        {"asymmetric": True},
        {"relu": True},
        {"per_channel": True, "asymmetric": True, "bits_weight": 7},
    ],
)
@pytest.mark.parametrize("network", [chain, Residual, Branches])
def test_networks_run_on_integers(network, flags):
    result = quantized(network, replace(FULL, **flags))
    model, parity = parity_of(result)
    assert parity.agreement > 0.97
    kernels = find_kernels(model, result.simulated)
    assert not kernels.floating and len(kernels.integer) == len(weighted_nodes(result.simulated))


@pytest.mark.parametrize(("kind", "middle"), [("int8", 0), ("uint8", 128)])
def test_weights_are_stored_as_integers_and_the_file_is_a_quarter(kind, middle, tmp_path):
    result = quantized(lambda: nn.Sequential(conv_bn(3, 64), conv_bn(64, 128), conv_bn(128, 128)))
    about = {"recipe": "+LE+BC", "classes": {"0": "cat"}}
    told = export(result, SPEC, tmp_path / "net.onnx", about, weight_type=kind)
    assert 0.24 < told.size / told.float_size < 0.3
    model = onnx.load(tmp_path / "net.onnx")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {name: values for name, values in constants.items() if name.endswith(f"_weight_{kind}")}
    biases = [values.dtype for name, values in constants.items() if name.endswith("_bias_int32")]
    assert [values.dtype for values in weights.values()] == [np.dtype(kind)] * 3 and biases == [np.int32] * 3
    zeros = [constants[name.replace(f"_{kind}", "_zero_point")] for name in weights]
    assert all(zero.dtype == np.dtype(kind) and (zero == middle).all() for zero in zeros)
    assert model.opset_import[0].version == 13 and model.ir_version == 7
    said = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert said == {"recipe": "+LE+BC", "classes": {"0": "cat"}, "float_layers": []}
    # The last layer's output is the network's, in float: ONNX Runtime computes it so, from integer weights.
    assert "2 of 3 layers on integers" in str(told) and "opset 13" in str(told)


def saturating():
    """Pairs of products of 255 and 127, which do not fit into 16 signed bits."""
    network = nn.Sequential(conv_bn(3, 32, 1), nn.Conv2d(32, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    network[0][0].weight.data.fill_(1.0)
    for layer in (network[1], network[3]):
        layer.weight.data.copy_(torch.linspace(0.99, 1, layer.weight.numel()).view_as(layer.weight))
    return network


@pytest.mark.parametrize("per_channel", [False, True])
def test_large_weights_are_exact_in_a_session_with_default_options(per_channel, tmp_path):
    result = quantized(saturating, Recipe(quantize=True, per_channel=per_channel))
    export(result, SPEC, tmp_path / "net.onnx", {})
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    images = 3 + SPEC.probe(4)  # all inputs at the top of their range
    found = torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])
    torch.testing.assert_close(found, lower_to_integers(result.simulated)(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, result.simulated(images), rtol=0.02, atol=0.02)


def test_weights_are_uint8_where_sums_with_int8_saturate(tmp_path, monkeypatch):
    """Whichever the processor here is: the file of either kind gives the same integers, and says where it is good."""
    result, files, found = quantized(saturating, Recipe(quantize=True)), {}, []
    for exact in (True, False):
        monkeypatch.setattr(runtime_export, "sums_exactly", lambda exact=exact: exact)
        files[exact] = tmp_path / f"{exact}.onnx"
        told = str(export(result, SPEC, files[exact], {}))
        assert ("weights are int8" in told, "weights are uint8" in told) == (exact, not exact)
        found.append(OnnxNetwork(files[exact])(SPEC.probe(4)))
        constants = onnx.load(files[exact]).graph.initializer
        held = {tensor.name.rpartition("_")[2] for tensor in constants if "_weight_" in tensor.name}
        assert held - {"scale", "point"} == {"int8" if exact else "uint8"}
    assert torch.equal(*found)


def test_a_target_of_one_weight_type_refuses_another(tmp_path):
    result = quantized(chain, Recipe(quantize=True, target="openvino"))
    with pytest.raises(UserError, match=r"OpenVINO hold weights as int8 alone; leave out --weight_type"):
        export(result, SPEC, tmp_path / "net.onnx", {}, target=TARGETS["openvino"], weight_type="uint8")
    assert not list(tmp_path.iterdir())


class Tokens(nn.Module):
    """Linear layers over tokens [N, T, C], beside a sum."""

    def __init__(self):
        super().__init__()
        self.patches, self.head = conv_bn(3, 12, 4, stride=4), nn.Linear(12, 5)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.second(torch.relu(self.first(x)))).mean(1))


@pytest.mark.parametrize(
    ("flags", "opset"),
    [({"float_layers": ("first",)}, None), ({"float_layers": ("second",)}, None), ({"target": "tensorrt"}, 21)],
)
def test_layers_over_tokens_are_what_was_simulated(flags, opset, tmp_path):
    result = quantized(Tokens, replace(FULL, **flags))
    target = TARGETS[flags.get("target", "onnxruntime")]
    told = export(result, SPEC, tmp_path / "net.onnx", {}, opset=opset, target=target)
    assert told.parity.agreement == 1 and not any(layer.off or layer.far for layer in told.parity.layers)


class Named(nn.Module):
    """Two outputs by name."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = conv_bn(3, 8), Head(8)

    def forward(self, x):
        x = self.stem(x)
        return {"logits": self.head(x), "features": x}


def test_outputs_have_the_networks_names(tmp_path):
    torch.manual_seed(0)
    network = settle(randomise(Named()))
    spec = replace(SPEC, size=(12, 12), resize=12)
    example = network(spec.probe(2))
    result = quantize_data_free(scored(network, spec, 2), spec, FULL)
    export(result, spec, tmp_path / "net.onnx", {})
    found = OnnxNetwork(tmp_path / "net.onnx").tensors(spec.probe(2))
    assert list(found) == list(result.simulated.meta["outputs"]) == ["logits", "features"]
    for name, values in example.items():
        assert found[name].shape == values.shape
        assert (found[name] - values).abs().mean() < 0.2 * values.abs().max()

    graph = capture(scored(network, spec, 2), spec)
    parts = graph, result.float, result.simulated, asdict(FULL), spec, "classification", "net", "here"
    serialization.save(tmp_path / "net.dfq", serialization.Saved(*parts))
    loaded = serialization.load(tmp_path / "net.dfq", "classification")
    assert loaded.simulated.meta["outputs"] == loaded.model.meta["outputs"] == ("logits", "features")


def test_any_batch_runs(tmp_path):
    result = quantized(chain)
    export(result, SPEC, tmp_path / "net.onnx", {})
    engine, images = OnnxNetwork(tmp_path / "net.onnx"), SPEC.probe(5)
    apart = torch.cat([engine(images[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(engine(images), apart)
    torch.testing.assert_close(engine(images), probed_outputs(result.simulated, images)[0], atol=0.1, rtol=0.05)


def test_an_engine_that_computes_something_else_is_caught_at_its_layer():
    result = quantized(chain)
    model = build(result, SPEC, {})
    for tensor in model.graph.initializer:
        if tensor.name == "_1_0_weight_scale":
            changed = onnx.numpy_helper.to_array(tensor) * 1.2
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed.astype("float32"), tensor.name))
    with pytest.raises(UserError, match=r"disagree at '1\.\d'"):
        check_parity(model, result.simulated, SPEC.probe(4))


def test_a_bias_too_large_for_the_accumulator_gets_room():
    model = settle(randomise(chain()))
    first = model[0][0]
    first.weight.data[0] *= 1e-9  # a channel of nothing but a bias
    norm = model[0][1]
    norm.running_var[0], norm.running_mean[0] = 1e-12, -1.0
    result = quantize_data_free(model, SPEC, Recipe(quantize=True, per_channel=True))
    _, parity = parity_of(result)
    assert parity.agreement > 0.97


@pytest.mark.parametrize("opset", [13, 21, 22])
def test_a_float_layer_stays_in_float_at_any_opset(opset):
    result = quantized(chain, replace(FULL, float_layers=("1.0",)))
    model = build(result, SPEC, {}, opset)
    check_parity(model, result.simulated, SPEC.probe(4))
    assert find_kernels(model, result.simulated).floating == {"1.0": "its weights are not quantized"}
    assert bool(_about_caps(model)) == (opset < 22)  # what is written the faster way is not advised


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--export", "net.onnx"], "--export needs --quantize, --auto or --load"),
        (["--engine", "onnxruntime"], "--engine onnxruntime needs --quantize, --auto or --load"),
        (["--quantize", "--opset", "17"], "--opset needs --export, or an --engine that is not simulate"),
        (["--quantize", "--export", "net.onnx", "--opset", "12"], "--opset: '12' is not an ONNX opset from 13 to 22"),
        (["--load", "net.dfq", "--relu"], "leave out --relu"),
        (["--table", "--save", "net.dfq"], "leave out --table"),
    ],
)
def test_flags_that_an_engine_cannot_serve(flags, message, capsys):
    with pytest.raises(SystemExit):
        main_cls.parse_args(flags)
    assert message in capsys.readouterr().err


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(UserError, match="needs the package onnxruntime; pip install onnxruntime"):
        main_cls.main(["--quantize", "--engine", "onnxruntime", "--results", str(tmp_path / "r.jsonl")])


def test_a_folder_that_is_not_there_is_refused_before_the_work(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        main_cls.main(["--quantize", "--export", str(tmp_path / "no" / "net.onnx")])


@pytest.mark.parametrize("script", [main_cls, main_seg, main_det])
def test_saved_loaded_and_exported_it_is_the_same_network(script, tmp_path, capsys):
    """The demo, quantized once and scored three ways: in simulation, in the engine, and loaded from a file."""
    few = ["--limit", "12", "--workers", "0", "--results", str(tmp_path / "runs.jsonl")]
    kept, first, second = (str(tmp_path / name) for name in ("net.dfq", "first.onnx", "second.onnx"))
    script.main([*few, "--quantize", "--equalize", "--correction", "--save", kept, "--export", first])
    script.main([*few, "--load", kept, "--engine", "onnxruntime"])
    script.main(["--load", kept, "--export", second, "--opset", "13"])
    plain, engine = read_lines(tmp_path / "runs.jsonl")
    assert plain["metrics"]["quantized"] == engine["metrics"]["simulated"]
    assert plain["metrics"]["fp32_original"] == engine["metrics"]["fp32_original"]
    assert engine["engine"] == "onnxruntime" and engine["agreement"] > 99
    graphs = [onnx.load(file).graph.SerializeToString() for file in (first, second)]
    assert graphs[0] == graphs[1]
    assert "53 of 53 layers" in capsys.readouterr().out or script is not main_cls


def test_a_folder_is_no_saved_network(tmp_path):
    with pytest.raises(UserError, match=r"is a folder; pass --load with a file that --save wrote"):
        main_cls.main(["--load", str(tmp_path), "--export", str(tmp_path / "net.onnx")])


def own():
    return settle(chain())


def test_a_saved_network_of_the_users_is_not_scored_on_the_demos_images(tmp_path):
    kept = str(tmp_path / "net.dfq")
    main_cls.main(["--model", "test_export:own", "--image_size", "32", "--quantize", "--save", kept])
    with pytest.raises(UserError, match=r"no data to evaluate on: .* is not the demo's network; pass --data DIR"):
        main_cls.main(["--load", kept, "--results", str(tmp_path / "runs.jsonl")])
    assert not (tmp_path / "runs.jsonl").exists()


def test_an_engine_that_agrees_too_seldom_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "AGREEMENT", 1.01)
    flags = ["--quantize", "--equalize", "--engine", "onnxruntime", "--limit", "4", "--workers", "0"]
    with pytest.raises(UserError, match=r"where 101% are asked for; they first part at \S+, and nothing was recorded"):
        main_cls.main([*flags, "--results", str(tmp_path / "runs.jsonl")])
    assert not (tmp_path / "runs.jsonl").exists() or not (tmp_path / "runs.jsonl").read_text()


@pytest.mark.parametrize("flags", [{}, {"relu": True}, {"per_channel": True}, {"asymmetric": True}])
@pytest.mark.parametrize("network", [chain, Residual, Branches])
def test_what_is_scored_computes_on_the_engines_integers(network, flags):
    result = quantized(network, replace(FULL, **flags))
    lowered = lower_to_integers(result.simulated)
    images = SPEC.probe(64, seed=9)
    expected = probed_outputs(OnnxNetwork(build(result, SPEC, {}).SerializeToString()), images)[0]
    torch.testing.assert_close(probed_outputs(lowered, images)[0], expected, rtol=1e-5, atol=1e-5)
    between = [layer for layer in lowered.modules() if isinstance(layer, WEIGHTED)][:-1]
    assert all(torch.equal(values, values.round()) for layer in between for values in (layer.weight, layer.bias))


@pytest.mark.parametrize("seed", range(8))
def test_a_sum_of_steps_rounds_as_the_engines_kernel(seed):
    generator = torch.Generator().manual_seed(seed)
    scales = (torch.rand(3, generator=generator) + 0.5).mul_(0.02 if seed % 2 else 0.02 / 3).tolist()
    zeros = torch.randint(0, 256, (3,), generator=generator).tolist()
    inputs = [part.byte().view(1, 1, 256, 256) for part in torch.meshgrid(*[torch.arange(256)] * 2, indexing="ij")]
    grids = [
        (numpy_helper.from_array(np.float32(scales[i]), f"s{i}"), numpy_helper.from_array(np.uint8(zeros[i]), f"z{i}"))
        for i in range(3)
    ]
    nodes = [helper.make_node("DequantizeLinear", [f"x{i}", f"s{i}", f"z{i}"], [f"f{i}"]) for i in range(2)]
    nodes += [
        helper.make_node("Add", ["f0", "f1"], ["sum"]),
        helper.make_node("QuantizeLinear", ["sum", "s2", "z2"], ["y"]),
    ]
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.UINT8, ["N", 1, 256, 256]) for name in names]
        for names in (["x0", "x1"], ["y"])
    ]
    graph = helper.make_graph(nodes, "sum", *ends, [part for grid in grids for part in grid])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {f"x{i}": part.numpy() for i, part in enumerate(inputs)})[0]
    steps = [part.float() - zero for part, zero in zip(inputs, zeros, strict=False)]
    found = IntegerSum(*((float(np.float32(s)), z) for s, z in zip(scales, zeros, strict=True)))(*steps) + zeros[2]
    assert torch.equal(found.clamp(0, 255).byte(), torch.from_numpy(expected))


def test_a_saved_network_of_another_version_is_refused(tmp_path):
    kept = tmp_path / "net.dfq"
    main_cls.main(
        ["--limit", "2", "--workers", "0", "--results", str(tmp_path / "r.jsonl"), "--quantize", "--save", str(kept)]
    )
    content = torch.load(kept, weights_only=True)
    content["recipe"]["telepathy"] = True
    torch.save(content, kept)
    with pytest.raises(UserError, match=r"of another version .*'telepathy'"):
        main_cls.main(["--load", str(kept), "--export", str(tmp_path / "net.onnx")])


class Late(nn.Module):
    """A ReLU behind what only moves a layer's values."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = conv_bn(3, 8, activation=None), nn.Sequential(conv_bn(8, 8), Head(8))

    def forward(self, x):
        return self.last(torch.relu(self.stem(x).transpose(2, 3)))


def test_moved_values_that_a_quantizer_reads_are_not_quantized_before_it_once_more():
    model, parity = parity_of(quantized(Late))
    made_by = {output: node for node in model.graph.node for output in node.output}
    for node in (node for node in model.graph.node if node.op_type == "QuantizeLinear"):
        source = made_by.get(node.input[0])
        while source is not None and source.op_type == "Relu":
            source = made_by.get(source.input[0])
        assert source is None or source.op_type != "DequantizeLinear"
    parity.check()
