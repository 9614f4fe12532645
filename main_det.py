"""Data-free quantization of a detection network: parse, load, quantize, evaluate, record."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import demo
import dfq
from modeling import build_model
from modeling.detection import box_coder, build_detector
from utils.experiment import cli
from utils.experiment.loading import opened
from utils.experiment.runner import Run, run_rows
from utils.tasks.detection import TASK, coder_as_data, coder_from, count_classes
from utils.tasks.heads import with_heads


def parse_args(argv: Sequence[str] | None) -> Namespace:
    return cli.parse(TASK, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.with_demo(TASK, parse_args(argv), demo.open)
    device = cli.prepare(args)

    build = partial(build_model, args.model, args.weights, build_detector, args.checkpoint_key)
    network, recipes, quantize = opened(args, TASK.name, build, dfq.quantize_data_free)
    spec = cli.input_spec(args, network.spec)
    coder = coder_from(network.extras["coder"]) if args.load else box_coder(network.model, spec)
    network = replace(network, model=with_heads(network.model, spec, coder))
    task, extras = replace(TASK, predictions=coder.predictions), {"coder": coder_as_data(coder)}
    classes, data = count_classes(network.model, spec, coder), None
    if args.data:
        data = task.open_data(args, spec, classes, extras)

    run_rows(Run(task, argv, args, network, spec, device, extras), data, recipes, quantize)


def run() -> None:
    cli.run(main, TASK.program)


if __name__ == "__main__":
    run()
