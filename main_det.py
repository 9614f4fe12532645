"""Data-free quantization of a detection network, evaluated on VOC detection or any folder in its format."""

import argparse
from collections.abc import Sequence
from functools import partial

import demo
import dfq
from modeling import box_coder, build_model
from utils.core.input_spec import InputSpec
from utils.experiment import cli
from utils.experiment import pictures as report
from utils.experiment.runner import Data, Experiment
from utils.graph.capture import capture
from utils.graph.nodes import classes_of
from utils.tasks.boxes import BoxCoder
from utils.tasks.data import evenly
from utils.tasks.detection import stack, voc_detection
from utils.tasks.metrics import MeanAveragePrecision
from utils.tasks.voc import open_voc

PROGRAM, TASK = "main_det.py", "detection"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=PROGRAM, description=__doc__, parents=[cli.shared_flags()])
    parser.add_argument(
        "--model",
        default="ssd_lite_mobilenet_v2",
        metavar="NAME",
        help="ssd_lite_mobilenet_v2 (default), torchvision:ssdlite320_mobilenet_v3_large, torchvision:ssd300_vgg16, "
        "package.module:factory",
    )
    parser.add_argument("--split", help="list in ImageSets/Main (default: test of VOC2007, otherwise val)")
    parser.add_argument(
        "--metric",
        choices=("voc07", "voc12"),
        help="mean average precision by 11 points of recall, or by area (default: as the data's year has it, else voc12)",
    )
    parser.set_defaults(distill_images=32)
    return cli.check(parser, parser.parse_args(argv))


def open_data(args: argparse.Namespace, spec: InputSpec, coder: BoxCoder, classes: int) -> Data:
    split = open_voc(args.data, "Main", args.split)
    samples, labels = voc_detection(split, spec, classes)
    samples = evenly(samples, args.limit)
    rule = args.metric or ("voc07" if split.year == 2007 else "voc12")

    def metric(reference: MeanAveragePrecision | None) -> MeanAveragePrecision:
        return MeanAveragePrecision(labels, coder, rule, reference, keep=args.table)

    draw = partial(report.detection_pictures, samples=samples, coder=coder, labels=labels, spec=spec)
    return Data(samples, metric, draw, {label: name for name, label in labels.items()}, stack)


def main(argv: Sequence[str] | None) -> None:
    args = cli.with_demo(parse_args(argv), lambda: demo.open(TASK))
    device = cli.prepare(args)

    network, recipes, quantize = dfq.prepared(args, TASK, partial(build_model, args.model, args.weights, TASK))
    spec = cli.input_spec(args, network.spec)
    coder = BoxCoder(**network.extras["coder"]) if args.load else box_coder(network.model, spec)
    data = open_data(args, spec, coder, classes_of(capture(network.model, spec))) if args.data else None

    experiment = Experiment(TASK, PROGRAM, argv, args, network, spec, data, device, extras={"coder": vars(coder)})
    experiment.run(recipes, quantize, dfq.to_evaluate)


if __name__ == "__main__":
    cli.run(main, PROGRAM)
