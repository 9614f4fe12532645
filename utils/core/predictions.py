"""What a network predicts, and how often two networks predict the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec

Outputs = Tensor | Sequence[Tensor]
# A network's outputs on N images -> class indices, of any shape; below 0 where nothing is found.
Predictions = Callable[[Outputs], Tensor]


def first_output(outputs: Outputs) -> Tensor:
    """A network's output, or the first one of several."""
    return outputs[0] if isinstance(outputs, tuple | list) else outputs


def class_axis(logits: Tensor) -> int:
    """Along which axis logits tell of classes: of images [N, C], of pixels [N, C, H, W] and of priors [N, P, C]."""
    return 2 if logits.dim() == 3 else 1


def margins(logits: Tensor) -> Tensor:
    """How far the largest logit is over the second, without the axis of classes; infinite where there is one class."""
    axis = class_axis(logits)
    if logits.shape[axis] < 2:
        return torch.full_like(logits.select(axis, 0), torch.inf)
    first, second = logits.topk(2, axis).values.unbind(axis)
    return first - second


def channel_predictions(outputs: Outputs) -> Tensor:
    """Class indices [N, ...] of logits [N, C, ...]: one for an image, or one for each of its pixels.

    Of a single class, whether it is there: a logit above 0, or a probability above 0.5 where all are between 0 and 1.
    """
    logits = first_output(outputs)
    if logits.shape[1] == 1:
        probable = bool(logits.min() >= 0) and bool(logits.max() <= 1)
        return (logits[:, 0] > (0.5 if probable else 0)).long()
    return logits.argmax(1)


def prior_predictions(outputs: Outputs) -> Tensor:
    """Class indices [N, P] of a detector's logits [N, P, C], its first output."""
    return first_output(outputs).argmax(2)


def count_classes(model: nn.Module, spec: InputSpec, axis: int) -> int:
    """How many classes a network distinguishes: the size of its first output's class axis.

    A network that fails on an image of its input size, or has no such axis, is a UserError.
    """
    images = spec.probe(1)
    try:
        with torch.inference_mode():
            logits = first_output(model(images))
        return logits.shape[axis]
    except Exception as error:  # the user's network may raise anything
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the network gives no logits with classes along axis {axis} for images of {tuple(images.shape)} "
            f"({type(error).__name__}: {reason}); check --model and --image_size"
        ) from error


def either_finds(first: Tensor, second: Tensor) -> Tensor:
    """Where either of two networks' predictions finds something: most of a detector's places are background to both,
    and would hide how it fares where there are objects. Everywhere, if neither finds any."""
    found = (first >= 0) | (second >= 0)
    return found if found.any() else torch.ones_like(found)


@dataclass
class Agreement:
    """How often two networks predict the same class. predictions: of a network's outputs."""

    predictions: Predictions
    same: int = 0
    count: int = 0

    def update(self, first: Outputs, second: Outputs) -> None:
        """Count what two networks say about the same images."""
        equal = self.predictions(first) == self.predictions(second)
        self.same, self.count = self.same + int(equal.sum()), self.count + equal.numel()

    @property
    def share(self) -> float:
        return self.same / max(self.count, 1)
