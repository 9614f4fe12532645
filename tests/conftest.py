"""What tests share: a thread a worker, one cache, and where real data and weights are, if they are there at all."""

import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest

# Before torch is imported: workers that each take all cores wait for one another. Processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(autouse=True)
def _no_grad_and_seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_cache(tmp_path_factory: pytest.TempPathFactory):
    """The demo's scenes are rendered once for all workers, and nothing of the user's own cache is read."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFQ_CACHE", str(folder))
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_capture():
    """No test has the demo's networks captured anew."""
    from networks_captured import captures_shared

    from utils.experiment import runner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "capture", captures_shared(runner.capture))
        yield


@pytest.fixture(autouse=True, scope="session")
def _few_steps():
    """Images that a run distils for itself, for ranges that nothing tells of, take 3 steps: 20 cost more than all else in it."""
    from utils.calibration import distillation

    few_images = distillation.few_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "few_images", lambda spec: replace(few_images(spec), steps=3))
        yield


def pytest_collection_finish() -> None:
    """What was imported stays: to look through it again and again for garbage is a tenth of what a capture costs."""
    gc.collect()
    gc.freeze()


# The long tests, in two halves. What draws the demo's scenes is in one, and comes last in the other, which finds them drawn.
LONG = (("test_properties", "test_distributed"), ("test_demo_runs", "test_export", "test_table", "test_real_networks"))


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Long tests first, so that no worker has one left when the others are done: a half at the head of what each of two
    workers is given at once, an eighth of all."""
    first, second = ([item for stem in half for item in items if item.path.stem == stem] for half in LONG)
    short = [item for item in items if item.path.stem not in LONG[0] + LONG[1]]
    filling = max(0, len(items) // 8 - len(first))
    items[:] = first + short[:filling] + second + short[filling:]


@pytest.fixture
def shared() -> Path:
    """The folder of real data and weights, which is not part of the project."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs real data and weights in ../shared, which are not part of the project")
    return SHARED
