"""How long the passes take, and what simulating INT8 costs over running in float.

    python -m benchmarks.simulation [--task TASK --model NAME --weights FILE] [--side 224] [--rounds 9]

Ratios are medians over rounds in which every variant ran once, one after the other. "Plain" is the
network as loaded under torch's own defaults (no channels_last, the system's allocator settings), in a
process of its own; the others run as the evaluation loop runs them.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from dfq import Recipe, quantize_data_free
from modeling import build_model
from modeling.classification import build_classifier
from modeling.detection import build_detector
from modeling.mobilenet_v2 import mobilenet_v2
from modeling.segmentation import build_segmenter
from utils.backends.lowering import lower_to_integers
from utils.core.input_spec import InputSpec
from utils.experiment.evaluation import deploy, tune_allocator

RECIPES = {"+ReLU+LE+BC": Recipe(relu=True, equalize=True, quantize=True, correction=True)}
BUILDERS = {"classification": build_classifier, "segmentation": build_segmenter, "detection": build_detector}
RECIPES |= {"+LE+BC": Recipe(equalize=True, quantize=True, correction=True)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="classification", choices=BUILDERS, help="(default: classification)")
    parser.add_argument("--model", default="mobilenet_v2", help="as for the task's script")
    parser.add_argument("--weights", help="checkpoint (default: random weights for mobilenet_v2, which are as fast)")
    parser.add_argument("--side", type=int, default=224, help="side of the input in pixels")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)  # the process of its own
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    model, spec = load(args), InputSpec(size=(args.side, args.side))
    images = spec.probe(args.batch_size)
    if args.plain:
        answer_rounds(model, images)
        return
    tune_allocator()
    results = {name: quantize_data_free(model, spec, recipe) for name, recipe in RECIPES.items()}
    print(f"passes: {seconds_of_passes(model, spec, args.rounds):.2f} s (median)")

    cpu = torch.device("cpu")
    folded = deploy(next(iter(results.values())).float, cpu)
    simulated = {name: deploy(lower_to_integers(result.simulated), cpu) for name, result in results.items()}
    floats = {f"float {name}": deploy(result.float, cpu) for name, result in results.items()}
    fast_images = images.to(memory_format=torch.channels_last)
    runs = {name: lambda net=net: net(fast_images) for name, net in (floats | simulated).items()}
    times = {name: [] for name in ("plain", *runs)}
    command = [sys.executable, "-m", "benchmarks.simulation", *sys.argv[1:], "--plain"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as plain,
        torch.inference_mode(),
    ):
        folded(fast_images)
        for _ in range(args.rounds + 1):
            plain.stdin.write("go\n")
            plain.stdin.flush()
            times["plain"].append(float(plain.stdout.readline()))
            for name, run in runs.items():
                times[name].append(timed(run))
        plain.stdin.close()
    for name in RECIPES:
        print(
            f"{name}: simulated / folded float {ratio(times[name], times[f'float {name}']):.2f}, plain float / simulated {ratio(times['plain'], times[name]):.2f}"
        )
    print(
        "seconds per batch (median): "
        + ", ".join(f"{name} {statistics.median(values[1:]):.3f}" for name, values in times.items())
    )


def load(args: argparse.Namespace) -> nn.Module:
    if args.weights is None and args.model == "mobilenet_v2":
        torch.manual_seed(0)
        return mobilenet_v2().eval()
    return build_model(args.model, args.weights, BUILDERS[args.task]).model


def answer_rounds(model: nn.Module, images: torch.Tensor) -> None:
    """Time one forward pass for every line that arrives."""
    with torch.inference_mode():
        for _ in sys.stdin:
            print(timed(lambda: model(images)), flush=True)


def seconds_of_passes(model: nn.Module, spec: InputSpec, rounds: int) -> float:
    recipe = Recipe(relu=True, equalize=True, absorption=True, quantize=True, correction=True)
    return statistics.median(timed(lambda: quantize_data_free(model, spec, recipe)) for _ in range(rounds))


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio(first: list[float], second: list[float]) -> float:
    """Median of the ratios round by round, without the first round."""
    return statistics.median(a / b for a, b in zip(first[1:], second[1:], strict=True))


if __name__ == "__main__":
    main()
