"""How fast the exported INT8 files run, beside the float network as it was loaded, in the same engine.

    python -m benchmarks.int8 [--model NAME --weights FILE --image_size 224] [--calibrate DIR]

Seconds are medians over rounds in which every variant ran once, one after the other, with the quartiles beside them. The
base of each ratio is the original float network, with its BatchNorm folded, in the same engine; "with caps" is the float copy
that equalization leaves, whose ReLU6 have a cap per channel. quantize_static is ONNX Runtime's own quantizer on the original
network, calibrated on real images. torch.compile needs a C++ compiler, OpenVINO (pip install openvino) its package; what is not
there is skipped, and that is said. So is a processor without VNNI, whose INT8 may be slower than float.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, fx, nn

from demo.render import rendered
from dfq import Recipe, quantize_data_free
from modeling import build_model
from utils.backends.base import INPUT, load_engine
from utils.backends.onnx_writer import WITH_MIN, onnx_model
from utils.backends.onnxruntime.export import build
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.experiment import cli
from utils.experiment.evaluation import deploy, tune_allocator
from utils.graph.capture import capture
from utils.passes.fold_batchnorm import fold_batchnorm
from utils.passes.log import PassLog
from utils.quantization.target import TARGETS
from utils.tasks.images import classification_transform, load_image

CPU = torch.device("cpu")
RECIPE = Recipe(equalize=True, quantize=True, correction=True)
BASES = {"ONNX Runtime": "ONNX Runtime FP32", "OpenVINO": "OpenVINO FP32", "torch": "torch eager FP32"}
# By the name of a variant, the engine that runs it and the file.
FILES = {
    "ONNX Runtime FP32": ("onnxruntime", "original"),
    "ONNX Runtime FP32 with caps": ("onnxruntime", "capped"),
    "ONNX Runtime INT8, ours": ("onnxruntime", "ours"),
    "ONNX Runtime INT8, layers in float": ("onnxruntime", "mixed"),
    "ONNX Runtime INT8, uint8 weights": ("onnxruntime", "uint8"),
    f"ONNX Runtime INT8, --opset {WITH_MIN}": ("onnxruntime", "newest"),
    "ONNX Runtime INT8, quantize_static": ("onnxruntime", "static"),
    "OpenVINO FP32": ("openvino", "original"),
    "OpenVINO INT8, ours": ("openvino", "openvino"),
}


class RealImages(CalibrationDataReader):
    def __init__(self, images: Tensor):
        self.batches = iter(images.split(1))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch.numpy()}


def original(model: nn.Module, spec: InputSpec) -> fx.GraphModule:
    """The network as it was loaded, BatchNorm folded: what an engine makes of it anyway."""
    network = capture(model, spec)
    fold_batchnorm(network, PassLog())
    return network


def files(
    model: nn.Module, spec: InputSpec, recipe: Recipe, images: Tensor, folder: Path, float_layers: Sequence[str]
) -> dict[str, Path]:
    """The network in float as loaded and with caps, as our INT8 files, and as quantize_static makes it.

    float_layers: those of "mixed", which is made where there are any.
    """
    ours = quantize_data_free(model, spec, recipe)
    theirs = quantize_data_free(model, spec, replace(recipe, target="openvino"))
    models = {
        "original": onnx_model(original(model, spec), spec, {}),
        "capped": onnx_model(ours.float, spec, {}),
        "ours": build(ours, spec, {}, weight_type="int8"),
        "uint8": build(ours, spec, {}, weight_type="uint8"),
        "newest": build(ours, spec, {}, WITH_MIN, weight_type="int8"),
        "openvino": build(theirs, spec, {}, target=TARGETS["openvino"]),
    }
    if float_layers:
        mixed = quantize_data_free(model, spec, replace(recipe, float_layers=tuple(float_layers)))
        models["mixed"] = build(mixed, spec, {}, weight_type="int8")
    made = {name: folder / f"{name}.onnx" for name in (*models, "static")}
    for name, one in models.items():
        onnx.save(one, made[name])
    quantize_static(
        made["original"],
        made["static"],
        RealImages(images),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return made


def variants(made: dict[str, Path], eager: nn.Module, threads: int, images: Tensor) -> dict[str, Callable[[], object]]:
    """What runs on the images [N, 3, H, W], by name, each warmed up. eager: the network as loaded."""
    torch.set_num_threads(threads)
    fast = images.contiguous(memory_format=torch.channels_last)
    runs = {"torch eager FP32": partial(eager, fast), "torch compile FP32": partial(torch.compile(eager), fast)}
    working = {}
    for name in (*runs, *(name for name, (_, file) in FILES.items() if file in made)):
        try:
            if name in FILES:
                engine, file = FILES[name]
                runs[name] = partial(load_engine(engine).network(made[file], threads), images)
            runs[name]()
        except (UserError, RuntimeError) as error:  # a compiler or a package that is not there
            print(f"  without {name}: {str(error).strip().splitlines()[0][:100]}")
        else:
            working[name] = runs[name]
    return working


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times = {name: [] for name in runs}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    return times


def report(times: dict[str, list[float]], batch: int, threads: int) -> None:
    """Each variant's time, and how many times as fast it is as the original float network in its own engine."""
    print(f"\n{threads} thread(s), batch {batch:<18}{'ms':>9}{'quartiles':>18}{'images/s':>10}{'over FP32':>11}")
    for name, seconds in times.items():
        low, middle, high = (1000 * value for value in statistics.quantiles(seconds, n=4))
        base = times[next(base for engine, base in BASES.items() if name.startswith(engine))]
        ratio = statistics.median(b / s for b, s in zip(base, seconds, strict=True))
        print(f"{name:<38}{middle:>9.2f}{f'{low:.2f} to {high:.2f}':>18}{1000 * batch / middle:>10.0f}{ratio:>10.2f}x")


