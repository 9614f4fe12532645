"""ReLU6: replaced, or exact with bounds of its own for every channel."""

import math

import pytest
import torch
from networks import SMALL, chain, folded, made, modules_in, randomise
from torch import nn

from utils.calibration.moments import Gaussian, Unknown
from utils.calibration.ranges import batchnorm_ranges
from utils.graph.capture import capture
from utils.graph.layers import Clip
from utils.graph.regions import ELSEWHERE, ChannelSlice, find_regions
from utils.passes.equalization import cle_scales, equalize
from utils.passes.log import PassLog
from utils.passes.relu6 import (
    _cut_above,
    channel_caps,
    channel_reach,
    drop_idle_caps,
    lower_caps,
    replace_relu6,
    scale_bounds,
)


def test_replacing_leaves_no_relu6():
    (_, graph), log = made(chain, randomise), PassLog()
    replace_relu6(graph, log)
    clips = modules_in(graph, Clip)
    assert len(clips) == 3 and all(clip.rectifies and not clip.capped for clip in clips)
    assert log.counts() == {"replaced ReLU6 by ReLU": {"applied": 3, "skipped": 0}}


def test_other_clips_are_not_replaced():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Hardtanh(-1, 6), nn.Hardtanh(-1, 1), nn.Hardtanh(0, 4))
    graph, log = capture(model, SMALL), PassLog()
    before = [(float(clip.low), float(clip.high)) for clip in modules_in(graph, Clip)]
    replace_relu6(graph, log)
    assert [(float(clip.low), float(clip.high)) for clip in modules_in(graph, Clip)] == before
    assert log.counts() == {}


def test_equalization_gives_relu6_a_cap_for_every_channel():
    graph, statistics = folded(made(chain, randomise)[1])
    scales = cle_scales(graph, find_regions(graph)[0], PassLog(), batchnorm_ranges(statistics))
    equalize(graph, statistics, lambda *_: scales, PassLog())
    clips = modules_in(graph, Clip)
    assert len(clips) == 3
    for clip, scale in zip(clips, scales, strict=True):
        assert clip.high.unique().numel() > 1 and clip.rectifies
        torch.testing.assert_close(clip.high, 6 / scale)


@pytest.fixture
def graph():
    """A ReLU6, a hardtanh and a ReLU of four channels."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.Hardtanh(-2, 1), nn.Conv2d(4, 4, 1))
    return capture(nn.Sequential(model, nn.ReLU()), SMALL)


PART = torch.tensor([ELSEWHERE, 0, 2, 1])  # of a region's three channels


def test_caps_of_a_part_of_the_channels_by_hand(graph):
    part = ChannelSlice("0.1", PART)
    torch.testing.assert_close(channel_caps(graph, part, 3), torch.full((3,), 6.0))
    scale_bounds(graph, part, torch.tensor([0.5, 1.0, 2.0]))
    lower_caps(graph, part, torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(channel_caps(graph, part, 3), torch.tensor([3.0, 5.0, 12.0]))
    clip = graph.get_submodule("0.1")
    torch.testing.assert_close(clip.high, torch.tensor([6.0, 3.0, 12.0, 5.0]))
    assert clip.rectifies


def test_both_bounds_of_a_hardtanh_scale(graph):
    part = ChannelSlice("0.3", PART)
    torch.testing.assert_close(channel_reach(graph, part, 3), torch.full((3,), 2.0))
    scale_bounds(graph, part, torch.tensor([0.5, 1.0, 2.0]))
    clip = graph.get_submodule("0.3")
    torch.testing.assert_close(clip.low, torch.tensor([-2.0, -1.0, -4.0, -2.0]))
    torch.testing.assert_close(clip.high, torch.tensor([1.0, 0.5, 2.0, 1.0]))
    torch.testing.assert_close(channel_reach(graph, part, 3), torch.tensor([1.0, 2.0, 4.0]))


def test_a_relu_stays_a_relu(graph):
    scale_bounds(graph, ChannelSlice("1", PART), torch.tensor([0.5, 1.0, 2.0]))
    clip = graph.get_submodule("1")
    assert (float(clip.low), clip.high.tolist()) == (0, [math.inf] * 4)


def test_what_a_cap_cuts_of_a_gaussian():
    torch.manual_seed(0)
    known = Gaussian(torch.tensor([0.0, 1.0, -2.0]), torch.tensor([1.0, 4.0, 0.25]))
    caps = torch.tensor([1.0, 0.5, 6.0])
    drawn = known.mean + known.variance.sqrt() * torch.randn(1_000_000, 3)
    expected = (drawn - caps).clamp_min(0).square().mean(0)
    torch.testing.assert_close(_cut_above(known, caps).float(), expected, rtol=0.02, atol=1e-6)


UP_TO_8 = (0.0, 8.0)


@pytest.mark.parametrize(
    ("mean", "range_", "seen", "dropped"),
    [
        (0.5, UP_TO_8, None, True),  # six deviations end at 3.5, below every cap
        (0.5, UP_TO_8, 5.9, True),  # images stay below too
        (0.5, UP_TO_8, 6.5, False),  # an image goes further than BatchNorm says
        (4.0, UP_TO_8, None, False),  # a cap at four deviations cuts as much as rounding errs
        (4.0, (0.0, 5.0), None, False),  # the range ends below the caps, which cost nothing then
        (0.5, Unknown("here"), None, False),  # no quantizer, no cost
    ],
)
def test_caps_are_dropped_where_nothing_reaches_them(graph, mean, range_, seen, dropped):
    clip, log = graph.get_submodule("0.1"), PassLog()
    clip.high = torch.tensor([6.0, 7.0, 6.0, 12.0])
    statistics = {"0.0": Gaussian(torch.full((4,), mean), torch.full((4,), 0.25))}
    on_images = None if seen is None else lambda: {"0.0": (torch.zeros(4), torch.full((4,), seen))}
    if mean == 4.0:
        statistics["0.0"].variance[0] = 1.0
    drop_idle_caps(graph, statistics, lambda node: range_, 8, False, on_images, log)
    assert bool(clip.high.isinf().all()) == dropped
    assert ("dropped caps that nothing reaches" in log.counts()) == dropped
    assert graph.get_submodule("0.3").high == 1  # one bound for all channels costs nothing
