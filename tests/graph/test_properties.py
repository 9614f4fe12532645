"""Random small networks: captured as they are, left alone by exact passes, the same in the engine; or one clear line.

300 examples by default, the same ones every time; python -m pytest -m thorough tests/graph/test_properties.py draws new ones.
"""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from networks_field import STEPS, Step, field_network
from torch.utils._pytree import tree_leaves

from dfq import Recipe, quantize_data_free
from utils.backends.onnxruntime.export import build, check_parity
from utils.core.errors import UserError
from utils.core.networks import scored

RECIPE = Recipe(equalize=True, quantize=True, correction=True)
COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": list(HealthCheck),
}
REPEATED = settings(
    max_examples=75, derandomize=True, phases=(Phase.generate,), **COMMON
)  # short as drawn: no shrinking
THOROUGH = settings(max_examples=1000, **COMMON)
REFUSED = 0.05  # share of networks that may be refused

FAMILIES = {
    "chains": ("layer", "activation", "spatial", "scale"),
    "branches": ("layer", "residual", "concat", "split"),
    "shared": ("layer", "shared", "gate", "spatial", "bare"),
    "all": tuple(STEPS),
}
SIZES = ((12, 12), (11, 13), (9, 12))


@st.composite
def networks(draw: st.DrawFn, family: str, length: int = 2) -> tuple[list[Step], int, tuple[int, int]]:
    number = st.integers(0, 7)
    step = st.tuples(st.sampled_from(FAMILIES[family]), number, number, number)
    steps = draw(st.lists(step, min_size=1, max_size=length))
    return [("layer", draw(number), draw(number), 0), *steps], draw(number), draw(st.sampled_from(SIZES))


def check(described: tuple[list[Step], int, tuple[int, int]], seen: Counter) -> None:
    """Fail where the network changes on its way to the file; count it where it is refused."""
    model, spec = field_network(*described)
    model = scored(model, spec, 4 if described[1] % 4 == 3 else 2)
    seen["tried"] += 1
    quantized = quantize_data_free(model, spec, RECIPE)
    for batch, seed in ((2, 5), (3, 6)):
        images = spec.probe(batch, seed)
        expected, found = tree_leaves(model(images.clone())), tree_leaves(quantized.float(images.clone()))
        for wanted, got in zip(expected, found, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()) + 1e-6)
    try:
        file = build(quantized, spec, {})
    except UserError as error:
        assert "\n" not in str(error)
        seen["refused"] += 1
        return
    check_parity(file, quantized.simulated, spec.probe(2, 7))


@pytest.mark.parametrize("family", FAMILIES)
def test_networks_are_captured_kept_and_exported(family):
    seen = Counter()
    REPEATED(given(networks(family))(lambda described: check(described, seen)))()
    assert seen["refused"] <= REFUSED * seen["tried"]


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_many_more_networks(family):
    seen = Counter()
    THOROUGH(given(networks(family, 5))(lambda described: check(described, seen)))()
    assert seen["refused"] <= REFUSED * seen["tried"]
