"""Train the demo's networks: python -m demo.training classification|segmentation|detection

And, as python -m demo.training residual, a ResNet-18 to measure on, which is not part of the demo.

An interrupted training resumes where it was. The scenes are rendered from other seeds than those
that the networks are scored on, and the scores steer nothing: the last epoch's weights are kept.
"""

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from demo import weights
from demo.render import cache_folder
from demo.training.data import Examples, training_set
from demo.training.tasks import TRAININGS, Training
from utils.experiment.cli import run


def train(name: str, task: Training, seed: int, device: torch.device, folder: Path) -> nn.Module:
    """The trained network; folder keeps its state after each epoch and its log, one JSON line an epoch."""
    schedule = task.schedule
    examples = training_set(task.scenes, task.short_side, schedule.scenes)
    torch.manual_seed(seed)
    model = task.network().to(device, memory_format=torch.channels_last)
    optimizer = schedule.optimizer_of(model)
    state, log = folder / f"{name}.state.pth", folder / f"{name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    done, identity = 0, f"{schedule} {seed}"
    saved = torch.load(state, map_location=device, weights_only=True) if state.is_file() else {}
    if saved.get("identity") == identity:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["epochs"]
    else:
        log.unlink(missing_ok=True)

    for epoch in range(done, schedule.epochs):
        start = time.perf_counter()
        torch.manual_seed(seed + epoch)  # of the dropout
        total = steps = 0
        for images, targets in _epoch(task, examples, np.random.default_rng((seed, epoch))):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate_at(epoch * (schedule.scenes // schedule.batch) + steps)
            model.train()
            loss = task.loss(model(images.to(device, memory_format=torch.channels_last)), _to(targets, device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, steps = total + float(loss.detach()), steps + 1
        figures = {"loss": total / steps, "rate": schedule.rate_at((epoch + 1) * steps)} | task.score(model)
        figures["seconds"] = time.perf_counter() - start
        line = {"epoch": epoch + 1} | {key: float(f"{value:.4g}") for key, value in figures.items()}
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(saved | {"epochs": epoch + 1, "identity": identity}, state.with_suffix(".new"))
        state.with_suffix(".new").replace(state)
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    return model.eval()


def _epoch(task: Training, examples: Examples, rng: np.random.Generator) -> Iterator[tuple[Tensor, object]]:
    order = rng.permutation(task.schedule.scenes)
    size = task.schedule.batch
    for i in range(len(order) // size):
        yield task.batch(examples, np.sort(order[i * size : (i + 1) * size]), rng)


def _to(targets: object, device: torch.device) -> object:
    return targets.to(device) if isinstance(targets, Tensor) else tuple(_to(target, device) for target in targets)


def store(task: str, model: nn.Module, log: Path) -> None:
    """Keep a trained network in half precision, its log, and the hashes of all."""
    tensors = {
        name: tensor.cpu().half() if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in model.state_dict().items()
    }
    torch.save(tensors, weights.FOLDER / f"{task}.pth")
    shutil.copyfile(log, weights.FOLDER / f"{task}.jsonl")
    files = sorted(weights.FOLDER.glob("*.pth"))
    weights.HASHES.write_text(
        "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.training", description="Train one of the demo's networks.")
    parser.add_argument("task", choices=sorted(TRAININGS))
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and crops (default: 0)")
    args = parser.parse_args(arguments)
    folder = cache_folder() / "demo" / "training"
    task = TRAININGS[args.task]
    model = train(args.task, task, args.seed, torch.device(args.device), folder)
    if task.shipped:
        store(args.task, model, folder / f"{args.task}.jsonl")
    else:
        torch.save(model.state_dict(), file := folder / f"{args.task}.pth")
        print(f"kept in {file}")


if __name__ == "__main__":
    run(main, "demo.training")
