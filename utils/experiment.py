"""A row of a table: one recipe's networks on the same images, printed, recorded and drawn."""

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from utils import cli, results
from utils.data import batches
from utils.engine import Metric, evaluate
from utils.journal import Journal


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


@dataclass(frozen=True)
class Experiment:
    """What the rows of a run have in common. command: the command line, to be typed again."""

    task: str
    args: argparse.Namespace
    command: str
    network: results.Loaded
    data: Data
    device: torch.device

    def row(self, recipe: Recipe, networks: Mapping[str, nn.Module], journal: Journal) -> None:
        """Evaluate a recipe's networks, print their scores, record the line and draw what was asked for.

        networks: by the names of recipe.labels, the one as loaded first.
        """
        args, data = self.args, self.data
        print(cli.headline(args, self.network.weights, len(data.samples), str(recipe)))
        print(journal.report(args.verbose))

        metrics = data.metrics(networks)
        loader = batches(data.samples, args.batch_size, args.workers, args.seed, data.collate)
        seconds = evaluate(networks, loader, metrics, self.device, args.skip_bad_images)

        scores = results.scores(metrics, seconds, recipe.labels)
        results.print_table(scores, metrics)
        line = results.entry(self.task, args, self.command, self.network, str(recipe), metrics, scores)
        results.record(args.results, line)
        if args.report:
            captioned = {recipe.labels[name]: model for name, model in networks.items()}
            by_caption = {recipe.labels[name]: metric for name, metric in metrics.items()}
            files = data.draw(args.report, captioned, by_caption, self.device)
            print(f"\n{len(files)} files in {args.report}")
