"""Data-free quantization of a classification network: parse, load, quantize, evaluate, record."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import demo
import dfq
from modeling import build_model
from modeling.classification import build_classifier
from utils.core.networks import scored
from utils.core.predictions import count_classes
from utils.experiment import cli
from utils.experiment.loading import opened
from utils.experiment.runner import Run, run_rows
from utils.tasks.classification import TASK


def parse_args(argv: Sequence[str] | None) -> Namespace:
    return cli.parse(TASK, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.with_demo(TASK, parse_args(argv), demo.open)
    device = cli.prepare(args)

    build = partial(build_model, args.model, args.weights, build_classifier, args.checkpoint_key)
    network, recipes, quantize = opened(args, TASK.name, build, dfq.quantize_data_free)
    spec = cli.input_spec(args, network.spec)
    network = replace(network, model=scored(network.model, spec, TASK.output_dims))
    data = None
    if args.data:
        data = TASK.open_data(args, spec, count_classes(network.model, spec, TASK.class_axis), {})

    run_rows(Run(TASK, argv, args, network, spec, device), data, recipes, quantize)


def run() -> None:
    cli.run(main, TASK.program)


if __name__ == "__main__":
    run()
