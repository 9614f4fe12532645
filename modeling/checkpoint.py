"""Reading checkpoints, safely, and fitting them to networks by name and shape."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from utils.core.errors import UserError
from utils.core.unpickling import printable, read_plain, reason

# Keys under which training scripts save: averages of the weights over training, which are what such scripts
# evaluate, then the weights themselves; the usual ones first.
AVERAGED = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema", "teacher")
PLAIN = ("state_dict", "model_state_dict", "model", "model_state", "net", "network", "module", "weights", "params")
PLAIN += ("student",)
PREFIXES = ("module.", "model.", "net.", "network.", "backbone.", "encoder.")
BOOKKEEPING = ("n_averaged", "total_ops", "total_params", "num_batches_tracked")  # last part of a name

_REMEDY = "save model.state_dict() and pass that"
_DEEPEST = 3  # wrappers within wrappers


def read_checkpoint(source: str, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint file or http(s) URL, by name.

    key: the entry that holds them, as "ema" or "ema.module"; None: a bare state dict, or one under the keys that
    training scripts use. Prefixes that every name has are removed, and bookkeeping is dropped. What was chosen is
    printed where there was a choice. Nothing in the file runs.
    """
    content = read_plain(_local(source), _REMEDY)
    sets = find_state_dicts(content)
    name = _choose(sets, source, key)
    tensors = {_without_compiled(str(entry)): value for entry, value in sets[name].items() if isinstance(value, Tensor)}
    kept = {entry: value for entry, value in tensors.items() if not _dropped(entry, tensors)}
    prefix = common_prefix(kept)
    said = [f"taken from {name!r}"] if name else []
    said += [f"not {other!r}" for other in sets if name and other != name and not other.startswith(f"{name}.")]
    if len(said) > 1:
        said[0] += f"{' (averaged)' if _averaged(name) else ''}"
        said[-1] += f"; for {'that' if len(said) == 2 else 'one of those'} pass --checkpoint_key"
    said += [f"prefix {prefix!r} removed"] if prefix else []
    if said:
        print(f"weights of {printable(Path(source).name)}: {printable(', '.join(said))}")
    return {entry.removeprefix(prefix): value for entry, value in kept.items()}


def find_state_dicts(content: Any) -> dict[str, Mapping[str, Any]]:
    """Every state dict in a checkpoint by its place ("" for the content itself, "ema.module"), the one to take first.

    Optimizers and other training state are none.
    """
    found: dict[str, Mapping[str, Any]] = {}

    def look(entry: Any, place: str, depth: int) -> None:
        if not isinstance(entry, Mapping):
            return
        inner = [key for key in entry if isinstance(entry[key], Mapping)]
        for key in inner if depth < _DEEPEST else ():
            if re.search("optim|sched|scaler|^amp$|callback|^loops$", str(key), re.IGNORECASE) is None:
                look(entry[key], f"{place}.{key}" if place else str(key), depth + 1)
        if any(isinstance(value, Tensor) and "." in str(key) for key, value in entry.items()) or (
            not inner and any(isinstance(value, Tensor) for value in entry.values())
        ):
            found[place] = entry

    look(content, "", 0)
    return {place: found[place] for place in sorted(found, key=_rank)}


def _rank(place: str) -> tuple[int, int]:
    """Places that are to be taken come first: averages, then the usual keys, then the content itself, then others."""
    parts = place.split(".")
    if _averaged(place):
        return 0, min(AVERAGED.index(part) for part in parts if part in AVERAGED)
    known = [PLAIN.index(part) for part in parts if part in PLAIN]
    if known and len(known) == len(parts):
        return 1, min(known)
    return (2, 0) if not place else (3, 0)


def _averaged(place: str) -> bool:
    return any(part in AVERAGED for part in place.split("."))


def _choose(sets: Mapping[str, Mapping[str, Any]], source: str, key: str | None) -> str:
    named = ", ".join(printable(place) for place in sets if place)
    if key is not None:
        inside = [place for place in sets if place == key or place.startswith(f"{key}.")]
        if not inside:
            there = f"there is {named}" if named else "the file is not divided" if sets else _REMEDY
            raise UserError(f"{source!r} holds no state dict under --checkpoint_key {key!r}; {there}")
        return inside[0]
    if not sets:
        raise UserError(f"{source!r} holds no state dict; {_REMEDY}")
    unknown = [place for place in sets if _rank(place)[0] == 3]
    if len(unknown) == len(sets) > 1:
        raise UserError(f"{source!r} holds several state dicts; pass --checkpoint_key with one of {named}")
    return next(iter(sets))


