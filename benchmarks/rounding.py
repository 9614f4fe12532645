"""What learned rounding is worth, by its iterations, its images and each choice in learning.

python -m benchmarks.rounding --help; recorded in results/rounding.txt. Chosen by without labels: how far the quantized
network's output is from the float one's on held-out images that are made like those learned from, and on the
evaluation's own, which the method never sees. Every setting starts from the same network, rounded with GPTQ.
"""

import argparse
import copy
import time
from dataclasses import replace
from pathlib import Path

import torch

from dfq import Recipe, quantize_data_free
from modeling import build_model
from utils.calibration.distillation import Distillation
from utils.calibration.fidelity import fidelity
from utils.calibration.image_cache import distilled
from utils.calibration.images import Images
from utils.core.cache import cache_folder
from utils.core.predictions import count_classes
from utils.experiment import cli
from utils.experiment import evaluation as engine
from utils.passes.adaround import learn_rounding
from utils.passes.block_learning import Reconstruction
from utils.tasks.data import evenly, image_folder

DEFAULT = Reconstruction()
SETTINGS = {
    "as it is": {},
    **{f"{count} iterations": {"iterations": count} for count in (60, 400)},
    "from exact weights": {"trust": 0.0},
    "from GPTQ's weights": {"trust": 1.0},
    "no float values mixed in": {"drop": 0.0},
    "scales are not learned": {"scale_reach": 0.0},
    "biases are not learned": {"bias_reach": 0.0},
    "channels count alike": {"sensitivity": False},
}
RECIPE = {"quantize": True, "equalize": True, "correction": True, "distill_correction": True, "distill_range": True}


def measure(args: argparse.Namespace) -> None:
    """Print a line for every setting, and for every number of images."""
    network = build_model(args.model, args.weights)
    spec, cpu = cli.changed_spec(network.spec, args.image_size), torch.device("cpu")
    samples, _ = image_folder(args.data, "val", spec, count_classes(network.model, spec, axis=1))
    real = torch.stack([image for image, *_ in map(evenly(samples, args.real).__getitem__, range(args.real))])
    settings = Distillation(images=args.images), Distillation(images=max(2, args.images // 4), seed=1)
    made = Images(*(distilled(network.model, spec, one, cpu, cache_folder() / "distilled") for one in settings))
    bits = {"bits_weight": args.bits_weight, "bits_activation": args.bits_activation}
    recipe = Recipe(**RECIPE, **bits, per_channel=args.per_channel, distill_rounding="gptq")
    recipe = replace(recipe, bits_first_last=args.bits_first_last)
    start = quantize_data_free(network.model, spec, recipe, made.calibration, judging=made.judging)
    print(f"{'':<28}{'CPU s':>8}{'held-out dB':>13}{'real dB':>9}{'blocks kept':>13}")

    def line(name: str, images: Images, **changes: object) -> None:
        before = time.process_time()
        result = learn_rounding(copy.deepcopy(start), images, 32, replace(DEFAULT, **changes))
        seconds = time.process_time() - before
        near = [fidelity(start.float, result.simulated, some).output for some in (made.judging, real)]
        counts = result.log.counts().get("learned rounding", {"applied": 0, "skipped": 0})
        kept = f"{counts['applied']} of {sum(counts.values())}"
        print(f"{name:<28}{seconds:>8.0f}{near[0]:>13.2f}{near[1]:>9.2f}{kept:>13}", flush=True)

    near = [fidelity(start.float, start.simulated, some).output for some in (made.judging, real)]
    print(f"{'GPTQ':<28}{'':>8}{near[0]:>13.2f}{near[1]:>9.2f}")
    for name in args.settings or SETTINGS:
        line(name, made, **SETTINGS[name])
    for count in args.counts:
        line(f"{count} images", Images(made.calibration[:count], made.judging))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounding", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--weights")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--image_size", type=int, nargs="+")
    parser.add_argument("--images", type=int, default=64, help="images to distill")
    parser.add_argument("--real", type=int, default=64, help="of the data's images, to measure on")
    parser.add_argument("--bits_weight", type=int, default=4)
    parser.add_argument("--bits_activation", type=int, default=8)
    parser.add_argument("--bits_first_last", type=int)
    parser.add_argument("--per_channel", action="store_true")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, help="default: all")
    parser.add_argument("--counts", type=int, nargs="*", default=[8, 16, 32], help="numbers of images to learn from")
    args = parser.parse_args(arguments)
    engine.tune_allocator()
    measure(args)


if __name__ == "__main__":
    cli.run(main, "benchmarks.rounding")
