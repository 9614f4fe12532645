"""Evaluating: many networks over one reading of the data, each float network once, and how often two agree."""

import ctypes
import platform
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.backends.lowering import lower_to_integers
from utils.core import distributed
from utils.core.errors import UserError
from utils.core.networks import to_fast_format
from utils.core.predictions import Predictions, either_finds
from utils.passes.result import Quantized
from utils.quantization.recipe import Recipe
from utils.tasks.base import Data
from utils.tasks.data import BadSample, Batch, Batches
from utils.tasks.metrics import Metric

ROOM = 2 * 2**30  # bytes of decoded images that the rows of a table share


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
    return _InFastFormat(to_fast_format(model.eval(), device))


class _InFastFormat(nn.Module):
    """A network on images in channels_last; or in the order that its own code wants, where x.view() does not work else."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.fast = network, True

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.fast:
            try:
                return self.network(images)
            except RuntimeError as error:
                if "view size is not compatible" not in str(error):
                    raise
            self.network.to(memory_format=torch.contiguous_format)
            self.fast = False
        return self.network(images.contiguous())


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
    progress = tqdm(
        loader,
        desc=f"evaluating {len(networks)} network(s)",
        unit="batch",
        file=sys.stderr,
        disable=not distributed.is_main_process(),
    )
    with torch.inference_mode(), progress:
        batch: Batch
        for batch in progress:
            if batch.bad and not skip_bad_images:
                raise UserError(f"cannot read image {batch.bad[0]}; repair it, or pass --skip_bad_images")
            skipped += len(batch.bad)
            for reason in batch.bad:
                tqdm.write(f"skipped {reason}", file=sys.stderr)
            if len(batch.images):
                _feed(networks, batch, metrics, device, seconds)
    for metric in metrics.values():
        metric.records = distributed.all_gather_lists(metric.records)
    skipped = sum(distributed.all_gather(skipped))
    if skipped and distributed.is_main_process():
        print(f"skipped {skipped} unreadable image(s)", file=sys.stderr)
    if not next(iter(metrics.values())).records:
        raise UserError("no image could be read, so there is nothing to score")
    everyone = distributed.all_gather(seconds)
    return {name: max(own[name] for own in everyone) for name in seconds}


def _feed(
    networks: Mapping[str, nn.Module],
    batch: Batch,
    metrics: Mapping[str, Metric],
    device: torch.device,
    seconds: dict[str, float],
) -> None:
    """Run every network on one batch; adds to its metric and its seconds."""
    images = batch.images.to(device, memory_format=torch.channels_last)
    for name, model in networks.items():
        start = time.perf_counter()
        outputs = model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[name] += time.perf_counter() - start
        metrics[name].update(outputs, batch.targets)


def networks_of(loaded: nn.Module, quantized: Quantized, recipe: Recipe) -> dict[str, nn.Module]:
    """The networks of a row, the loaded one first, by the names of Recipe.labels; in the form that runs fastest."""
    networks = {"fp32_original": loaded}
    if recipe.changes_float or quantized.simulated is None:
        networks["fp32"] = quantized.float
    if quantized.simulated is not None:
        networks["quantized"] = lower_to_integers(quantized.simulated)
    return networks


class Evaluator:
    """Scores the networks of one row after the other on the same images, every float network once.

    args: --batch_size, --workers, --seed, --table, --skip_bad_images. What it keeps of a network is found again by a
    key, which says all that decides what the network computes.
    """

    def __init__(self, data: Data, args: Namespace, device: torch.device):
        count, processes = len(data.samples), distributed.world_size()
        if processes > count:
            raise UserError(f"{processes} processes for {count} images; start at most {count}")
        room = ROOM if args.table else 0
        self.data, self.device, self.skip_bad_images = data, device, args.skip_bad_images
        self.batches = Batches(data.samples, args.batch_size, args.workers, args.seed, data.collate, room)
        self.known: dict[str, tuple[Metric, float]] = {}

    def score(
        self, networks: Mapping[str, nn.Module], keys: Mapping[str, str]
    ) -> tuple[dict[str, Metric], dict[str, float]]:
        """Metrics and seconds of the networks by name, the one as loaded first. keys: of those that rows share."""
        known = {name: self.known[key] for name, key in keys.items() if key in self.known}
        metrics = {name: metric for name, (metric, _) in known.items()}
        seconds = {name: spent for name, (_, spent) in known.items()}
        original = next(iter(networks))
        fresh: dict[str, Metric] = {}
        for name in networks:
            if name not in metrics:
                metrics[name] = fresh[name] = self.data.metric(metrics.get(original))
        run = {name: networks[name] for name in fresh}
        if run:
            seconds |= evaluate(run, self.batches, fresh, self.device, self.skip_bad_images)
        self.known |= {key: (metrics[name], seconds[name]) for name, key in keys.items()}
        return {name: metrics[name] for name in networks}, {name: seconds[name] for name in networks}

    def probes(self, count: int = 8) -> Tensor:
        """A few images [N, C, H, W] of the evaluation."""
        samples = (self.data.samples[i] for i in range(len(self.data.samples)))
        good = list(islice((sample for sample in samples if not isinstance(sample, BadSample)), count))
        return self.data.collate(good)[0]


def agreement(first: nn.Module, second: nn.Module, images: Tensor, predictions: Predictions, batch: int = 16) -> float:
    """Percent of predictions on the images [N, C, H, W] that are the same for two networks, where either finds something."""
    with torch.inference_mode():
        pairs = [(predictions(first(some)), predictions(second(some))) for some in images.split(batch)]
    before, after = (torch.cat(some) for some in zip(*pairs, strict=True))
    return 100 * float((before == after)[either_finds(before, after)].double().mean())
