"""A quantized network as a file of plain data."""

from dataclasses import asdict

import pytest
import torch
from networks import SMALL, SPEC, Branches, Residual, chain, made, randomise, settle
from torch import nn

from dfq import Recipe, quantize_data_free
from utils.backends.lowering import lower_to_integers
from utils.core.errors import UserError
from utils.graph.capture import capture
from utils.graph.nodes import module_of, weighted_nodes
from utils.passes.exactness import probed_outputs
from utils.quantization import serialization as artifact

TASK = "classification"
RECIPE = Recipe(quantize=True, equalize=True, correction=True)


def saved(file, recipe=RECIPE, network=chain):
    model, graph = made(network, randomise, settle)
    result = quantize_data_free(model, SPEC, recipe, captured=graph)
    parts = result.float, result.simulated
    artifact.save(file, artifact.Saved(graph, *parts, asdict(recipe), SPEC, TASK, "net", "here"))
    return result


@pytest.mark.parametrize("flags", [{}, {"per_channel": True}, {"relu": True}])
@pytest.mark.parametrize("network", [chain, Residual, Branches])
def test_what_is_loaded_computes_bit_for_bit_the_same(network, flags, tmp_path):
    model, _ = made(network, randomise, settle)
    result = saved(tmp_path / "net.dfq", Recipe(quantize=True, equalize=True, **flags), network)
    again = artifact.load(tmp_path / "net.dfq", TASK)
    images = SPEC.probe(4)
    pairs = [(model, again.model), (result.float, again.float), (result.simulated, again.simulated)]
    pairs.append(tuple(lower_to_integers(made.simulated) for made in (result, again)))
    for expected, found in pairs:
        assert torch.equal(probed_outputs(expected, images)[0], probed_outputs(found, images)[0])
    assert Recipe(**again.recipe) == Recipe(quantize=True, equalize=True, **flags) and again.spec == SPEC
    for node in weighted_nodes(result.simulated):
        layer, found = module_of(result.simulated, node), again.simulated.get_submodule(node.target)
        for kind in ("weight_qparams", "bias_qparams"):
            expected, loaded = getattr(layer, kind), getattr(found, kind)
            assert torch.equal(loaded.scale, expected.scale) and torch.equal(loaded.zero_point, expected.zero_point)
            assert (loaded.quant_min, loaded.quant_max) == (expected.quant_min, expected.quant_max)
        assert again.float.get_submodule(node.target).weight_qparams is None


EMPTY = {"mapping": {}}
EVIL = {
    "another module": ("call_function", "x", "os.system", [False, "true"], EMPTY),
    "a function that unpickles": ("call_function", "x", "torch.load", [False, "evil.pkl"], EMPTY),
    "a function that calls": ("call_function", "x", "operator.methodcaller", [False, "mro"], EMPTY),
    "a way to classes": ("call_function", "x", "getattr", [False, 1, "__class__"], EMPTY),
    "a private method": ("call_method", "x", "__reduce_ex__", [False, 1, 2], EMPTY),
    "no method of tensors": ("call_method", "x", "mro", [False, 1], EMPTY),
    "a module's name that is code": ("call_module", "x", 'a"), __import__("os").abort(), ("', [False], EMPTY),
    "an input's name that is code": ("placeholder", "x", "x=__import__('os').abort()", [False], EMPTY),
    "a keyword that is code": ("call_function", "x", "torch.add", [False, 1, 2], {"mapping": {"a=1, b": 1}}),
}


@pytest.mark.parametrize("name", EVIL)
def test_a_file_holds_no_code(name, tmp_path):
    saved(tmp_path / "net.dfq")
    content = torch.load(tmp_path / "net.dfq", weights_only=True)
    content["graphs"]["simulated"]["nodes"].insert(1, EVIL[name])
    torch.save(content, tmp_path / "evil.dfq")
    with pytest.raises(UserError, match="no function of torch"):
        artifact.load(tmp_path / "evil.dfq", TASK)


class Attention(nn.Module):
    """Layers of layers, functions of their own, and operators that engines have no kernels for."""

    def __init__(self):
        super().__init__()
        self.first, self.attention = chain()[0], nn.MultiheadAttention(16, 2)
        self.gain = nn.Parameter(torch.rand(16))

    def forward(self, x):
        x = torch.nn.functional.mish(self.first(x).mean(3)) * self.gain
        return self.attention(x, x, x)[0]


def test_whatever_is_captured_can_be_saved(tmp_path):
    network = capture(Attention().eval(), SMALL)
    file = tmp_path / "net.dfq"
    artifact.save(file, artifact.Saved(network, network, network, {}, SMALL, TASK, "net", "here"))
    again = artifact.load(file, TASK).model
    assert torch.equal(again(SMALL.probe(3)), network(SMALL.probe(3)))
    assert [node.name for node in again.graph.nodes] == [node.name for node in network.graph.nodes]


def test_a_layer_of_the_users_own_is_refused_before_the_file_is_there(tmp_path):
    class Own(nn.Module):
        def forward(self, x):
            return x

    _, network = made(chain)
    network.set_submodule("0.2", Own())
    with pytest.raises(UserError, match=r"layer '0\.2' is a Own, which is none of torch\.nn"):
        artifact.save(tmp_path / "net.dfq", artifact.Saved(network, network, network, {}, SPEC, TASK, "net", "here"))
    assert not (tmp_path / "net.dfq").exists()


def test_a_file_of_another_task_and_one_without_its_parts_are_named(tmp_path):
    saved(tmp_path / "net.dfq")
    with pytest.raises(UserError, match="holds a network for classification, not detection"):
        artifact.load(tmp_path / "net.dfq", "detection")
    content = torch.load(tmp_path / "net.dfq", weights_only=True)
    content["graphs"]["float"]["nodes"].pop(1)
    torch.save(content, tmp_path / "net.dfq")
    with pytest.raises(UserError, match="is damaged"):
        artifact.load(tmp_path / "net.dfq", TASK)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"hello", lambda b: b""])
def test_a_damaged_file_is_one_line(damage, tmp_path):
    saved(tmp_path / "net.dfq")
    (tmp_path / "bad.dfq").write_bytes(damage((tmp_path / "net.dfq").read_bytes()))
    with pytest.raises(UserError, match="pass --load with a file that --save wrote"):
        artifact.load(tmp_path / "bad.dfq", TASK)


def test_a_checkpoint_is_no_saved_network(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "net.pth")
    with pytest.raises(UserError, match="is no saved network"):
        artifact.load(tmp_path / "net.pth", TASK)
    with pytest.raises(UserError, match="there is no file"):
        artifact.load(tmp_path / "none.dfq", TASK)
