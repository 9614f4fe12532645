"""Judgements: noise of known size, and agreement that ties hardly count in."""

from typing import Any

import pytest
import torch
from networks import SPEC, chain, made, settle
from torch import Tensor, nn

from dfq import Recipe, quantize_data_free
from utils.calibration.fidelity import fidelity, telling_outputs
from utils.core.predictions import channel_predictions, first_output, margins
from utils.experiment.evaluation import agreement
from utils.graph.capture import capture
from utils.passes.log import PassLog
from utils.passes.result import Quantized
from utils.search.judge import Judge, decibels, mean_share, noise_share, views, weighted_agreement


def test_noise_of_a_hundredth_of_the_power_is_20_db():
    expected = torch.randn(100, 10, generator=torch.Generator().manual_seed(0))
    expected -= expected.mean(0)
    assert decibels(noise_share(expected, expected * 1.1)) == pytest.approx(20, abs=1e-3)
    assert noise_share(expected, expected * float("nan")) == 1.0


def test_what_all_images_share_is_no_signal():
    """An output that is a constant, in a network whose outputs are mostly that, is far from float."""
    varied = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    expected = varied - varied.mean(0) + 100
    assert noise_share(expected, torch.full_like(expected, 100.0)) == pytest.approx(1.0)
    maps = expected.view(50, 4, 1, 1)
    assert noise_share(maps, maps + 0.1) == pytest.approx(noise_share(expected, expected + 0.1))


def test_outputs_that_are_the_same_for_every_image_do_not_count():
    """Anchors beside logits: exact they would flatter these, of a float's last digits they would refuse any network."""

    class Outputs(nn.Module):
        def __init__(self, anchors: str | None, off: float = 0.0):
            super().__init__()
            self.anchors, self.off, self.places = anchors, off, torch.linspace(-1, 9, 8)[:, None].repeat(1, 4)

        def forward(self, x: Tensor) -> Any:
            logits = x.mean((2, 3)) + 0.1 * self.off
            places = self.places + 1e-3 * self.off
            each = places.expand(len(x), 8, 4)
            return {"none": logits, "one": (logits, places), "each": {"boxes": each, "logits": logits}}[self.anchors]

    def judged(anchors: str, images: Tensor) -> tuple[float, float]:
        network, other = (capture(Outputs(anchors, off), SPEC) for off in (0, 1))
        near = fidelity(network, other, images)
        return Judge(network, [images])(Quantized(network, other, PassLog(), near)).noise, near.output

    for count in (1, 2, 8, 11):  # 8 anchors as well
        images = SPEC.probe(count, seed=3)
        alone = judged("none", images)
        assert judged("one", images) == pytest.approx(alone) or count == 1, "one image tells of nothing"
        assert judged("each", images) == pytest.approx(alone) or count == 1
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    alone = mean_share([logits], [logits + 0.3], [True])
    assert mean_share([logits, logits], [logits + 0.3, logits], [True, True]) == pytest.approx(alone / 2)
    assert mean_share([logits, logits], [logits + 0.3, logits], [True, False]) == alone
    constant = nn.Sequential(nn.Flatten(), nn.Linear(SPEC.probe(1).numel(), 3))
    nn.init.zeros_(constant[1].weight)
    assert telling_outputs(capture(constant, SPEC), SPEC.probe(4)) == [True]  # alone, it counts


