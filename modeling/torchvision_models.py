"""What torchvision's networks of every task have in common: their names and official weights."""

from types import ModuleType
from urllib.error import URLError

from torch import Tensor

from modeling.factory import near_matches
from utils.core.errors import UserError
from utils.core.torchvision_compat import torchvision


def official_weights(
    name: str, family: ModuleType, task: str, pinned: str | None = None
) -> torchvision.models.WeightsEnum:
    """torchvision's entry for the weights of a network: the default ones, or the pinned ones.

    family: torchvision.models, or its sub-module of the task. task: what an unknown name is not.
    """
    names = torchvision.models.list_models(module=family)
    if name not in names:
        hint = near_matches(name, names) or f"; choose from {', '.join(names)}"
        raise UserError(f"torchvision has no {task} network {name!r}{hint}")
    entries = torchvision.models.get_model_weights(name)
    return entries[pinned] if pinned else entries.DEFAULT


def download(official: torchvision.models.WeightsEnum, name: str) -> dict[str, Tensor]:
    try:
        return official.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download torchvision's weights of {name!r} ({official.url}): {error}; offline, pass --weights with a checkpoint file"
        ) from None
