"""Several processes find what one finds, to the last image."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import main_cls
from utils.core import distributed
from utils.core.errors import UserError
from utils.experiment.records import read_lines

ROOT = Path(__file__).resolve().parents[2]
DRIVER = """
import sys
import main_cls, main_det, main_seg
from utils.core.distributed import process_group
with process_group():
    for script in (main_cls, main_seg, main_det)[: int(sys.argv[1])]:
        script.main(sys.argv[2:])
"""


def run(processes: int, folder: Path, tasks: int = 3) -> list[dict]:
    """The lines of the first scripts' runs on the demo; images and thread count leave nothing to chance."""
    (folder / "driver.py").write_text(DRIVER)
    results = folder / f"{processes}.jsonl"
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    shared = [
        "--quantize",
        "--equalize",
        "--correction",
        "--distill_range",
        "--range_method",
        "percentile",
        "--batch_size",
        "2",
        "--workers",
        "0",
    ]
    small = ["--limit", "7", "--distill_images", "3", "--distill_batch", "1", "--distill_steps", "1"]
    places = ["--results", str(results), "--distill_cache", str(folder / f"distilled{processes}")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*start, str(folder / "driver.py"), str(tasks), *shared, *small, *places],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        timeout=600,
    )
    return read_lines(results)


def found(line: dict) -> dict:
    kept = ("task", "samples", "metrics", "intervals", "change_interval", "per_class", "fidelity", "weights_sha256")
    return {key: line[key] for key in kept}


def test_two_and_three_processes_find_what_one_finds(tmp_path):
    alone, two, three = run(1, tmp_path), run(2, tmp_path), run(3, tmp_path, tasks=1)
    assert [line["task"] for line in alone] == ["classification", "segmentation", "detection"]
    assert [line["samples"] for line in alone] == [7, 7, 7]
    assert list(map(found, alone)) == list(map(found, two))
    assert found(alone[0]) == found(three[0])  # the first script stands for all: shards are cut in one place
    assert two[0]["command"].startswith("torchrun --nproc-per-node=2 main_cls.py ")


def test_a_lost_process_ends_the_run_with_a_line(tmp_path):
    """The second of two processes is killed while the first waits for it."""
    (tmp_path / "driver.py").write_text(
        "import os, signal\n"
        "from utils.core import distributed\n"
        "from utils.experiment import cli\n"
        "def main(_):\n"
        "    if not distributed.is_main_process():\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    distributed.all_gather(1)\n"
        "cli.run(main, 'driver.py')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(tmp_path / "driver.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert ended.returncode != 0
    assert (
        "driver.py: error: lost another process" in ended.stderr
        or "another process of this run has ended" in ended.stderr
    )


def test_shares_are_the_whole(monkeypatch):
    items = list(range(11))
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.shard(items))
    assert [item for own in shares for item in own] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_images(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "all_gather", lambda value: [value])
    with pytest.raises(UserError, match="3 processes for 2 images; start at most 2"):
        main_cls.main(["--limit", "2", "--results", str(tmp_path / "runs.jsonl")])
