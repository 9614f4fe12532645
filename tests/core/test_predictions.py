"""What is predicted, and how often two networks predict the same."""

import pytest
import torch
from networks import SPEC, chain
from torch import nn

from utils.core.errors import UserError
from utils.core.predictions import Agreement, channel_predictions, count_classes, either_finds, prior_predictions


def test_predictions_of_images_pixels_and_priors():
    assert channel_predictions(torch.tensor([[0.0, 3.0, 1.0]])).tolist() == [1]
    pixels = torch.zeros(1, 3, 2, 2)
    pixels[0, 2, 0, 1] = 1
    assert channel_predictions((pixels, torch.rand(9))).tolist() == [[[0, 2], [0, 0]]]
    assert channel_predictions(torch.tensor([[[-3.0, 0.2, 4.0]]])).tolist() == [[0, 1, 1]]  # of one class: logits,
    assert channel_predictions(torch.tensor([[[0.1, 0.4, 0.9]]])).tolist() == [[0, 0, 1]]  # or probabilities
    priors = torch.zeros(1, 4, 3)
    priors[0, 3, 1] = 1
    assert prior_predictions((priors, torch.rand(1, 4, 4))).tolist() == [[0, 0, 0, 1]]


def test_agreement_counts_equal_predictions():
    counted = Agreement(channel_predictions)
    counted.update(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([[1.0, 2.0], [1.0, 2.0]]))
    counted.update(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 2.0]]))
    assert (counted.same, counted.count, counted.share) == (2, 3, 2 / 3)


def test_what_neither_network_finds_does_not_count():
    first, second = torch.tensor([[-1, -1, 2, 0]]), torch.tensor([[-1, 1, 2, -1]])
    assert either_finds(first, second).tolist() == [[False, True, True, True]]
    assert either_finds(first[:, :1], second[:, :1]).all()  # where neither finds anything they agree


def test_classes_are_counted_along_the_tasks_axis():
    assert count_classes(chain(), SPEC, 1) == 5
    with pytest.raises(UserError, match=r"no logits with classes along axis 2 .*IndexError"):
        count_classes(chain(), SPEC, 2)
    with pytest.raises(UserError, match="check --model and --image_size"):
        count_classes(nn.Linear(3, 2), SPEC, 1)
