"""Data-free quantization of a segmentation network, evaluated on VOC segmentation or any folder in its format."""

import argparse
from collections.abc import Sequence
from functools import partial

import demo
import dfq
from modeling import build_model
from utils.core.input_spec import InputSpec
from utils.experiment import cli
from utils.experiment import pictures as report
from utils.experiment.runner import Data, Experiment
from utils.graph.capture import capture
from utils.graph.nodes import classes_of
from utils.tasks.data import evenly
from utils.tasks.metrics import ConfusionMatrix
from utils.tasks.segmentation import voc_segmentation

PROGRAM, TASK = "main_seg.py", "segmentation"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=PROGRAM, description=__doc__, parents=[cli.shared_flags()])
    parser.add_argument(
        "--model",
        default="deeplabv3plus_mobilenet_v2",
        metavar="NAME",
        help="deeplabv3plus_mobilenet_v2 (default), torchvision:NAME, package.module:factory",
    )
    parser.add_argument("--split", help="list in ImageSets/Segmentation (default: test of VOC2007, otherwise val)")
    parser.set_defaults(batch_size=4, distill_images=8, distill_batch=8)
    return cli.check(parser, parser.parse_args(argv))


def open_data(args: argparse.Namespace, spec: InputSpec, classes: int) -> Data:
    samples, names = voc_segmentation(args.data, args.split, spec, classes)
    samples = evenly(samples, args.limit)
    draw = partial(report.segmentation_pictures, samples=samples, spec=spec)
    return Data(samples, lambda _: ConfusionMatrix(names), draw, dict(enumerate(names)))


def main(argv: Sequence[str] | None) -> None:
    args = cli.with_demo(parse_args(argv), lambda: demo.open(TASK))
    device = cli.prepare(args)

    network, recipes, quantize = dfq.prepared(args, TASK, partial(build_model, args.model, args.weights, TASK))
    spec = cli.input_spec(args, network.spec)
    data = open_data(args, spec, classes_of(capture(network.model, spec))) if args.data else None

    experiment = Experiment(TASK, PROGRAM, argv, args, network, spec, data, device)
    experiment.run(recipes, quantize, dfq.to_evaluate)


if __name__ == "__main__":
    cli.run(main, PROGRAM)
