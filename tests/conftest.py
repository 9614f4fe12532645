"""What tests share: where real data and weights are, if they are there at all."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(autouse=True)
def _no_grad_and_seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def shared() -> Path:
    """The folder of real data and weights, which is not part of the project."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs real data and weights in ../shared, which are not part of the project")
    return SHARED
