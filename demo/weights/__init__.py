"""The demo's trained networks: plain state dicts in half precision, with their hashes."""

import hashlib
import shutil
from pathlib import Path

import torch
from torch import nn

from utils.core.errors import UserError

_FOLDER = Path(__file__).parent
_HASHES = _FOLDER / "SHA256SUMS"  # in the format of the program sha256sum


def checked(task: str) -> Path:
    """The task's weights file, if it is the one that was trained."""
    file = _FOLDER / f"{task}.pth"
    remedy = "restore it (git checkout demo/weights), or pass --weights and --data of your own"
    if not file.is_file() or not _HASHES.is_file():
        raise UserError(f"the demo's weights {str(file)!r} or their {_HASHES.name} are not there; {remedy}")
    hashes = {
        line.split()[-1]: line.split()[0] for line in _HASHES.read_text(errors="replace").splitlines() if line.split()
    }
    if hashlib.sha256(file.read_bytes()).hexdigest() != hashes.get(file.name):
        raise UserError(
            f"the demo's weights {str(file)!r} are damaged (their SHA-256 is not the one in {_HASHES.name}); {remedy}"
        )
    return file


def store(task: str, model: nn.Module, log: Path) -> None:
    """Keep a trained network in half precision, its log, and the hashes of all."""
    tensors = {
        name: tensor.cpu().half() if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in model.state_dict().items()
    }
    torch.save(tensors, _FOLDER / f"{task}.pth")
    shutil.copyfile(log, _FOLDER / f"{task}.jsonl")
    files = sorted(_FOLDER.glob("*.pth"))
    _HASHES.write_text("".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files))