def describe_processor() -> str:
    """Whether the processor has VNNI, as Linux says it."""
    about = Path("/proc/cpuinfo")
    if not about.is_file():
        return "VNNI: unknown"
    return "with VNNI" if "vnni" in about.read_text() else "without VNNI: INT8 may be slower than float here"


def calibration(folder: str | None, spec: InputSpec, count: int) -> Tensor:
    """Real images [N, 3, H, W], evenly spread over the folder (default: the demo's)."""
    paths = sorted(Path(folder or rendered("classification")).rglob("*.[jJ][pP]*[gG]"))
    transform = classification_transform(spec)
    return torch.stack([transform(load_image(str(paths[i * len(paths) // count]))) for i in range(count)])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mobilenet_v2", help="as for main_cls.py")
    parser.add_argument("--weights", help="as for main_cls.py")
    parser.add_argument("--image_size", type=int, nargs="+", help="side, or height and width")
    parser.add_argument("--calibrate", metavar="DIR", help="folder of images for quantize_static (default: the demo's)")
    parser.add_argument("--relu", action="store_true", help="replace ReLU6 by ReLU: no caps per channel to keep")
    parser.add_argument(
        "--float_layers", nargs="+", default=[], metavar="NAME", help="time a file with these in float too"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args(arguments)
    tune_allocator()
    network = build_model(args.model, args.weights)
    spec = cli.changed_spec(network.spec, args.image_size)
    recipe = replace(RECIPE, relu=args.relu)
    print(f"{args.model} {spec.size[0]}x{spec.size[1]}, {recipe}; processor {describe_processor()}")
    eager = deploy(network.model, CPU)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        images = calibration(args.calibrate, spec, 32)
        made = files(network.model, spec, recipe, images, Path(folder), args.float_layers)
        for threads in args.threads:
            for batch in (1, 32):
                runs = variants(made, eager, threads, images[:batch])
                rounds = args.rounds if batch > 1 else 5 * args.rounds
                report(measure(runs, rounds), batch, threads)


if __name__ == "__main__":
    cli.run(main, "benchmarks.int8")
