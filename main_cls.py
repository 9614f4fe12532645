"""Data-free quantization of a classification network, evaluated on ImageNet or any folder of images."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import demo
import dfq
from modeling import build_model
from utils import cli, report, results
from utils.data import batches, evenly, image_folder
from utils.engine import evaluate
from utils.metrics import TopK

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
    parser.add_argument("--report", type=Path, metavar="DIR", help="folder for pictures of images and answers")
    return cli.check(parser, parser.parse_args(argv))


def main(argv: Sequence[str] | None) -> None:
    args = cli.with_demo(parse_args(argv), lambda: demo.open(TASK))
    device = cli.prepare(args)

    network = build_model(args.model, args.weights, TASK)
    spec = cli.input_spec(args, network.spec)
    recipe = dfq.Recipe.of(args)
    quantized = dfq.quantize_data_free(network.model, spec, recipe)
    samples, names = image_folder(args.data, args.split, spec, quantized.outputs)
    samples = evenly(samples, args.limit)
    print(cli.headline(args, network.weights, len(samples), str(recipe)))
    print(quantized.journal.report(args.verbose))

    networks = dfq.to_evaluate(network.model, quantized, recipe)
    metrics = {name: TopK() for name in networks}
    loader = batches(samples, args.batch_size, args.workers, args.seed)
    seconds = evaluate(networks, loader, metrics, device, args.skip_bad_images)

    scores = results.scores(metrics, seconds, recipe.labels)
    results.print_table(scores, metrics)
    entry = results.entry(TASK, args, cli.command(PROGRAM, argv), network, str(recipe), metrics, scores)
    results.record(args.results, entry)
    if args.report:
        by_label = {recipe.labels[name]: metric for name, metric in metrics.items()}
        folder = report.make_folder(args.report)
        files = report.classification_pictures(folder, samples, by_label, names, spec)
        print(f"\n{len(files)} pictures in {folder}")


if __name__ == "__main__":
    cli.run(main, PROGRAM)
