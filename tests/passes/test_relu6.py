"""ReLU6: replaced, or exact with a cap for every channel."""

import torch
from networks import SPEC, chain, folded, randomise
from torch import nn

from utils.calibration.ranges import batchnorm_ranges
from utils.graph.capture import capture
from utils.graph.layers import Clip
from utils.graph.regions import ChannelSlice, find_regions
from utils.passes.equalization import cle_scales, equalize
from utils.passes.log import PassLog
from utils.passes.relu6 import channel_caps, lower_caps, replace_relu6, scale_bounds


def test_replacing_leaves_no_relu6():
    traced, log = capture(randomise(chain()), SPEC), PassLog()
    replace_relu6(traced, log)
    assert not any(isinstance(module, nn.ReLU6) for module in traced.modules())
    assert sum(isinstance(module, nn.ReLU) for module in traced.modules()) == 3
    assert log.counts() == {"replaced ReLU6 by ReLU": {"applied": 3, "skipped": 0}}


def test_equalization_gives_relu6_a_cap_for_every_channel():
    traced, statistics = folded(randomise(chain()))
    scales = cle_scales(traced, find_regions(traced)[0], PassLog(), batchnorm_ranges(statistics))
    equalize(traced, statistics, lambda *_: scales, PassLog())
    caps = [module.cap for module in traced.modules() if isinstance(module, CappedReLU)]
    assert len(caps) == 3
    for cap, scale in zip(caps, scales, strict=True):
        assert cap.unique().numel() > 1
        torch.testing.assert_close(cap, 6 / scale)


def test_caps_of_a_part_of_the_channels_by_hand():
    traced = capture(chain(), SPEC)
    name = next(name for name, module in traced.named_modules() if isinstance(module, nn.ReLU6))
    part = ChannelSlice(name, offset=2)
    torch.testing.assert_close(channel_caps(traced, part, 3), torch.full((3,), 6.0))
    scale_caps(traced, part, torch.tensor([0.5, 1.0, 2.0]))
    lower_caps(traced, part, torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(channel_caps(traced, part, 3), torch.tensor([3.0, 5.0, 12.0]))
    torch.testing.assert_close(traced.get_submodule(name).cap, torch.tensor([6.0, 6, 3, 5, 12, 6, 6, 6]))
