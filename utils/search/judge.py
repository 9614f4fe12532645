"""How near a candidate comes to the network as it was loaded, on images that it was not fitted to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from utils.calibration.fidelity import Ratio, comparable, telling_outputs
from utils.calibration.observers import BATCH
from utils.core.predictions import Predictions, class_axis, either_finds, margins
from utils.graph.nodes import as_returned, outputs_of
from utils.passes.result import Quantized

DIMMED = 0.6  # of an image's contrast


@dataclass(frozen=True)
class Judgement:
    """What was measured of one candidate.

    noise: how much the outputs vary over how far they are from float, both as power, in dB, on average over sets of
    images; the larger, the nearer. agreement: percent of
    the predictions that are the float network's, each weighted by how sure that is of it. saturation: the largest share
    of a tensor's values that its range cuts, in percent. predictions: how many of one weight would tell as much.
    """

    noise: float
    agreement: float
    saturation: float
    predictions: float = math.inf


def views(images: Tensor, real: bool) -> list[Tensor]:
    """The sets of images that candidates are judged on: photographs as they are; distilled ones also mirrored, and dimmed.

    Distilled images were made so that the network sees what it should, and flatter what was fitted to others like
    them. Changed, they are to it what it was not shown: so the order of candidates is nearer to that on photographs.
    """
    return [images] if real else [images, images.flip(-1), DIMMED * images]


class Judge:
    """Holds candidates to a network on sets of images; its own outputs are computed once.

    network: as captured, before any pass. sets: [N, C, H, W] each, of which no candidate has seen any. predictions: the
    class indices that are compared; None where the outputs tell of none.
    """

    def __init__(self, network: fx.GraphModule, sets: Sequence[Tensor], predictions: Predictions | None = None):
        self.sets, self.batch, self.predictions = sets, network.meta["batch"] or BATCH, predictions
        self.expected = [self._outputs(network, images) for images in sets]
        self.telling = telling_outputs(network, sets[0])

    def __call__(self, quantized: Quantized) -> Judgement:
        found = [self._outputs(quantized.simulated, images) for images in self.sets]
        pairs = list(zip(self.expected, found, strict=True))
        noise = sum(decibels(mean_share(*pair, self.telling)) for pair in pairs) / len(pairs)
        shares, counts = zip(*(self._agreement(*pair) for pair in pairs), strict=True)
        agreement = sum(shares) / len(pairs)
        near = quantized.fidelity
        saturation = max(near.saturation.values(), default=0.0) if near else 0.0
        return Judgement(noise, agreement, saturation, min(counts))  # other views of the same images tell little more

    def _agreement(self, expected: list[Tensor], found: list[Tensor]) -> tuple[float, float]:
        """In percent, and of how many predictions of one weight."""
        if self.predictions is None:
            return 100.0, math.inf
        before, after = (self.predictions(as_returned(outputs)) for outputs in (expected, found))
        margin = margins(expected[0])
        counted = either_finds(before, after)
        if margin.shape == counted.shape:
            margin = margin[counted]
        share, count = weighted_agreement((before == after)[counted], margin)
        return 100 * share, count

    def _outputs(self, network: nn.Module, images: Tensor) -> list[Tensor]:
        """The network's outputs on all images."""
        with torch.inference_mode():
            parts = [outputs_of(network(some)) for some in images.split(self.batch)]
        return [torch.cat(part) for part in zip(*parts, strict=True)]


def mean_share(expected: list[Tensor], found: list[Tensor], telling: Sequence[bool]) -> float:
    """noise_share of the outputs that tell images apart, on average, and what the others moved.

    What has a number an image, a label or a score, counts where nothing else tells images apart.
    """
    outputs = list(zip(expected, found, telling, strict=True))
    several = [one for one in outputs if one[0].is_floating_point() and one[0].dim() > 1]
    counted = several if any(tells for *_, tells in several) else outputs
    told, shares, silent = Ratio(), [], []
    for before, after, tells in counted:
        before, after = comparable(before, after)
        if tells:
            told.add(before, after)
            shares.append(noise_share(before, after))
        else:
            silent.append(Ratio())
            silent[-1].add(before, after)
    return sum(shares) / len(shares) + sum(one.share_beside(told) for one in silent)


def weighted_agreement(same: Tensor, margin: Tensor) -> tuple[float, float]:
    """The share of predictions that are the same, each counted by its margin: a tie that goes the other way is no loss.

    same: whether they are, of any shape. margin: of the float network's, at least 0; of another shape it does not count.
    Besides, how many predictions of one weight would tell as much (Kish's effective sample size).
    """
    weight = margin.double() if margin.shape == same.shape else torch.ones(same.shape, dtype=torch.double)
    weight = weight.clamp(max=1e6)
    if not weight.sum() > 0:  # ties alone
        weight = torch.ones_like(weight)
    return float((weight * same).sum() / weight.sum()), float(weight.sum().square() / weight.square().sum())


def noise_share(expected: Tensor, found: Tensor) -> float:
    """Power of the error as a share of how much the output varies; 1 where it is no number.

    expected, found: [N], [N, C], [N, P, C] or [N, C, H, W]. About its mean over images and positions for each class: what
    every image shares tells nothing of it.
    """
    expected, found = expected.double(), found.double()
    if expected.dim() == 1:
        expected, found = expected[:, None], found[:, None]
    others = [axis for axis in range(expected.dim()) if axis != class_axis(expected)]
    alone = expected.numel() == expected.shape[class_axis(expected)]  # one image says nothing of what others share
    varied = (expected - (expected.mean() if alone else expected.mean(others, keepdim=True))).square().sum()
    share = float((expected - found).square().sum() / varied.clamp_min(1e-30))
    return share if math.isfinite(share) else 1.0


def decibels(share: float) -> float:
    """A share of power as the ratio of the whole to it, in dB."""
    return -10 * math.log10(max(share, 1e-30))
