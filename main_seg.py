"""Data-free quantization of a segmentation network, evaluated on VOC segmentation or any folder in its format."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import demo
import dfq
from modeling import build_model
from utils import cli, report, results
from utils.data import batches, evenly
from utils.engine import evaluate
from utils.metrics import ConfusionMatrix
from utils.segmentation import voc_segmentation

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
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="folder for pictures of the first and the worst images"
    )
    parser.set_defaults(batch_size=4)
    return cli.check(parser, parser.parse_args(argv))


def main(argv: Sequence[str] | None) -> None:
    args = cli.with_demo(parse_args(argv), lambda: demo.open(TASK))
    device = cli.prepare(args)

    network = build_model(args.model, args.weights, TASK)
    spec = cli.input_spec(args, network.spec)
    recipe = dfq.Recipe.of(args)
    quantized = dfq.quantize_data_free(network.model, spec, recipe)
    samples, classes = voc_segmentation(args.data, args.split, spec, quantized.outputs)
    samples = evenly(samples, args.limit)
    print(cli.headline(args, network.weights, len(samples), str(recipe)))
    print(quantized.journal.report(args.verbose))

    networks = dfq.to_evaluate(network.model, quantized, recipe)
    metrics = {name: ConfusionMatrix(classes) for name in networks}
    loader = batches(samples, args.batch_size, args.workers, args.seed)
    seconds = evaluate(networks, loader, metrics, device, args.skip_bad_images)

    scores = results.scores(metrics, seconds, recipe.labels)
    results.print_table(scores, metrics)
    entry = results.entry(TASK, args, cli.command(PROGRAM, argv), network, str(recipe), metrics, scores)
    results.record(args.results, entry)
    if args.report:
        drawn = {recipe.labels[name]: model for name, model in networks.items()}
        by_label = {recipe.labels[name]: metric for name, metric in metrics.items()}
        files = report.segmentation_pictures(report.make_folder(args.report), samples, drawn, by_label, spec, device)
        print(f"\n{len(files)} pictures in {args.report}")


if __name__ == "__main__":
    cli.run(main, PROGRAM)
