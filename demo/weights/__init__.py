"""The demo's trained networks: plain state dicts in half precision, with their hashes."""

import hashlib
from pathlib import Path

from utils.core.errors import UserError

FOLDER = Path(__file__).parent
HASHES = FOLDER / "SHA256SUMS"  # in the format of the program sha256sum


def checked(task: str) -> Path:
    """The task's weights file, if it is the one that was trained."""
    file = FOLDER / f"{task}.pth"
    remedy = "restore it (git checkout demo/weights), or pass --weights and --data of your own"
    if not file.is_file() or not HASHES.is_file():
        raise UserError(f"the demo's weights {str(file)!r} or their {HASHES.name} are not there; {remedy}")
    hashes = {
        line.split()[-1]: line.split()[0] for line in HASHES.read_text(errors="replace").splitlines() if line.split()
    }
    if hashlib.sha256(file.read_bytes()).hexdigest() != hashes.get(file.name):
        raise UserError(
            f"the demo's weights {str(file)!r} are damaged (their SHA-256 is not the one in {HASHES.name}); {remedy}"
        )
    return file
