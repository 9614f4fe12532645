"""What a run is to do: the recipe, and everything that is said of each of its settings.

A setting is one field of `Recipe`. Its metadata is its flag on the command line, its help, its part of the row's
name, what it requires and whether it needs images. Parsers, row names, the pages of docs/ and the checks of the
Python API are all made from it, so that a new setting is one field here.
"""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from utils.core.arguments import POSITIVE, Number
from utils.core.errors import UserError
from utils.quantization.qparams import METHODS
from utils.quantization.target import DEFAULT, TARGETS, Target, check_target

Value = bool | int | float | str | tuple[str, ...] | None

PASSES = "passes, in the order in which they run"
DISTILLED = "distilled data: images made from BatchNorm statistics, see docs/method.md"
QUANTIZERS = "quantizers"
GROUPS = (PASSES, DISTILLED, QUANTIZERS)


@dataclass(frozen=True)
class Abbreviation:
    """A setting's part of a row's name.

    text: may hold {} for the value. place: parts are put together by rising place. unless: the setting whose own
    part takes the place of this one. words: what stands for a value, where it is not the value itself.
    """

    text: str
    place: int
    unless: str | None = None
    words: Mapping[str, str] = field(default_factory=dict)

    def of(self, value: Value) -> str:
        return self.text.format(self.words.get(value, value))


BITS = Number(int, lambda value: type(value) is int and 2 <= value <= 16, "a number of bits from 2 to 16")


