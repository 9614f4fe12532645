"""Targets as data: what a recipe may ask of each, and what engine runs which."""

from dataclasses import replace

import pytest

from dfq import Recipe
from utils.backends.base import ENGINES
from utils.core.errors import UserError
from utils.quantization.recipe import TABLE
from utils.quantization.target import DEFAULT, TARGETS, check_engine

INT8 = Recipe(quantize=True)


def test_the_target_is_a_setting_that_a_row_names_and_a_table_follows():
    recipe = replace(INT8, equalize=True, target="tensorrt")
    assert str(recipe) == "+LE for tensorrt" and recipe.settings["target"] == "tensorrt"
    assert recipe.words == ["--equalize", "--quantize"]  # the command of a table's row keeps the target's own flag
    assert recipe.channel_scales and not INT8.channel_scales and replace(INT8, per_channel=True).channel_scales
    assert all(row.target == DEFAULT for row in TABLE.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "tflite"}, r"--target: invalid choice: 'tflite' \(choose from onnxruntime, openvino, tensorrt\)"),
        (
            {"target": "tensorrt", "asymmetric": True},
            "--target tensorrt has no weights with zero points; leave out --asy",
        ),
        ({"target": "openvino", "asymmetric": True}, "--target openvino has no weights with zero points"),
        (
            {"per_channel": True, "asymmetric": True},
            "--asymmetric with --per_channel is for fewer than 8 bits of weights",
        ),
        ({"target": "tensorrt", "bits_weight": 4}, "--target tensorrt has no kernels for --bits_weight 4, only for 8"),
        (
            {"target": "openvino", "bits_weight": 6},
            "--target openvino has no kernels for --bits_weight 6, only for 8 or 7",
        ),
        ({"target": "openvino", "bits_activation": 4}, "has no kernels for --bits_activation 4, only for 8"),
        ({"target": "tensorrt", "bits_bias": 16}, "has no kernels for --bits_bias 16, only for 32"),
    ],
)
def test_what_a_target_has_no_kernels_for_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        replace(INT8, **settings)


def test_a_target_needs_a_quantized_network():
    with pytest.raises(UserError, match="--target needs --quantize"):
        Recipe(target="openvino")


@pytest.mark.parametrize("bits", [4, 6])
def test_other_bits_can_be_simulated_where_no_target_was_asked_for(bits):
    assert replace(INT8, bits_weight=bits, bits_activation=bits).engine is TARGETS[DEFAULT]


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_is_run_by_engines_that_are_there(name):
    target = TARGETS[name]
    assert set(target.engines) <= set(ENGINES) and str(target).startswith(f"for {target.title}: ")
    for engine in ("simulate", *target.engines):
        check_engine(name, engine)
    assert "onnxruntime" in target.engines, "any file of ours runs in ONNX Runtime"


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt"])
def test_openvino_runs_only_what_is_made_for_it(name):
    with pytest.raises(UserError, match=f"runs what --target openvino makes, and this is for {name}; pass --target op"):
        check_engine(name, "openvino")
