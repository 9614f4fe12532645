"""Several processes find what one finds, to the last image."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import main_cls
from demo import render
from utils.core import distributed
from utils.core.errors import UserError
from utils.experiment.records import read_lines

ROOT = Path(__file__).resolve().parents[2]
# torchrun's own launcher, with processes that are forks of this one, so that slow packages are imported once for all. What
# one process does is done here, and forks have the demo's network as it was captured for that.
DRIVER = """
import importlib, json, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from utils.experiment import cli

def work(script, flags):
    cli.run(lambda _: importlib.import_module(script).main(flags), f"{script}.py")

parts = json.loads(sys.argv[1])
if any(count == 1 for count, *_ in parts):
    from networks_captured import captures_shared
    from utils.experiment import runner
    runner.capture = captures_shared(runner.capture)
for count, script, flags in parts:
    module = importlib.import_module(script)
    if count == 1:
        module.main(flags)
        continue
    config = LaunchConfig(1, 1, count, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork", max_restarts=0)
    elastic_launch(config, work)(script, flags)
"""
# Small networks in the place of the demo's own, which several processes would capture at once.
NETWORKS = """
import torch
from torch import nn

def segmenter(*head):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 1), *head]
    return nn.Sequential(*layers).eval()

def classifier():
    return segmenter(nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""
# Images and thread count leave nothing to chance.
FLAGS = ["--quantize", "--equalize", "--correction", "--distill_range", "--range_method", "percentile"]
FLAGS += ["--batch_size", "2", "--workers", "0", "--limit", "7"]
FLAGS += ["--distill_images", "3", "--distill_batch", "1", "--distill_steps", "1"]


def places(folder: Path, name: str) -> list[str]:
    return ["--results", str(folder / f"{name}.jsonl"), "--distill_cache", str(folder / f"distilled {name}")]


def in_forks(folder: Path, *parts: tuple[int, str, list[str]]) -> subprocess.CompletedProcess:
    """The driver, ended. parts: each a number of processes, the module whose main they call, and its flags."""
    (folder / "driver.py").write_text(DRIVER)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", folder))),
    }
    command = [sys.executable, str(folder / "driver.py"), json.dumps(parts)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def found(line: dict) -> dict:
    kept = ("task", "samples", "metrics", "intervals", "change_interval", "per_class", "fidelity", "weights_sha256")
    return {key: line[key] for key in kept}


def test_two_and_three_processes_find_what_one_finds(tmp_path):
    """Each script once in one process, and once in several; shards are cut in one place for all of them."""
    (tmp_path / "small.py").write_text(NETWORKS)
    classifier, segmenter = (
        [*FLAGS, "--model", f"small:{name}", "--data", str(render.rendered(scenes)), "--image_size", "64"]
        for name, scenes in (("classifier", "classification"), ("segmenter", "voc"))
    )
    runs = [(3, "main_cls", classifier), (2, "main_seg", segmenter), (2, "main_det", FLAGS)]
    parts = [(1, script, [*flags, *places(tmp_path, "alone")]) for _, script, flags in runs]
    parts += [(count, script, [*flags, *places(tmp_path, "several")]) for count, script, flags in runs]
    in_forks(tmp_path, *parts).check_returncode()
    alone, several = (read_lines(tmp_path / f"{name}.jsonl") for name in ("alone", "several"))
    assert [line["samples"] for line in alone] == [7] * 3
    assert list(map(found, alone)) == list(map(found, several))
    assert several[1]["command"].startswith("torchrun --nproc-per-node=2 main_seg.py ")


def test_a_lost_process_ends_the_run_with_a_line(tmp_path):
    """The second of two processes is killed while the first waits for it."""
    (tmp_path / "lost.py").write_text(
        "import os, signal\n"
        "from utils.core import distributed\n"
        "def main(_):\n"
        "    if not distributed.is_main_process():\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    distributed.all_gather(1)\n"
    )
    ended = in_forks(tmp_path, (2, "lost", []))
    assert ended.returncode != 0
    assert (
        "lost.py: error: lost another process" in ended.stderr
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