def setting(
    help: str,
    group: str,
    default: Value = False,
    requires: tuple[str, ...] = (),
    abbreviation: Abbreviation | None = None,
    images: bool = False,
    exact: bool = False,
    chosen_per_row: bool = True,
    former: Mapping[Value, Value] | None = None,
    **argument: Any,
) -> Any:
    """A field of Recipe.

    help: the flag's. requires: settings without which it means nothing. images: whether it needs images. exact: whether
    it acts on the row's float network. chosen_per_row: whether a row of TABLE chooses it, in place of the command
    line. former: what values mean today that it had once. argument: what else argparse is told of it.
    """
    about = {"help": help, "group": group, "requires": requires, "abbreviation": abbreviation}
    about |= {"images": images, "exact": exact, "chosen_per_row": chosen_per_row, "argument": argument}
    about["former"] = former or {}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Recipe:
    """Which passes run, and with what quantizers. The names are those of the flags.

    A combination that means nothing is a UserError, here as on the command line.
    """

    relu: bool = setting(
        "replace every ReLU6 by ReLU (the published method; may cost accuracy)",
        PASSES,
        abbreviation=Abbreviation("+ReLU", 1),
        exact=True,
    )
    clear_dead: bool = setting(
        "zero the weights that read dead channels (part of --equalize)",
        PASSES,
        abbreviation=Abbreviation("+DC", 2, unless="equalize"),
        exact=True,
    )
    equalize: bool = setting(
        "cross-layer equalization; keeps ReLU6 exact without --relu",
        PASSES,
        abbreviation=Abbreviation("+LE", 3, unless="distill_equalize"),
        exact=True,
    )
    absorption: bool = setting(
        "absorb high biases into the next layer",
        PASSES,
        requires=("equalize",),
        abbreviation=Abbreviation("+HBA", 4),
        exact=True,
    )
    clip_weight: float | None = setting(
        "clip weights to [-W, W] (15 if no value is given)",
        PASSES,
        default=None,
        requires=("quantize",),
        abbreviation=Abbreviation(" +clip_{:g}", 7),
        type=POSITIVE,
        nargs="?",
        const=15.0,
        metavar="W",
    )
    quantize: bool = setting("quantize weights, biases and activations", PASSES)
    correction: bool = setting(
        "correct the biases for the shift that quantized weights cause",
        PASSES,
        requires=("quantize",),
        abbreviation=Abbreviation("+BC", 6, unless="distill_correction"),
    )
    bits_weight: int = setting(
        "bits of weights, 2 to 16 (default: 8)",
        QUANTIZERS,
        default=8,
        requires=("quantize",),
        chosen_per_row=False,
        type=BITS,
        metavar="B",
    )
    bits_activation: int = setting(
        "bits of activations, 2 to 16 (default: 8)",
        QUANTIZERS,
        default=8,
        requires=("quantize",),
        chosen_per_row=False,
        type=BITS,
        metavar="B",
    )
    bits_first_last: int | None = setting(
        "bits of the weights and the inputs of the first and last layers, 2 to 16 (default: as all others; tables of 4 bits "
        "are published with 8)",
        QUANTIZERS,
        default=None,
        requires=("quantize",),
        chosen_per_row=False,
        type=BITS,
        metavar="B",
    )
    bits_bias: int = setting(
        "bits of biases; 32: on the scale of the accumulator (default: 32)",
        QUANTIZERS,
        default=32,
        requires=("quantize",),
        chosen_per_row=False,
        type=int,
        choices=(8, 16, 32),
    )
    per_channel: bool = setting(
        "one weight scale per output channel, not per tensor", QUANTIZERS, requires=("quantize",)
    )
    asymmetric: bool = setting(
        "weights with zero points; with --per_channel for fewer than 8 bits", QUANTIZERS, requires=("quantize",)
    )
    float_layers: tuple[str, ...] = setting(
        "layers that stay in float, by name, where their noise dominates",
        QUANTIZERS,
        default=(),
        requires=("quantize",),
        abbreviation=Abbreviation(" +float_{}", 9),
        nargs="+",
        metavar="NAME",
    )
    target: str = setting(
        "the engine that the network is for, which decides grids, what is quantized, and what --export writes "
        f"(default: {DEFAULT})",
        QUANTIZERS,
        default=DEFAULT,
        requires=("quantize",),
        abbreviation=Abbreviation(" for {}", 10),
        chosen_per_row=False,
        choices=tuple(TARGETS),
    )
    distill_equalize: bool = setting(
        "noise-optimal scales: equalize to minimise quantization noise at the output on distilled images, where that is "
        "closer to float",
        DISTILLED,
        requires=("equalize", "quantize"),
        abbreviation=Abbreviation("+DLE", 3),
        images=True,
        exact=True,
    )
    distill_correction: bool = setting(
        "empirical bias correction, on distilled images instead of from statistics",
        DISTILLED,
        requires=("correction",),
        abbreviation=Abbreviation("+DBC", 6),
        images=True,
    )
    distill_rounding: str | None = setting(
        "rounding of weights on distilled images: error-compensated (gptq, if no value is given), or learned block by "
        "block to keep its output (adaround: minutes; for fewer than 8 bits)",
        DISTILLED,
        default=None,
        requires=("correction",),
        abbreviation=Abbreviation("+{}", 5, words={"gptq": "GPTQ", "adaround": "AR"}),
        images=True,
        former={True: "gptq", False: None},
        nargs="?",
        const="gptq",
        choices=("gptq", "adaround"),
    )
    distill_range: bool = setting(
        "activation ranges from distilled images",
        DISTILLED,
        requires=("quantize",),
        abbreviation=Abbreviation(" +DR", 8, unless="range_method"),
        images=True,
    )
    range_method: str = setting(
        "range of an activation: the observed extremes, all but 1e-5 at either end, or the least squared error "
        "(default: minmax)",
        DISTILLED,
        default="minmax",
        requires=("distill_range",),
        abbreviation=Abbreviation(" +DR_{}", 8),
        choices=METHODS,
    )

    def __post_init__(self) -> None:
        for name, value in as_today(asdict(self)).items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "float_layers", tuple(dict.fromkeys(self.float_layers)))  # a list, as typed
        check_settings(asdict(self))

    @classmethod
    def from_args(cls, args: Namespace) -> Recipe:
        """The recipe that flags of the same names ask for."""
        return cls(**{name: getattr(args, name) for name in SETTINGS})

    @property
    def settings(self) -> dict[str, Value]:
        return asdict(self)

    @property
    def engine(self) -> Target:
        """What the target's engine computes with."""
        return TARGETS[self.target]

    @property
    def steps_of_biases(self) -> int | None:
        """Bits of biases; None where the target's engine adds them in float."""
        return self.bits_bias if self.engine.integer_biases else None

    @property
    def channel_scales(self) -> bool:
        """Whether weights have a scale per output channel: as asked for, or as the target has them anyway."""
        return self.per_channel or self.engine.per_channel

    @property
    def words(self) -> list[str]:
        """The flags of a table's row, as one would type them."""
        words = []
        for name, value in self._given().items():
            about = SETTINGS[name].metadata
            if about["chosen_per_row"]:
                bare = value is True or value == about["argument"].get("const")
                text = f"{value:g}" if isinstance(value, float) else str(value)
                values = value if isinstance(value, tuple) else [text]
                words += [f"--{name}"] if bare else [f"--{name}", *values]
        return words

    @property
    def needs_images(self) -> bool:
        return bool(self._needing_images())

    @property
    def learns_rounding(self) -> bool:
        return self.distill_rounding == "adaround"

    @property
    def changes_float(self) -> bool:
        """Whether the row's float network computes another function than the one that was loaded."""
        return self.relu or self.absorption

    @property
    def float_settings(self) -> dict[str, Value]:
        """What decides which float network the row has: the passes on it, and all that they look at."""
        if self.distill_equalize:  # whose scales depend on the quantizers
            return self.settings
        return {name: value for name, value in self.settings.items() if SETTINGS[name].metadata["exact"]}

    @property
    def labels(self) -> dict[str, str]:
        """What a table calls the networks that the row evaluates."""
        exact = {name: value for name, value in self._given().items() if SETTINGS[name].metadata["exact"]}
        widths = f"W{self.bits_weight}A{self.bits_activation}".replace("W8A8", "INT8")
        if self.bits_first_last:
            widths += f" (first and last {self.bits_first_last})"
        row = f"{widths} {self.row_name}"
        return {"fp32_original": "FP32 as loaded", "fp32": f"FP32 {_name(exact)}", "quantized": row}

    def check_images(self, images: Tensor | None) -> None:
        """Refuse to run without images what looks at them."""
        if images is None and (needy := self._needing_images()):
            raise UserError(
                f"--{needy[0]} needs images; pass images=..., as utils.calibration.distillation makes them, or your own"
            )

    def _needing_images(self) -> list[str]:
        return [name for name in self._given() if SETTINGS[name].metadata["images"]]

    def _given(self) -> dict[str, Value]:
        return given(self.settings)

    def __str__(self) -> str:
        """The passes as the published tables name them, such as +ReLU+LE+BC +clip_15."""
        return _name(self._given())

    @property
    def row_name(self) -> str:
        """What a row of a table is called."""
        return row_name(str(self), self.settings)


