"""The self-check of exact passes."""

import math
import re

import pytest
import torch
from networks import SPEC, chain, randomise, settle
from torch import nn

from dfq import Recipe, quantize_data_free
from utils.core.errors import UserError
from utils.graph.capture import capture
from utils.passes.exactness import Reference, check_capture, check_unchanged, probed_outputs, rounding_noise
from utils.passes.log import PassLog


def test_a_pass_that_breaks_the_network_is_named():
    model, probe = randomise(chain()), SPEC.probe()
    reference = Reference(probe, probed_outputs(model, probe), randomise(chain()))
    check_unchanged("equalization", model, reference, PassLog())
    model[2][0].weight *= 1.01
    with pytest.raises(UserError, match="equalization should leave the network's output as it is"):
        check_unchanged("equalization", model, reference, PassLog())
    model[2][0].weight.fill_(math.nan)
    with pytest.raises(UserError, match="equalization"):
        check_unchanged("equalization", model, reference, PassLog())


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("key", ["0.0.weight", "0.1.running_var"])
def test_weights_and_statistics_that_are_no_numbers_are_refused_by_name(key, value):
    model = settle(chain())
    model.state_dict()[key].flatten()[0] = value
    with pytest.raises(UserError, match=f"{re.escape(key)} holds values that are no finite numbers"):
        quantize_data_free(model, SPEC, Recipe(quantize=True))


def test_a_network_that_amplifies_rounding_is_checked_against_that():
    class Cancelling(nn.Module):
        """A large number added and taken away again: what is left is rounding."""

        def forward(self, x):
            return (x + 3e4) - 3e4

    model, probe, log = Cancelling(), SPEC.probe(), PassLog()
    assert rounding_noise(model, probe) > 1e-4
    check_unchanged("folding", model, Reference(probe, [1.003 * probe], model), log)
    assert log.notes[0].startswith("folding moved the output")
    with pytest.raises(UserError, match="folding"):
        check_unchanged("folding", model, Reference(probe, [1.5 * probe], model), log)


def test_a_network_whose_images_depend_on_one_another_is_said_to_be_so():
    def warnings(model: nn.Module) -> list[str]:
        log = PassLog()
        check_capture(model, capture(model, SPEC), SPEC, SPEC.probe(2), log)
        return log.warnings

    kept = settle(chain())
    assert not warnings(kept)
    free = settle(chain())
    free[0][1] = nn.BatchNorm2d(free[0][1].num_features, track_running_stats=False).eval()
    assert ["depends on the others in its batch" in line for line in warnings(free)] == [True]
    with torch.no_grad():
        a, b = SPEC.probe(2)
        assert not torch.allclose(free(torch.stack([a, b]))[:1], free(a[None]), rtol=1e-2)
