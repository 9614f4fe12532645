"""Images that are rendered, from no network at all, with statistics of photographs.

Noise has their spectrum. Dead leaves have edges, shades and textures besides: shapes of all sizes fall on one another
(Lee, Mumford and Huang, IJCV 2001, "Occlusion models for natural images"). As training images they come near to
photographs (Baradad et al., NeurIPS 2021, "Learning to see by looking at noise").
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.core.input_spec import InputSpec

LEAVES = 150  # on an image; they hide nearly all of its ground
SMALLEST, LARGEST = 0.1, 0.5  # radius of a leaf, as a share of the image's side
TEXTURES = 4
BLURRED = 0.6  # the share of images that are not sharp, as lenses, motion and compression leave photographs
EXPOSURE = 0.4  # deviation of the logarithm of an image's contrast, and of its brightness in the prior's deviations


def natural_noise(spec: InputSpec, count: int, generator: torch.Generator) -> Tensor:
    """Noise [N, 3, H, W] with photographs' 1/f amplitudes (Field, 1987), mostly grey, of the prior's mean and deviation."""
    height, width = spec.size
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    amplitude = 1 / frequency.clamp_min(1 / max(height, width))

    def noise(channels: int) -> Tensor:
        white = torch.randn(count, channels, height, width, generator=generator)
        shaped = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=spec.size)
        return shaped / _deviation(shaped, (1, 2, 3))

    mean, variance = (moment[:, None, None] for moment in spec.prior())
    return mean + variance.sqrt() * (0.9 * noise(1) + math.sqrt(1 - 0.9**2) * noise(len(spec.mean)))


def dead_leaves(spec: InputSpec, count: int, generator: torch.Generator) -> Tensor:
    """Images [count, C, H, W] of leaves that hide one another, of the prior's mean and deviation."""
    mean, variance = (moment[:, None, None] for moment in spec.prior())
    textures = [(natural_noise(spec, count, generator) - mean) / variance.sqrt() for _ in range(TEXTURES)]
    images = (natural_noise(spec, count, generator) - mean) / variance.sqrt()
    for i in range(LEAVES):
        across, inside = _leaf(spec, count, generator)
        images = torch.where(inside, _filling(across, textures[i % TEXTURES], generator), images)
    images = _exposed(_blurred(_standard(images), generator), generator)
    return mean + variance.sqrt() * _standard(images)


def _standard(images: Tensor) -> Tensor:
    """Every channel of mean 0 and deviation 1 over all images."""
    images = images - images.mean((0, 2, 3), keepdim=True)
    return images / _deviation(images, (0, 2, 3))


def _deviation(images: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The deviation along axes, which are kept; 1 where all values are the same, as on images of very few pixels."""
    several = math.prod(images.shape[axis] for axis in axes) > 1
    deviation = images.std(axes, keepdim=True, correction=int(several))
    return torch.where(deviation > 0, deviation, 1.0)


def _blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    """A part of the images, by one to four passes of a binomial filter."""
    share = torch.rand(len(images), 1, 1, 1, generator=generator) / BLURRED
    binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(binomial, binomial).expand(images.shape[1], 1, 3, 3)
    border = "reflect" if min(images.shape[2:]) > 1 else "replicate"  # of a line of pixels there is nothing to reflect
    for already in (0.0, 0.25, 0.5, 0.75):
        softer = F.conv2d(F.pad(images, (1, 1, 1, 1), mode=border), kernel, groups=images.shape[1])
        images = torch.where(share < 1 - already, softer, images)
    return images


def _exposed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image with a contrast and a brightness of its own."""
    contrast, brightness = (EXPOSURE * torch.randn(len(images), 1, 1, 1, generator=generator) for _ in range(2))
    return images * contrast.exp() + brightness


def _leaf(spec: InputSpec, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Coordinates across a leaf in its radii, and whether pixels lie on it, [count, 1, H, W] each: an ellipse or a
    rectangle, turned, and of a radius whose density falls with its cube, as that of things in photographs does."""

    def uniform() -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator)

    y, x = torch.meshgrid(*(torch.linspace(0, 1, side) for side in spec.size), indexing="ij")
    radius = SMALLEST / (1 - uniform() * (1 - (SMALLEST / LARGEST) ** 2)).sqrt()
    right, down, angle, stretch = x - uniform(), y - uniform(), math.pi * uniform(), (1.4 * (uniform() - 0.5)).exp()
    across = (right * angle.cos() + down * angle.sin()) * stretch / radius
    along = (down * angle.cos() - right * angle.sin()) / stretch / radius
    round_ = uniform() < 0.5
    inside = torch.where(round_, across.square() + along.square() < 1, torch.maximum(across.abs(), along.abs()) < 0.85)
    return across, inside


def _filling(across: Tensor, texture: Tensor, generator: torch.Generator) -> Tensor:
    """A leaf's colour, mostly grey, a shade across it, and a texture from some place, of some strength."""
    count, channels, height, width = texture.shape
    grey, shade = (torch.randn(count, 1, 1, 1, generator=generator) for _ in range(2))
    colour = torch.randn(count, channels, 1, 1, generator=generator)
    down, right = (int(torch.randint(side, (), generator=generator)) for side in (height, width))
    strength = 0.5 * torch.rand(count, 1, 1, 1, generator=generator)
    shades = 0.4 * shade * across.clamp(-2, 2)
    return 0.85 * grey + 0.3 * colour + shades + strength * texture.roll((down, right), (2, 3))
