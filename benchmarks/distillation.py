"""What distilled images are worth, by their number, their steps and each choice in making them.

python -m benchmarks.distillation --help; recorded in results/distillation.txt and results/distillation.png.
Measured against the evaluation's own images, which the method itself never sees: how far ranges are from
theirs, how far the quantized network's output on them is from the float one's, and accuracy.
"""

import argparse
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, fx

from dfq import Recipe, quantize_data_free
from modeling import build_model
from utils.calibration.distillation import Distillation, distill, statistics_fit
from utils.calibration.fidelity import fidelity
from utils.calibration.observers import histograms
from utils.core.predictions import count_classes
from utils.experiment import cli
from utils.experiment import evaluation as engine
from utils.graph.capture import capture
from utils.tasks.data import Batches, evenly, image_folder
from utils.tasks.metrics import TopK

CPU = torch.device("cpu")
IMAGES, STEPS = (1, 4, 16, 64), (5, 20, 40)
RECIPE = Recipe(quantize=True, equalize=True, correction=True, distill_range=True)
RECIPES = {"+LE+BC +DR": RECIPE, "+LE+DBC +DR": replace(RECIPE, distill_correction=True)}
DEFAULT = Distillation(images=16)
CHOICES = {
    "as it is": DEFAULT,
    "white noise at first": replace(DEFAULT, start="white"),
    "plain squared error": replace(DEFAULT, robust=False),
    "shifts and mirroring": replace(DEFAULT, jitter=True),
    "batches of 4": replace(DEFAULT, batch=4),
}


def range_error(network: fx.GraphModule, images: Tensor, real: Mapping) -> float:
    """Mean over tensors of |log2| of the ratio between the width of their ranges on images and on real ones."""
    seen = histograms(network, images)
    ratios = [
        (seen[name].high - seen[name].low) / (real[name].high - real[name].low)
        for name in real
        if real[name].high > real[name].low
    ]
    return sum(abs(math.log2(max(ratio, 1e-6))) for ratio in ratios) / len(ratios)


def measure(args: argparse.Namespace, settings: Mapping[str, Distillation]) -> dict[str, dict[str, float]]:
    """Figures of each setting by name."""
    network = build_model(args.model, args.weights)
    spec = cli.changed_spec(network.spec, args.image_size)
    samples, _ = image_folder(args.data, "val", spec, count_classes(network.model, spec, axis=1))
    samples = evenly(samples, args.limit)
    real = torch.stack([samples[i][0] for i in range(0, len(samples), max(1, len(samples) // 64))])
    seen = histograms(capture(network.model, spec), real)

    networks, figures = {}, {name: {} for name in settings}
    for name, setting in settings.items():
        start = time.perf_counter()
        images = distill(network.model, spec, setting, CPU)
        fit = statistics_fit(network.model, spec, images)
        figures[name] |= {
            "seconds": time.perf_counter() - start,
            "fit": sum(layer.total for layer in fit.values()) / len(fit),
            "range error": range_error(capture(network.model, spec), images, seen),
        }
        for row, recipe in RECIPES.items():
            quantized = quantize_data_free(network.model, spec, recipe, images)
            figures[name][f"{row} dB"] = fidelity(quantized.float, quantized.simulated, real).output
            networks[name, row] = engine.networks_of(network.model, quantized, recipe)["quantized"]
    networks = {"": network.model} | networks
    metrics = {name: TopK() for name in networks}
    engine.evaluate(networks, Batches(samples, args.batch_size, 1, 0), metrics, CPU)
    for (name, row), metric in list(metrics.items())[1:]:
        figures[name][f"{row} top1"] = metric.compute()["top1"]
    print(f"{args.model}, {args.weights}; {len(samples)} images; FP32 {metrics[''].compute()['top1']:.2f}")
    return figures


def print_figures(title: str, figures: Mapping[str, Mapping[str, float]]) -> None:
    columns = list(next(iter(figures.values())))
    print(f"\n{title:<26}" + "".join(f"{column:>18}" for column in columns))
    for name, values in figures.items():
        print(f"{name:<26}" + "".join(f"{values[column]:>18.2f}" for column in columns))


def draw(file: Path, figures: Mapping[str, Mapping[str, float]]) -> None:
    """Output SQNR on real images and time, against steps, a line for each number of images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    quantities = {
        "+LE+DBC +DR dB": "output over its quantization noise, dB",
        "+LE+DBC +DR top1": "top-1, %",
        "seconds": "seconds",
    }
    figure, axes = pyplot.subplots(1, len(quantities), figsize=(11, 3.4), layout="constrained")
    for axis, (column, label) in zip(axes, quantities.items(), strict=True):
        for images in IMAGES:
            values = [figures[f"{images} images, {steps} steps"][column] for steps in STEPS]
            axis.plot(STEPS, values, marker="o", label=f"{images} image{'s' if images > 1 else ''}")
        axis.set(xlabel="steps", ylabel=label, xscale="log", xticks=STEPS, xticklabels=STEPS)
        axis.minorticks_off()
    axes[0].legend()
    figure.savefig(file, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--weights")
    parser.add_argument("--data", required=True)
    parser.add_argument("--image_size", type=int, nargs="+")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--plot", type=Path, help="PNG to draw the curves in")
    args = parser.parse_args(arguments)
    engine.tune_allocator()
    curve = {f"{n} images, {steps} steps": Distillation(images=n, steps=steps) for n in IMAGES for steps in STEPS}
    figures = measure(args, curve)
    print_figures("number and steps", figures)
    print_figures("16 images, 40 steps", measure(args, CHOICES))
    if args.plot:
        draw(args.plot, figures)


if __name__ == "__main__":
    cli.run(main, "benchmarks.distillation")
