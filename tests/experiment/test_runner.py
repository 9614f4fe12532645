"""The runner: what rows share is evaluated once, and nothing is shared that differs."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from networks import SPEC, chain
from torch import nn

from utils.core.predictions import channel_predictions
from utils.experiment import cli
from utils.experiment.evaluation import Evaluator, agreement
from utils.experiment.runner import Run
from utils.quantization.recipe import Recipe
from utils.tasks.base import Data
from utils.tasks.classification import TASK
from utils.tasks.metrics import TopK

CPU = torch.device("cpu")
ARGS = Namespace(batch_size=4, workers=0, seed=0, table=True, skip_bad_images=False)


class Counted(nn.Module):
    """Says the same class of every image, and counts how many it saw."""

    def __init__(self, answer: int):
        super().__init__()
        self.answer, self.seen = answer, 0

    def forward(self, images):
        self.seen += len(images)
        return torch.eye(3)[self.answer].repeat(len(images), 1)


@pytest.fixture
def evaluator():
    samples = [(torch.zeros(3, 4, 4), i % 3) for i in range(9)]
    return Evaluator(Data(samples, lambda _: TopK(), lambda *_: [], {}), ARGS, CPU)


def test_a_network_of_a_known_key_is_not_run_again(evaluator):
    first, again, quantized = Counted(0), Counted(1), Counted(2)
    metrics, _ = evaluator.score({"fp32_original": first, "quantized": quantized}, {"fp32_original": "a"})
    assert list(metrics) == ["fp32_original", "quantized"]
    metrics, seconds = evaluator.score({"fp32_original": again, "quantized": quantized}, {"fp32_original": "a"})
    assert (first.seen, again.seen, quantized.seen) == (9, 0, 18)
    assert metrics["fp32_original"].predictions == [0] * 9 and seconds.keys() == metrics.keys()


def test_a_network_of_another_key_is_run_whatever_it_is_called(evaluator):
    first, other = Counted(0), Counted(1)
    evaluator.score({"fp32_original": first}, {"fp32_original": "a"})
    metrics, _ = evaluator.score({"fp32_original": other}, {"fp32_original": "b"})
    assert metrics["fp32_original"].predictions == [1] * 9


def run(model: nn.Module) -> Run:
    return Run(TASK, [], ARGS, SimpleNamespace(model=model), SPEC, CPU)


def test_keys_say_what_decides_a_float_network():
    torch.manual_seed(0)
    one, other = run(chain()), run(chain())
    plain, corrected = Recipe(quantize=True, relu=True), Recipe(quantize=True, relu=True, correction=True)
    assert one.float_keys(plain) == one.float_keys(corrected)
    assert one.float_keys(plain)["fp32"] != one.float_keys(Recipe(quantize=True))["fp32"]
    assert one.float_keys(plain)["fp32_original"] == one.float_keys(Recipe(quantize=True))["fp32_original"]
    assert not set(one.float_keys(plain).values()) & set(other.float_keys(plain).values())


def test_agreement_counts_all_images_of_all_batches():
    class Parity(nn.Module):
        """Class 1 for every other image."""

        def forward(self, images):
            return torch.eye(2)[(images.flatten(1)[:, 0] % 2).long()]

    images = torch.arange(20.0).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    always = Counted(0)
    assert agreement(Parity(), Parity(), images, channel_predictions) == 100
    assert agreement(Parity(), lambda x: always(x)[:, :2], images, channel_predictions, batch=3) == 50


def test_the_command_of_a_chosen_row_can_be_typed_again():
    """A recipe that uses no images, found by a search that made some its own way."""
    argv = ["--auto", "--distill_steps", "3"]
    run = Run(TASK, argv, cli.parse(TASK, argv), None, SPEC, CPU)
    command = run.command(Recipe(quantize=True, equalize=True))
    assert command == "python main_cls.py --distill_steps 3 --equalize --quantize --fidelity"
    assert cli.parse(TASK, command.split()[2:]).distill_steps == 3
