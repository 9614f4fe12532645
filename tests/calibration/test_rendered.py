"""Rendered images have statistics of photographs."""

import pytest
import torch

from utils.calibration.rendered import dead_leaves, natural_noise
from utils.core.input_spec import InputSpec

SPEC = InputSpec(size=(48, 64), resize=48)
STARTS = [natural_noise, dead_leaves]


@pytest.mark.parametrize("render", STARTS)
def test_they_have_the_prior_and_are_smooth(render):
    images = render(SPEC, 64, torch.Generator().manual_seed(0))
    mean, variance = SPEC.prior()
    torch.testing.assert_close(images.mean((0, 2, 3)), mean, atol=0.15, rtol=0)
    torch.testing.assert_close(images.var((0, 2, 3)), variance, atol=0.3, rtol=0)
    neighbours = torch.corrcoef(torch.stack([images[..., 1:].flatten(), images[..., :-1].flatten()]))[0, 1]
    assert neighbours > 0.6


@pytest.mark.parametrize("render", STARTS)
@pytest.mark.parametrize("channels", [1, 4])
def test_they_have_the_networks_channels_and_the_seed_decides(render, channels):
    spec = InputSpec(size=(20, 16), resize=20, mean=(0.5,) * channels, std=(0.25,) * channels)
    once, again, other = (render(spec, 3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert once.shape == (3, channels, 20, 16)
    assert torch.equal(once, again) and not torch.equal(once, other)


def test_leaves_have_edges_that_noise_has_not():
    """Differences of neighbours are mostly small and sometimes large: a kurtosis far from a normal distribution's 3."""
    kurtosis = {}
    for render in STARTS:
        images = render(SPEC, 16, torch.Generator().manual_seed(0))
        steps = (images[..., 1:] - images[..., :-1]).flatten()
        kurtosis[render] = float((steps - steps.mean()).pow(4).mean() / steps.var().square())
    assert kurtosis[natural_noise] < 4 and kurtosis[dead_leaves] > 6


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (2, 3), (2, 2), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_few_pixels_are_images_too(size, channels):
    spec = InputSpec(size=size, resize=1, mean=(0.5,) * channels, std=(0.25,) * channels)
    for seed in range(12):
        for count in (1, 4):
            images = dead_leaves(spec, count, torch.Generator().manual_seed(seed))
            assert images.shape == (count, channels, *size) and images.isfinite().all()


def test_leaves_are_of_many_exposures_and_sharp_or_soft():
    images = dead_leaves(InputSpec(size=(96, 96), resize=96), 64, torch.Generator().manual_seed(0))
    deviations, means = images.std((1, 2, 3)), images.mean((1, 2, 3))
    assert deviations.max() > 2.5 * deviations.min() and means.std() > 0.3
    # Differences of diagonal neighbours beside those of far ones: what a blur takes away.
    fine = (images[..., 1:, 1:] - images[..., :-1, :-1]).square().mean((1, 2, 3))
    coarse = (images[..., 8:, 8:] - images[..., :-8, :-8]).square().mean((1, 2, 3))
    sharp = (fine / coarse).sort().values
    assert sharp[:8].mean() < 0.5 * sharp[-8:].mean()
