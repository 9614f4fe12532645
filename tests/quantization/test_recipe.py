"""The recipe: one source of flags, names and checks, for the command line and for Python."""

import argparse

import pytest
from networks import SPEC, chain, settle

import main_cls
from dfq import quantize_data_free
from utils.core.errors import UserError
from utils.quantization.recipe import SETTINGS, TABLE, Recipe, add_recipe_flags, as_today

IMPOSSIBLE = [
    ({"absorption": True}, "--absorption needs --equalize"),
    ({"correction": True}, "--correction needs --quantize"),
    ({"clip_weight": 3.0}, "--clip_weight needs --quantize"),
    ({"per_channel": True}, "--per_channel needs --quantize"),
    ({"asymmetric": True}, "--asymmetric needs --quantize"),
    ({"bits_weight": 4}, "--bits_weight needs --quantize"),
    ({"quantize": True, "distill_equalize": True}, "--distill_equalize needs --equalize"),
    ({"equalize": True, "distill_equalize": True}, "--distill_equalize needs --quantize"),
    ({"quantize": True, "distill_correction": True}, "--distill_correction needs --correction"),
    ({"quantize": True, "distill_rounding": True}, "--distill_rounding needs --correction"),
    ({"quantize": True, "distill_rounding": "up"}, "argument --distill_rounding: invalid choice: 'up'"),
    ({"bits_first_last": 8}, "--bits_first_last needs --quantize"),
    ({"quantize": True, "bits_first_last": 1}, "argument --bits_first_last: '1' is not a number of bits from 2 to 16"),
    ({"distill_range": True}, "--distill_range needs --quantize"),
    ({"quantize": True, "range_method": "mse"}, "--range_method needs --distill_range"),
    ({"quantize": True, "bits_weight": 1}, "argument --bits_weight: '1' is not a number of bits from 2 to 16"),
    ({"quantize": True, "bits_activation": 17}, "argument --bits_activation: '17' is not a number of bits"),
    ({"quantize": True, "bits_bias": 12}, "argument --bits_bias: invalid choice: 12 (choose from 8, 16, 32)"),
    ({"quantize": True, "clip_weight": -3.0}, "argument --clip_weight: '-3.0' is not a positive number"),
]


def typed(settings: dict) -> list[str]:
    """Settings as one types them."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


@pytest.mark.parametrize(("settings", "message"), IMPOSSIBLE)
def test_python_and_the_command_line_refuse_with_the_same_words(settings, message, capsys):
    with pytest.raises(UserError) as caught:
        Recipe(**settings)
    assert str(caught.value).startswith(message)
    with pytest.raises(SystemExit):
        main_cls.parse_args(typed(settings))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["distill_range", "distill_equalize"])
def test_a_recipe_that_looks_at_images_is_refused_without_them(name):
    recipe = Recipe(quantize=True, equalize=True, **{name: True})
    with pytest.raises(UserError, match=f"--{name} needs images"):
        quantize_data_free(settle(chain()), SPEC, recipe)


def test_every_setting_is_a_flag_that_gives_it_back():
    parser = argparse.ArgumentParser()
    add_recipe_flags(parser)
    assert Recipe.from_args(parser.parse_args([])) == Recipe()
    for recipe in TABLE.values():
        assert Recipe.from_args(parser.parse_args(recipe.words)) == recipe
    flags = {option for action in parser._actions for option in action.option_strings}
    assert flags == {f"--{name}" for name in SETTINGS} | {"-h", "--help"}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "Original"),
        ({"relu": True, "clear_dead": True, "equalize": True}, "+ReLU+LE"),
        ({"clear_dead": True, "correction": True}, "+DC+BC"),
        ({"correction": True, "clip_weight": 2.5}, "+BC +clip_2.5"),
        ({"clip_weight": 15.0}, "+clip_15"),
        ({"distill_range": True, "range_method": "mse"}, "+DR_mse"),
        ({"equalize": True, "absorption": True, "distill_equalize": True, "correction": True}, "+DLE+HBA+BC"),
        (
            {"equalize": True, "correction": True, "distill_correction": True, "distill_rounding": True},
            "+LE+GPTQ+DBC",
        ),
        ({"correction": True, "distill_correction": True, "distill_rounding": "gptq"}, "+GPTQ+DBC"),
        ({"correction": True, "distill_rounding": "gptq"}, "+GPTQ+BC"),
        ({"correction": True, "distill_correction": True, "distill_rounding": "adaround"}, "+AR+DBC"),
    ],
)
def test_names_of_rows(settings, name):
    assert str(Recipe(quantize=True, **settings)) == name


def test_rows_of_the_table_are_named_by_their_recipes():
    assert all(name.removesuffix(" per channel") == str(recipe) for name, recipe in TABLE.items())
    assert len(set(map(str, TABLE))) <= len(TABLE) == 25


def test_values_that_a_setting_once_had_mean_what_they_meant():
    given = {"quantize": True, "correction": True, "distill_correction": True}
    assert Recipe(**given, distill_rounding=True) == Recipe(**given, distill_rounding="gptq")
    assert Recipe(**given, distill_rounding=False) == Recipe(**given)
    old = {"distill_rounding": True, "relu": True, "bits_weight": 8, "engine": "simulate"}
    assert as_today(old) == old | {"distill_rounding": "gptq"}


def test_the_label_says_the_bits_of_the_first_and_last_layers():
    assert Recipe(quantize=True, bits_weight=4).labels["quantized"] == "W4A8 Original"
    recipe = Recipe(quantize=True, bits_weight=4, bits_activation=4, bits_first_last=8)
    assert recipe.labels["quantized"] == "W4A4 (first and last 8) Original"


def test_what_decides_the_float_network():
    one, other = Recipe(relu=True, quantize=True), Recipe(relu=True, quantize=True, correction=True, bits_weight=4)
    assert one.float_settings == other.float_settings
    assert one.float_settings != Recipe(quantize=True).float_settings
    chosen = {"quantize": True, "equalize": True, "distill_equalize": True}
    assert Recipe(**chosen).float_settings != Recipe(**chosen, per_channel=True).float_settings