class Beside(nn.Module):
    """Logits, and another output beside them. off: what quantization did to the other."""

    def __init__(self, other: str, off: float = 0.0):
        super().__init__()
        self.other, self.off = other, off
        self.register_buffer("masked", torch.tensor([[0.0, 0.0, -torch.inf]]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x.mean((2, 3))
        other = {"silent": torch.relu(logits - 100), "anchors": torch.full((8, 4), 64.0), "mask": self.masked}
        return logits, (other | {"masked": logits + self.masked})[self.other] + self.off


@pytest.mark.parametrize("other", ["silent", "anchors", "masked", "mask"])
def test_what_tells_nothing_in_float_counts_where_quantization_moves_it(other):
    """A head that is silent on these images and fires in INT8; places that moved; logits of which one is masked; the mask."""
    images = SPEC.probe(8, seed=3)

    def judged(off):
        exact, quantized = (capture(Beside(other, one), SPEC) for one in (0.0, off))
        near = fidelity(exact, quantized, images)
        return near.output, Judge(exact, [images])(Quantized(exact, quantized, PassLog(), near)).noise

    assert min(judged(0.0)) > 100, "what is exact adds nothing"
    assert max(judged(150.0)) < 0.1, "as much noise as signal"
    assert other == "masked" or min(judged(1e-3)) > 20, "a blip costs no more than it is"


def test_an_output_that_tells_of_one_image_alone_tells_images_apart():
    class Sparse(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = x.mean((2, 3))
            return logits, torch.relu(logits.amax(1, keepdim=True) - 50)

    images = SPEC.probe(40, seed=3)
    images[20] += 100
    assert telling_outputs(capture(Sparse(), SPEC), images) == [True, True]
    assert telling_outputs(capture(Sparse(), SPEC), images[:20]) == [True, False]


def test_a_prediction_counts_by_its_margin():
    logits = torch.tensor([[3.0, 0.0, 1.0], [1.0, 1.1, 0.0]])
    assert margins(logits).tolist() == pytest.approx([2.0, 0.1])
    same = torch.tensor([True, False])
    assert weighted_agreement(same, margins(logits)) == pytest.approx((2 / 2.1, 2.1**2 / 4.01))
    assert weighted_agreement(same, torch.ones(5)) == (0.5, 2)  # of another shape: each counts the same


def test_where_a_detector_finds_nothing_does_not_count():
    """Ten places of background that agree, and two of objects of which one is lost."""

    class Detector(nn.Module):
        def __init__(self, found: int):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(1, 12, 3), requires_grad=False)
            self.logits[..., 0] = 5.0
            self.logits[0, :found, 1] = 9.0

        def forward(self, x: Tensor) -> Tensor:
            return self.logits + 0 * x.mean()

    def predictions(outputs: Tensor) -> Tensor:
        found = first_output(outputs).argmax(2)
        return torch.where(found > 0, found, -1)

    networks, images = [Detector(found) for found in (2, 1)], SPEC.probe(1)
    captured = [capture(one, SPEC) for one in networks]
    assert agreement(*networks, images, predictions) == pytest.approx(50)
    judge = Judge(captured[0], [images], predictions)
    assert judge(Quantized(captured[0], captured[1], PassLog())).agreement == pytest.approx(50)
    assert agreement(networks[0], networks[0], images, predictions) == 100


def test_of_ties_alone_each_counts_the_same():
    assert weighted_agreement(torch.tensor([True, False]), torch.zeros(2)) == (0.5, 2)
    assert weighted_agreement(torch.tensor([True, True]), torch.full((2,), torch.nan)) == (1.0, 2)


def test_priors_have_their_classes_last():
    assert margins(torch.tensor([[[5.0, 1.0], [0.0, 4.0]]])).tolist() == [[4.0, 4.0]]
    assert margins(torch.ones(2, 1, 3, 3)).isinf().all()


def test_more_bits_come_nearer():
    model, graph = made(chain, settle)
    judge = Judge(graph, [SPEC.probe(8, seed=3)], channel_predictions)
    found = [judge(quantize_data_free(model, SPEC, Recipe(quantize=True, bits_weight=b))) for b in (3, 5, 8)]
    assert found[0].noise < found[1].noise < found[2].noise
    assert found[2].agreement == 100.0


def test_a_judge_holds_candidates_to_the_network_as_it_came():
    """A row whose own float network is another one is not near because it is near to that."""
    model, _ = made(chain, settle)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.bias.data += 3  # many values beyond the cap of ReLU6
    judge = Judge(capture(model, SPEC), [SPEC.probe(8, seed=3)])
    recipes = Recipe(quantize=True, equalize=True), Recipe(quantize=True, equalize=True, relu=True)
    kept, replaced = (judge(quantize_data_free(model, SPEC, recipe)).noise for recipe in recipes)
    assert replaced + 10 < kept


def test_sets_of_images_count_alike():
    """Distilled images are judged in three views, and the noise is the mean of their decibels."""
    model, graph = made(chain, settle)
    images = SPEC.probe(8, seed=3)
    assert len(views(images, real=True)) == 1 and len(views(images, real=False)) == 3
    quantized = quantize_data_free(model, SPEC, Recipe(quantize=True, bits_weight=4))
    alone = [Judge(graph, [one])(quantized).noise for one in views(images, real=False)]
    assert Judge(graph, views(images, real=False))(quantized).noise == pytest.approx(sum(alone) / 3)


def test_one_image_is_judged_by_how_much_its_logits_differ():
    logits = torch.tensor([[4.0, 0.0, -4.0]])
    assert noise_share(logits, logits + 0.1) == pytest.approx(0.03 / 32, rel=1e-4)
