"""The user's own images in the place of statistics: networks without BatchNorm, and warnings."""

import pytest
import torch
from networks import SPEC
from torch import Tensor, nn

from dfq import Recipe, quantize_data_free
from utils.calibration.images import Images, held_out
from utils.core.predictions import channel_predictions
from utils.experiment.evaluation import agreement

CLASSES = 6
WHOLE = Recipe(equalize=True, quantize=True, correction=True)


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with a bright bar whose place and direction are its class: images [N, 3, H, W] and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.5 * SPEC.probe(count, seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        place = slice(3 + 7 * (label % 3), 6 + 7 * (label % 3))
        image[(slice(None), place) if label < 3 else (slice(None), slice(None), place)] += 0.8
    return images, labels


class Block(nn.Module):
    """ConvNeXt's: depthwise, LayerNorm over channels, two linear layers with a GELU, a scaled residual."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm, self.grow = nn.LayerNorm(channels), nn.Linear(channels, 4 * channels)
        self.shrink, self.scale = nn.Linear(4 * channels, channels), nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.shrink(nn.functional.gelu(self.grow(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 2, 2), Block(16), nn.Conv2d(16, 32, 2, 2), Block(32)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, CLASSES))


def vgg() -> nn.Module:
    layers, width = [], 3
    for wide in (16, 32, 32):
        for inputs in (width, wide):
            layers += [nn.Conv2d(inputs, wide, 3, padding=1), nn.ReLU()]
        layers, width = [*layers, nn.MaxPool2d(2)], wide
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 9, 64), nn.ReLU(), nn.Linear(64, CLASSES))


@pytest.fixture(scope="module", params=[vgg, convnext])
def trained(request) -> nn.Module:
    """A network without BatchNorm that tells the bars apart."""
    torch.manual_seed(0)
    with torch.enable_grad():
        model, (images, labels) = request.param(), pictures(256, 1)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for step in range(60):
            some = torch.arange(64) + 64 * (step % 4)
            loss = nn.functional.cross_entropy(model(images[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def halves(count: int) -> dict[str, Tensor]:
    images = pictures(count, 2)[0]
    return {"images": images[::2], "judging": images[1::2], "real": True}


@pytest.mark.parametrize(
    "recipe", [Recipe(quantize=True), WHOLE, Recipe(**WHOLE.settings | {"distill_range": True})], ids=str
)
def test_networks_without_batchnorm_work_with_images(trained, recipe):
    images, labels = pictures(400, 3)
    result = quantize_data_free(trained, SPEC, recipe, **halves(32))
    before, after = ((model(images).argmax(1) == labels).float().mean() for model in (trained, result.simulated))
    assert before > 0.8 and before - after <= 0.005
    assert agreement(trained, result.simulated, images, channel_predictions) >= 97
    assert result.fidelity.output > 25
    assert not result.log.warnings


def test_images_serve_every_range_and_correction(trained):
    counts = quantize_data_free(trained, SPEC, WHOLE, **halves(32)).log.counts()
    layers = counts["found layers"]["applied"]
    assert counts["corrected biases"] == {"applied": layers, "skipped": 0}
    assert counts["inserted quantizers"]["skipped"] == 0


def test_unequal_channels_need_equalization_and_get_it():
    torch.manual_seed(0)
    model = vgg().eval()
    for first, second in ((0, 2), (5, 7), (10, 12)):  # the same function, with weights of unlike size
        scale = torch.logspace(-2, 1, model[first].out_channels)
        model[first].weight *= scale.view(-1, 1, 1, 1)
        model[first].bias *= scale
        model[second].weight /= scale.view(1, -1, 1, 1)
    plain, equalized = (
        quantize_data_free(model, SPEC, recipe, **halves(32)) for recipe in (Recipe(quantize=True), WHOLE)
    )
    assert equalized.fidelity.output > max(25, plain.fidelity.output + 8)


@pytest.mark.parametrize(("count", "judges"), [(64, 8), (32, 4), (24, 2), (12, 2), (8, 2), (3, 1), (2, 1)])
def test_held_out_images_are_no_twins_of_those_learned_from(count, judges):
    """Pairs follow on each other: a distilled leaf and the same as it was rendered."""
    images = torch.arange(count).view(count, 1, 1, 1)
    own = held_out(Images(images, images[:1]))
    assert torch.equal(torch.cat([own.calibration, own.judging]), images) and len(own.judging) == judges
    assert count < 4 or not set((own.calibration // 2).flatten().tolist()) & set((own.judging // 2).flatten().tolist())