SETTINGS: dict[str, Field] = {one.name: one for one in fields(Recipe)}
# What a row of TABLE, or a file that --save wrote, decides itself.
OF_A_ROW = tuple(name for name, one in SETTINGS.items() if one.metadata["chosen_per_row"])


def as_today(settings: Mapping[str, Value]) -> dict[str, Value]:
    """Settings with what their former values mean today; anything that is no setting as it is."""
    former = {name: one.metadata["former"] for name, one in SETTINGS.items()}
    return {
        name: former[name][value] if type(value) is bool and value in former.get(name, {}) else value
        for name, value in settings.items()
    }


def given(settings: dict[str, Value]) -> dict[str, Value]:
    """Those settings that are not at their defaults."""
    return {name: value for name, value in settings.items() if value != SETTINGS[name].default}


def row_name(passes: str, settings: Mapping[str, Value]) -> str:
    """What a row of a table is called: its recipe's passes as a line of results holds them, and how weights are rounded."""
    return passes + "".join(
        f" {name.replace('_', ' ')}" for name in ("per_channel", "asymmetric") if settings.get(name)
    )


def _name(given: dict[str, Value]) -> str:
    """The parts of the settings that were given, put together."""
    parts = []
    for name, value in given.items():
        part: Abbreviation | None = SETTINGS[name].metadata["abbreviation"]
        if part and part.unless not in given:
            parts.append((part.place, part.of(len(value) if isinstance(value, tuple) else value)))
    return "".join(text for _, text in sorted(parts)).strip() or "Original"