def _without_compiled(name: str) -> str:
    """torch.compile puts _orig_mod before the names of what it compiles, anywhere."""
    return re.sub(r"(^|\.)_orig_mod\.", r"\1", name)


def _dropped(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether an entry is bookkeeping of the training; BatchNorm's counter belongs to a BatchNorm."""
    layer, _, last = name.rpartition(".")
    if last == "num_batches_tracked":
        return f"{layer}.running_mean" not in tensors
    return last in BOOKKEEPING and tensors[name].numel() == 1


def common_prefix(names: Iterable[str]) -> str:
    """The longest chain of known wrapper prefixes that all names have."""
    names, prefix = list(names), ""
    while found := [p for p in PREFIXES if names and all(name.startswith(prefix + p) for name in names)]:
        prefix += found[0]
    return prefix


def _local(source: str) -> Path:
    """The file, downloaded if it is not there yet."""
    try:
        url = urlparse(source)
    except ValueError:
        url = urlparse("")
    if url.scheme not in ("http", "https"):
        file = Path(source)
        if not file.is_file():
            what = "a folder, no weights file," if file.is_dir() else "no weights file"
            raise UserError(f"{what} at {source!r}; pass --weights with a file or a URL")
        return file
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / Path(url.path).name
    try:
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(source, str(file))
    except (URLError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot read weights from {source!r}: {reason(error)}; pass --weights with a local file"
        ) from None
    return file


def fit(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> nn.Module:
    """Copy every tensor into the model; a name or a shape that does not fit is an error.

    The first convolution takes as many channels as the checkpoint has for it. A wrapper prefix that all names of the
    model have may be missing in the checkpoint, or the other way round.
    """
    own = common_prefix(model.state_dict())
    tensors = (
        {own + key.removeprefix(common_prefix(tensors)): value for key, value in tensors.items()} if own else tensors
    )
    adapt_input(model, tensors)
    wanted = model.state_dict()
    counter = "num_batches_tracked"  # BatchNorm's: absent from old checkpoints
    missing = [key for key in wanted if key not in tensors and not key.endswith(counter)]
    unexpected = [key for key in tensors if key not in wanted and not key.endswith(counter)]
    shared = [key for key in wanted if key in tensors and not key.endswith(counter)]
    misshapen = [
        f"{key} is {tuple(tensors[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in shared
        if tensors[key].shape != wanted[key].shape
    ]
    no_floats = [
        f"{key} is {str(tensors[key].dtype).removeprefix('torch.')}"
        for key in shared
        if wanted[key].is_floating_point() and not tensors[key].is_floating_point()
    ]
    problems = [
        f"{len(keys)} {what} ({printable(', '.join(keys[:3]))}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
            ("not of floating point", no_floats),
        )
        if keys
    ]
    if problems:
        raise UserError(f"checkpoint {source!r} does not fit this network: {'; '.join(problems)}; check --model")
    model.load_state_dict(
        {key: tensors[key].to(value.dtype) for key, value in wanted.items() if key in tensors}, strict=False
    )
    return model


def first_convolution(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The network's first convolution by order of registration, and its name; None where it has none."""
    kinds = nn.Conv1d, nn.Conv2d, nn.Conv3d
    return next(((name, module) for name, module in model.named_modules() if isinstance(module, kinds)), None)


def adapt_input(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the first convolution as many input channels as the checkpoint's weights have."""
    found = first_convolution(model)
    weight = tensors.get(f"{found[0]}.weight") if found else None
    if weight is None or weight.shape[2:] != found[1].weight.shape[2:] or found[1].groups != 1 or not weight.shape[1]:
        return
    old = found[1]
    if weight.shape[1] != old.in_channels:
        old.in_channels = weight.shape[1]
        old.weight = nn.Parameter(torch.empty(old.out_channels, *weight.shape[1:], dtype=old.weight.dtype))


def count_outputs(tensors: Mapping[str, Tensor], model: nn.Module, default: int) -> int:
    """How many outputs a checkpoint is for, by the last tensor of the network whose layout it has."""
    last = tensors.get(list(model.state_dict())[-1])
    return default if last is None or last.dim() == 0 else last.shape[0]


def check_finite(model: nn.Module) -> None:
    """Refuse a network with NaN or inf among its weights or statistics, naming the first layer."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            broken = int((~tensor.isfinite()).sum())
            raise UserError(f"weights of {name!r} hold {broken} NaN or infinite values; pass a sound checkpoint")
