"""Several processes find what one finds, to the last image."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main_cls
import main_det
import main_seg
from utils.core import distributed
from utils.core.errors import UserError
from utils.experiment.records import read_lines

ROOT = Path(__file__).resolve().parents[2]
# torchrun's own launcher, with processes that are forks of this one, so that slow packages are imported once for all.
DRIVER = """
import json, sys
import main_cls, main_det, main_seg
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from utils.core.distributed import process_group

def work(names, flags):
    with process_group():
        for name in names:
            {"cls": main_cls, "seg": main_seg, "det": main_det}[name].main(flags)

for count, names, flags in json.loads(sys.argv[1]):
    config = LaunchConfig(1, 1, count, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork", max_restarts=0)
    elastic_launch(config, work)(names, flags)
"""
# Images and thread count leave nothing to chance.
FLAGS = ["--quantize", "--equalize", "--correction", "--distill_range", "--range_method", "percentile"]
FLAGS += ["--batch_size", "2", "--workers", "0", "--limit", "7"]
FLAGS += ["--distill_images", "3", "--distill_batch", "1", "--distill_steps", "1"]


def places(folder: Path, name: str) -> list[str]:
    return ["--results", str(folder / f"{name}.jsonl"), "--distill_cache", str(folder / f"distilled {name}")]


def run(folder: Path, *parts: tuple[int, list[str]]) -> dict[str, dict]:
    """The lines of the scripts' runs on the demo, by task. parts: each a number of processes, and what they run."""
    (folder / "driver.py").write_text(DRIVER)
    wanted = [(processes, names, [*FLAGS, *places(folder, str(processes))]) for processes, names in parts]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(folder / "driver.py"), json.dumps(wanted)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600)
    return {line["task"]: line for count, _ in parts for line in read_lines(folder / f"{count}.jsonl")}


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def found(line: dict) -> dict:
    kept = ("task", "samples", "metrics", "intervals", "change_interval", "per_class", "fidelity", "weights_sha256")
    return {key: line[key] for key in kept}


def test_two_and_three_processes_find_what_one_finds(tmp_path, one_thread):
    """Each script once in one process, and once in several; shards are cut in one place for all of them."""
    for script in (main_cls, main_seg, main_det):
        script.main([*FLAGS, *places(tmp_path, "1")])
    alone = read_lines(tmp_path / "1.jsonl")
    several = run(tmp_path, (3, ["cls"]), (2, ["seg", "det"]))
    assert [(line["task"], line["samples"]) for line in alone] == [(task, 7) for task in several]
    assert list(map(found, alone)) == list(map(found, several.values()))
    assert several["segmentation"]["command"].startswith("torchrun --nproc-per-node=2 main_seg.py ")


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