def check_settings(settings: dict[str, Value], there: tuple[str, ...] = ()) -> None:
    """Refuse values that are not valid, and settings without what they require; a UserError in the flags' words.

    there: settings that count as given, whatever their value.
    """
    chosen = given(settings)
    for name, value in chosen.items():
        about = SETTINGS[name].metadata
        kind, choices = about["argument"].get("type"), about["argument"].get("choices")
        if isinstance(kind, Number) and not kind.accepts(value):
            raise UserError(f"argument --{name}: {str(value)!r} is not {kind.expected}")
        if choices and value not in choices:
            raise UserError(
                f"argument --{name}: invalid choice: {value!r} (choose from {', '.join(map(str, choices))})"
            )
    for name in chosen:
        for other in SETTINGS[name].metadata["requires"]:
            if other not in chosen and other not in there:
                raise UserError(f"--{name} needs --{other}")
    check_target(settings)


def add_recipe_flags(parser: ArgumentParser) -> dict[str, argparse._ArgumentGroup]:
    """Give the parser a flag for every setting; returns the groups by title, for what else belongs there."""
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for name, one in SETTINGS.items():
        about = one.metadata
        needs = f"; needs {' '.join(f'--{other}' for other in about['requires'])}" if about["requires"] else ""
        options = {"default": one.default, "help": about["help"] + needs} | about["argument"]
        if isinstance(one.default, bool):
            options["action"] = "store_true"
        groups[about["group"]].add_argument(f"--{name}", **options)
    return groups


# ------------------------------------------------------------------------------------- the table


def _row(*names: str, **values: Value) -> Recipe:
    bare = {name: SETTINGS[name].metadata["argument"].get("const", True) for name in names}
    return Recipe(quantize=True, **bare, **values)


_ON_IMAGES = ("equalize", "correction", "distill_equalize", "distill_range")

TABLE = {
    recipe.row_name: recipe
    for recipe in (
        _row(),  # the published ones
        _row("relu"),
        _row("relu", "equalize"),
        _row("relu", "equalize", "distill_range"),
        _row("correction"),
        _row("correction", "clip_weight"),
        _row("relu", "equalize", "correction"),
        _row("relu", "equalize", "correction", "distill_range"),
        _row("clear_dead"),  # and ours
        _row("clear_dead", "correction"),
        _row("equalize"),
        _row("equalize", "correction"),
        _row("equalize", "correction", "distill_range"),
        _row("equalize", "correction", "distill_correction"),
        _row("equalize", "correction", "distill_correction", "distill_range"),
        _row(*_ON_IMAGES),
        _row(*_ON_IMAGES, "distill_correction"),
        _row("equalize", "correction", "distill_rounding", "distill_range"),
        _row(*_ON_IMAGES, "distill_rounding"),
        _row(*_ON_IMAGES, distill_rounding="adaround"),
        _row("equalize", "absorption", "correction"),
        _row("per_channel"),
        _row("per_channel", "equalize", "correction"),
        _row(*_ON_IMAGES, "distill_rounding", "per_channel"),
        _row(*_ON_IMAGES, "per_channel", distill_rounding="adaround"),
    )
}


def recipes_of(args: Namespace) -> list[Recipe]:
    """The recipe that the flags ask for, none with --auto and --doctor; with --table those of its rows, or of --rows, at the bits that the flags say."""
    if not args.table:
        return [] if args.auto or args.doctor else [Recipe.from_args(args)]
    if unknown := [name for name in args.rows or () if name not in TABLE]:
        raise UserError(f"--rows: there is no row {unknown[0]!r}; choose from {', '.join(map(repr, TABLE))}")
    shared = {name: getattr(args, name) for name in SETTINGS if name not in OF_A_ROW}
    return [replace(TABLE[name], **shared) for name in args.rows or TABLE]
