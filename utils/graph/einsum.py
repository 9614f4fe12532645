"""einsum in canonical form: a product, a linear layer, or a product of matrices."""

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from utils.graph.layers import make_layer
from utils.graph.translate import Translator, is_free, size_of

aten = torch.ops.aten


def einsum(t: Translator, node: fx.Node, equation: str, operands: Sequence, *_: Any, **__: Any) -> Any:
    """Of two operands, in which no letter is doubled or summed in one alone; None for any other."""
    terms = _letters(equation, operands)
    if terms is None:
        return None
    first, second, result = terms
    summed = [letter for letter in first if letter in second and letter not in result]
    shared = [letter for letter in first if letter in second and letter in result]
    if not summed:
        return _product(t, operands, terms)
    if not shared and isinstance(operands[1], Tensor):
        return _layer(t, operands[0], first, operands[1], second, result)
    if not shared and isinstance(operands[0], Tensor):
        return _layer(t, operands[1], second, operands[0], first, result)
    return _matrices(t, operands, terms, shared, summed)


def _letters(equation: str, operands: Sequence) -> tuple[str, str, str] | None:
    """The letters of both operands and of the result, one an axis."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(operands) != 2 or len(terms) != 2:
        return None
    unused = "".join(letter for letter in string.ascii_letters if letter not in equation)
    counts = [len(size_of(x)) - len(term.replace("...", "")) for x, term in zip(operands, terms, strict=True)]
    if "..." in equation and len({n for n, term in zip(counts, terms, strict=True) if "..." in term}) > 1:
        return None
    first, second, result = (term.replace("...", unused[: max(counts)]) for term in (*terms, result))
    alone = [letter for letter in first + second if letter not in result and not (letter in first and letter in second)]
    doubled = any(len(set(term)) < len(term) for term in (first, second, result))
    known = all(letter in first + second for letter in result)
    return None if alone or doubled or not known else (first, second, result)


def _product(t: Translator, operands: Sequence, terms: tuple[str, str, str]) -> fx.Node:
    """Value by value, each operand with sides of 1 for what it lacks."""
    *_, result = terms
    spread = []
    for x, own in zip(operands, terms, strict=False):
        kept = [letter for letter in result if letter in own]
        sides = dict(zip(own, size_of(x), strict=True))
        spread.append(_reshaped(t, _permuted(t, x, own, kept), [sides.get(letter, 1) for letter in result]))
    x, y = spread if isinstance(spread[0], fx.Node) else spread[::-1]
    return t.emit(aten.mul.Tensor, (x, y))


def _layer(t: Translator, x: fx.Node, own: str, weight: Tensor, letters: str, result: str) -> fx.Node | None:
    """A linear layer over the axes that are summed."""
    summed = [letter for letter in letters if letter in own]
    made = [letter for letter in letters if letter in result]
    kept = [letter for letter in own if letter in result]
    inputs, sides = _sides(x, own), _sides(weight, letters)
    rows = _permuted(t, x, own, [*kept, *summed])
    width, count = _product_of(sides, summed), _product_of(sides, made)
    rows = _reshaped(t, rows, [*(inputs[letter] for letter in kept), width])
    matrix = weight.permute([letters.index(letter) for letter in (*made, *summed)]).reshape(count, width)
    size = [*(inputs[letter] for letter in kept), count]
    if rows is None or len(size) < 2:
        return None
    done = t.layer(make_layer(nn.Linear, matrix, None), rows, t.layer_name(weight), size)
    done = _reshaped(t, done, [*size[:-1], *(sides[letter] for letter in made)])
    return _permuted(t, done, "".join([*kept, *made]), list(result))


def _matrices(
    t: Translator, operands: Sequence, terms: tuple[str, str, str], shared: list[str], summed: list[str]
) -> fx.Node | None:
    """A product of matrices [..., rows, summed] and [..., summed, columns] for each of what both share."""
    first, second, result = terms
    sides = _sides(operands[0], first) | _sides(operands[1], second)
    rows = [letter for letter in first if letter not in (*shared, *summed)]
    columns = [letter for letter in second if letter not in (*shared, *summed)]
    groups = [[letter] for letter in shared], rows, summed, columns
    if any(is_free(sides[letter]) and len(group) > 1 for group in groups[1:] for letter in group):
        return None
    outer = [sides[letter] for letter in shared]
    inner = [_product_of(sides, group) for group in (rows, summed, columns)]
    left = _reshaped(t, _permuted(t, operands[0], first, [*shared, *rows, *summed]), [*outer, inner[0], inner[1]])
    right = _reshaped(t, _permuted(t, operands[1], second, [*shared, *summed, *columns]), [*outer, inner[1], inner[2]])
    if left is None or right is None:
        return None
    product = t.emit(aten.matmul.default, (left, right), size=[*outer, inner[0], inner[2]])
    letters = [*shared, *rows, *columns]
    product = _reshaped(t, product, [sides[letter] for letter in letters])
    return None if product is None else _permuted(t, product, "".join(letters), list(result))


def _sides(x: fx.Node | Tensor, letters: str) -> dict[str, Any]:
    return dict(zip(letters, size_of(x), strict=True))


def _product_of(sides: dict[str, Any], letters: Sequence[str]) -> Any:
    product = sides[letters[0]] if letters else 1
    for letter in letters[1:]:
        product = product * sides[letter]
    return product


def _permuted(t: Translator, x: Any, letters: str, wanted: Sequence[str]) -> Any:
    order = [letters.index(letter) for letter in wanted]
    if order == list(range(len(order))):
        return x
    if isinstance(x, Tensor):
        return x.permute(order)
    return t.emit(aten.permute.default, (x, order), size=[size_of(x)[axis] for axis in order])


def _reshaped(t: Translator, x: Any, size: Sequence) -> Any:
    return x.reshape(list(size)) if isinstance(x, Tensor) else t.reshape(x, size)
