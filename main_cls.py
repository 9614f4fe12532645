"""Data-free quantization of a classification network, evaluated on ImageNet or any folder of images."""

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
from utils.tasks.data import evenly, image_folder
from utils.tasks.metrics import TopK

PROGRAM, TASK = "main_cls.py", "classification"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=PROGRAM, description=__doc__, parents=[cli.shared_flags()])
    parser.add_argument(
        "--model",
        default="mobilenet_v2",
        metavar="NAME",
        help="mobilenet_v2 (default), resnet18, efficientnet_lite0, torchvision:NAME, timm:NAME, package.module:factory",
    )
    parser.add_argument(
        "--split", default="val", help="sub-folder of --data with the class folders, where there is one (default: val)"
    )
    parser.add_argument(
        "--resize",
        type=cli.at_least(1),
        metavar="PIXELS",
        help="short side before the centre crop (default: as --image_size, or the network's)",
    )
    return cli.check(parser, parser.parse_args(argv))


def open_data(args: argparse.Namespace, spec: InputSpec, classes: int) -> Data:
    samples, names = image_folder(args.data, args.split, spec, classes)
    samples = evenly(samples, args.limit)
    draw = partial(report.classification_pictures, samples=samples, names=names, spec=spec)
    return Data(samples, lambda _: TopK(), draw, names)


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
