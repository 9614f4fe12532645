"""Where what can be made again is kept between runs."""

import os
from pathlib import Path

CACHE_VARIABLE = "DFQ_CACHE"


def cache_folder(root: str | None = None) -> Path:
    """root, or $DFQ_CACHE, or dfq in the user's cache folder."""
    if root or os.environ.get(CACHE_VARIABLE):
        return Path(root or os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfq"
