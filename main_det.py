"""Data-free quantization of a detection network, evaluated on VOC detection or any folder in its format."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import demo
import dfq
from modeling import box_coder, build_model
from utils import cli, report, results
from utils.data import batches, evenly
from utils.detection import stack, voc_detection
from utils.engine import evaluate
from utils.metrics import MeanAveragePrecision
from utils.voc import open_voc

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
    parser.add_argument("--report", type=Path, metavar="DIR", help="folder for pictures, and precision and recall")
    return cli.check(parser, parser.parse_args(argv))


def main(argv: Sequence[str] | None) -> None:
    args = cli.with_demo(parse_args(argv), lambda: demo.open(TASK))
    device = cli.prepare(args)

    network = build_model(args.model, args.weights, TASK)
    spec = cli.input_spec(args, network.spec)
    recipe = dfq.Recipe.of(args)
    quantized = dfq.quantize_data_free(network.model, spec, recipe)
    split = open_voc(args.data, "Main", args.split)
    samples, labels = voc_detection(split, spec, quantized.outputs)
    samples = evenly(samples, args.limit)
    print(cli.headline(args, network.weights, len(samples), str(recipe)))
    print(quantized.journal.report(args.verbose))

    networks = dfq.to_evaluate(network.model, quantized, recipe)
    coder, rule = box_coder(network.model, spec), args.metric or ("voc07" if split.year == 2007 else "voc12")
    original = MeanAveragePrecision(labels, coder, rule)
    metrics = {name: MeanAveragePrecision(labels, coder, rule, reference=original) for name in networks}
    metrics["fp32_original"] = original
    loader = batches(samples, args.batch_size, args.workers, args.seed, stack)
    seconds = evaluate(networks, loader, metrics, device, args.skip_bad_images)

    scores = results.scores(metrics, seconds, recipe.labels)
    results.print_table(scores, metrics)
    for score in scores[1:]:
        moved = ", ".join(f"{name} {value:.3f}" for name, value in metrics[score.network].shifts().items())
        print(f"\n{score.label} against FP32, over all priors, in percent: {moved}")
    entry = results.entry(TASK, args, cli.command(PROGRAM, argv), network, str(recipe), metrics, scores)
    results.record(args.results, entry)
    if args.report:
        folder = report.make_folder(args.report)
        drawn = {recipe.labels[name]: model for name, model in networks.items()}
        files = report.detection_pictures(folder, samples, drawn, coder, labels, spec, device)
        report.write_curves(
            folder / "precision_recall.csv", {recipe.labels[name]: metric for name, metric in metrics.items()}
        )
        print(f"\n{len(files)} pictures, precision and recall in {folder}")


if __name__ == "__main__":
    cli.run(main, PROGRAM)
