"""A row of a table: one recipe's networks on the same images, printed, recorded and drawn."""

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from utils import cli, results
from utils.data import batches
from utils.distill import statistics_fit
from utils.engine import Metric, evaluate
from utils.inputs import InputSpec
from utils.journal import Journal
from utils.observe import Fidelity
from utils.report import distilled_pictures


@dataclass(frozen=True)
class Data:
    """What a task's networks are evaluated on.

    samples: images and their targets. metrics: names of networks -> an accumulator for each.
    draw: folder, networks and their metrics by caption, device -> the files it wrote to show what they say.
    collate: a list of samples -> (images, targets).
    """

    samples: Dataset
    metrics: Callable[[Iterable[str]], dict[str, Metric]]
    draw: Callable[[Path, Mapping[str, nn.Module], Mapping[str, Metric], torch.device], list[Path]]
    collate: Callable = default_collate


class Recipe(Protocol):
    """The passes of a row; str() is the row's name."""

    labels: Mapping[str, str]


class Quantized(Protocol):
    """What the passes made."""

    journal: Journal
    fidelity: Fidelity | None


@dataclass(frozen=True)
class Experiment:
    """What the rows of a run have in common. command: the command line, to be typed again."""

    task: str
    args: argparse.Namespace
    command: str
    network: results.Loaded
    spec: InputSpec
    data: Data
    device: torch.device

    def row(
        self, recipe: Recipe, quantized: Quantized, networks: Mapping[str, nn.Module], distilled: Tensor | None
    ) -> None:
        """Evaluate a recipe's networks, print their scores, record the line and draw what was asked for.

        networks: by the names of recipe.labels, the one as loaded first. distilled: the images behind the fidelity.
        """
        args, data = self.args, self.data
        print(cli.headline(args, self.network.weights, len(data.samples), str(recipe)))
        print(quantized.journal.report(args.verbose))
        if quantized.fidelity:
            print(quantized.fidelity.report(len(distilled), args.verbose))

        metrics = data.metrics(networks)
        loader = batches(data.samples, args.batch_size, args.workers, args.seed, data.collate)
        seconds = evaluate(networks, loader, metrics, self.device, args.skip_bad_images)

        scores = results.scores(metrics, seconds, recipe.labels)
        results.print_table(scores, metrics)
        line = results.entry(self.task, args, self.command, self.network, str(recipe), metrics, scores)
        if quantized.fidelity:
            line["fidelity"] = {"images": len(distilled)} | asdict(quantized.fidelity)
        results.record(args.results, line)
        if args.report:
            captioned = {recipe.labels[name]: model for name, model in networks.items()}
            by_caption = {recipe.labels[name]: metric for name, metric in metrics.items()}
            files = data.draw(args.report, captioned, by_caption, self.device)
            if distilled is not None:
                fit = statistics_fit(self.network.model, self.spec, distilled)
                files += distilled_pictures(args.report, distilled, fit, self.spec)
            print(f"\n{len(files)} files in {args.report}")
