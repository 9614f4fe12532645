"""What a network takes as its input."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Mean and standard deviation of ImageNet's pixels, in units of 1/255, red, green, blue: the usual
# normalisation, and what is assumed of natural images wherever no data may be looked at.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


def natural_pixels(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of a natural image's pixels in [0, 1]: ImageNet's for colour, their average for other channels."""
    if channels == len(PIXEL_MEAN):
        return PIXEL_MEAN, PIXEL_STD
    grey = [(round(sum(values) / len(values), 3),) for values in (PIXEL_MEAN, PIXEL_STD)]
    colour = (PIXEL_MEAN, PIXEL_STD) if channels == 4 else ((), ())  # red, green, blue, alpha
    return tuple(known + mean * (channels - len(known)) for known, mean in zip(colour, grey, strict=True))


@dataclass(frozen=True)
class InputSpec:
    """Pixels in [0, 1] enter the network as (pixel - mean) / std, [N, channels, height, width].

    size: height and width in pixels. resize: length of the short side before the centre crop.
    interpolation: "bilinear" or "bicubic". mean, std: per channel, in units of full scale.
    """

    size: tuple[int, int] = (224, 224)
    resize: int = 256
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = PIXEL_MEAN
    std: tuple[float, ...] = PIXEL_STD

    @property
    def channels(self) -> int:
        return len(self.mean)

    def shape(self, batch: int = 1) -> tuple[int, ...]:
        return (batch, len(self.mean), *self.size)

    def range(self) -> tuple[float, float]:
        """The lowest and the highest value that any pixel can take after normalisation."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return float((-mean / std).min()), float(((1 - mean) / std).max())

    def prior(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] of a natural image's normalised pixels, from ImageNet's."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        pixel_mean, pixel_std = map(torch.tensor, natural_pixels(len(self.mean)))
        return (pixel_mean - mean) / std, (pixel_std / std) ** 2

    def probe(self, batch: int = 2, seed: int = 0) -> Tensor:
        """Random images with the prior's mean and variance, flat patches under fine noise.

        Patches reach deep into a network, where white noise alone averages out.
        """
        generator = torch.Generator().manual_seed(seed)
        mean, variance = (moment[:, None, None] for moment in self.prior())
        coarse = torch.randn(batch, len(self.mean), 8, 8, generator=generator)
        patches = torch.nn.functional.interpolate(coarse, size=self.size, mode="nearest")
        noise = torch.randn(self.shape(batch), generator=generator)
        low, high = self.range()
        return (mean + variance.sqrt() * (0.8 * patches + 0.6 * noise)).clamp(low, high)
