"""What command lines are made of: a parser that fails in one line, and numbers with bounds."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose flags are typed in full, and whose errors are one line, without the usage."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        words = sys.argv[1:] if args is None else list(args)
        flag = "the command"
        for word in words:
            name, joined, value = word.partition("=")
            flag = name if name.startswith("--") else flag
            if not word or (name.startswith("--") and joined and not value):
                self.error(f"{flag} got an empty value, as from a variable that is not set")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


@dataclass(frozen=True)
class Number:
    """The `type` of a flag: which numbers it takes. convert: from text. expected: the valid values in words."""

    convert: Callable[[str], float]
    valid: Callable[[Any], bool]
    expected: str

    def accepts(self, value: Any) -> bool:
        """Whether it is one of the numbers."""
        return isinstance(value, Real) and self.valid(value)

    def __call__(self, text: str) -> float:
        try:
            value = self.convert(text)
        except ValueError:
            value = None
        if not self.accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {self.expected}")
        return value


def at_least(lowest: int) -> Number:
    return Number(int, lambda value: value >= lowest, f"a whole number of at least {lowest}")


FINITE = Number(float, math.isfinite, "a finite number")
SEED = Number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295")
POSITIVE = Number(float, lambda value: 0 < value < float("inf"), "a positive number")


def as_text(parse: Callable[[str], Any]) -> Callable[[str], str]:
    """The `type` of a flag that stays text, as records want it, and is refused where parse() refuses it."""

    def check(text: str) -> str:
        parse(text)
        return text

    return check
