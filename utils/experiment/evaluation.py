"""The evaluation loop: many networks over one reading of the data."""

import ctypes
import platform
import sys
import time
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.core import distributed
from utils.core.errors import UserError
from utils.tasks.data import Batch
from utils.tasks.metrics import Metric


def tune_allocator() -> None:
    """Let glibc reuse the memory of large activations instead of returning it after each layer.

    Every layer of a CNN allocates megabytes; by default glibc maps and unmaps each, and the page
    faults cost more than the arithmetic of a MobileNet. Call once, at start-up; elsewhere a no-op.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold, largest = -1, -3, 2**31 - 1  # M_* of malloc.h
    libc.mallopt(mmap_threshold, largest)
    libc.mallopt(trim_threshold, largest)


def deploy(model: nn.Module, device: torch.device) -> nn.Module:
    """The network on its device, in the memory format that convolutions are fastest in."""
    return model.eval().to(device=device, memory_format=torch.channels_last)


def evaluate(
    networks: Mapping[str, nn.Module],
    loader: Iterable[Batch],
    metrics: Mapping[str, Metric],
    device: torch.device,
    skip_bad_images: bool = False,
) -> dict[str, float]:
    """Feed every batch to every network and its metric; returns each network's seconds.

    Each image is read once, and all networks see the same ones. An unreadable image is an error
    unless skip_bad_images, which counts it and goes on. With several processes the loader gives each its
    share; the metrics are whole in all of them, and the seconds are the slowest one's.
    """
    networks = {name: deploy(model, device) for name, model in networks.items()}
    seconds = dict.fromkeys(networks, 0.0)
    skipped = 0
    with (
        torch.inference_mode(),
        tqdm(
            loader,
            desc=f"evaluating {len(networks)} network(s)",
            unit="batch",
            file=sys.stderr,
            disable=not distributed.is_first(),
        ) as progress,
    ):
        batch: Batch
        for batch in progress:
            if batch.bad and not skip_bad_images:
                raise UserError(f"cannot read image {batch.bad[0]}; mend it, or pass --skip_bad_images")
            skipped += len(batch.bad)
            for reason in batch.bad:
                tqdm.write(f"skipped {reason}", file=sys.stderr)
            if not len(batch.images):
                continue
            images = batch.images.to(device, memory_format=torch.channels_last)
            for name, model in networks.items():
                start = time.perf_counter()
                outputs: Tensor = model(images)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds[name] += time.perf_counter() - start
                metrics[name].update(outputs, batch.targets)
    for metric in metrics.values():
        metric.records = distributed.concatenated(metric.records)
    skipped = sum(distributed.gather(skipped))
    if skipped and distributed.is_first():
        print(f"skipped {skipped} unreadable image(s)", file=sys.stderr)
    if not next(iter(metrics.values())).records:
        raise UserError("no image could be read, so there is nothing to score")
    everyone = distributed.gather(seconds)
    return {name: max(own[name] for own in everyone) for name in seconds}
