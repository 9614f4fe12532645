"""Data-free quantization of a classification network, evaluated on ImageNet or any folder of images."""

import argparse
from collections.abc import Sequence

import torch

import dfq
from modeling import build_model
from utils import cli, results
from utils.data import batches, evenly, image_folder
from utils.engine import evaluate, tune_allocator
from utils.errors import UserError
from utils.metrics import TopK

PROGRAM = "main_cls.py"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=PROGRAM, description=__doc__, parents=[cli.shared_flags()])
    parser.add_argument(
        "--model",
        default="mobilenet_v2",
        help="mobilenet_v2 (default), resnet18, efficientnet_lite0, torchvision:NAME, timm:NAME or package.module:factory",
    )
    parser.add_argument(
        "--split",
        default="val",
        help="sub-folder of --data that holds the class folders, if there is one (default: val)",
    )
    parser.add_argument(
        "--resize",
        type=int,
        metavar="PIXELS",
        help="short side before the centre crop (default: --image_size, or the network's)",
    )
    return cli.check(parser, parser.parse_args(argv))


def main(argv: Sequence[str] | None) -> None:
    args = parse_args(argv)
    device = cli.open_device(args.device)
    results.check_writable(args.results)
    if args.data is None:
        raise UserError("no data to evaluate on; pass --data with ImageNet's folder or one folder of images per class")
    torch.manual_seed(args.seed)
    tune_allocator()

    network = build_model(args.model, args.weights)
    spec = cli.input_spec(args, network.spec)
    recipe = dfq.Recipe.of(args)
    quantized = dfq.quantize_data_free(network.model, spec, recipe)
    samples = evenly(image_folder(args.data, args.split, spec, quantized.outputs), args.limit)
    print(f"{network.name}, weights {network.weights}; {len(samples):,} images of {args.data}; {recipe}")
    print(quantized.journal.report(args.verbose))

    networks = {"fp32_original": network.model, **dfq.to_evaluate(quantized, recipe)}
    metrics = {name: TopK() for name in networks}
    seconds = evaluate(
        networks, batches(samples, args.batch_size, args.workers, args.seed), metrics, device, args.skip_bad_images
    )

    scores = results.scores(metrics, seconds, recipe.labels)
    counted = metrics["fp32_original"].samples
    results.print_table(scores, counted)
    results.record(
        args.results,
        results.entry(
            "classification",
            args,
            cli.command(PROGRAM, argv),
            network.weights,
            network.model,
            str(recipe),
            counted,
            scores,
        ),
    )


if __name__ == "__main__":
    cli.run(main, PROGRAM)
