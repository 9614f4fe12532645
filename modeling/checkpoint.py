"""Reading checkpoints, safely, and fitting them to networks by name and shape."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from utils.core.errors import UserError

_WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which training scripts save
_UNNEEDED = "num_batches_tracked"  # BatchNorm's counter: absent from old checkpoints


def read_checkpoint(source: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint file or http(s) URL, by name.

    Accepts a bare state dict or one under 'state_dict' and the like, with or without the
    'module.' prefixes of DataParallel. Only tensors are unpickled: a file that wants to run code
    is refused (torch.load with weights_only).
    """
    try:
        if urlparse(source).scheme in ("http", "https"):
            content = torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True)
        else:
            if not Path(source).is_file():
                raise UserError(f"no weights file at {source!r}; pass --weights with a file or a URL")
            content = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first_line = str(error).splitlines()[0].split("(1)")[0].strip()
        raise UserError(
            f"{source!r} is not a checkpoint of plain tensors and is not loaded, since unpickling it "
            f"could run code ({first_line}); save model.state_dict() and pass that"
        ) from None
    except (URLError, OSError) as error:
        raise UserError(f"cannot read weights from {source!r}: {error}; pass --weights with a local file") from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{source!r} is not a readable PyTorch checkpoint: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from None

    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = content if isinstance(content, Mapping) else {}
    tensors = {str(key).removeprefix("module."): value for key, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{source!r} holds no state dict; save model.state_dict() and pass that")
    return tensors


def fit(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> nn.Module:
    """Copy every tensor into the model; a name or a shape that does not fit is an error."""
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in tensors and not key.endswith(_UNNEEDED)]
    unexpected = [key for key in tensors if key not in wanted and not key.endswith(_UNNEEDED)]
    misshapen = [
        f"{key} is {tuple(tensors[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in tensors and tensors[key].shape != value.shape and not key.endswith(_UNNEEDED)
    ]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if keys
    ]
    if problems:
        raise UserError(f"checkpoint {source!r} does not fit this network: {'; '.join(problems)}; check --model")
    model.load_state_dict(
        {key: tensors[key].to(value.dtype) for key, value in wanted.items() if key in tensors}, strict=False
    )
    return model


def outputs_of(tensors: Mapping[str, Tensor], model: nn.Module, default: int) -> int:
    """How many outputs a checkpoint is for, by the last tensor of the network whose layout it has."""
    last = tensors.get(list(model.state_dict())[-1])
    return default if last is None or last.dim() == 0 else last.shape[0]


def check_finite(model: nn.Module) -> None:
    """Refuse a network with NaN or inf among its weights or statistics, naming the first layer."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            broken = int((~tensor.isfinite()).sum())
            raise UserError(f"weights of {name!r} hold {broken} NaN or infinite values; pass a sound checkpoint")
