"""How fast the exported INT8 file runs, beside float and beside other ways to INT8.

    python -m benchmarks.int8 [--model NAME --weights FILE --image_size 224] [--calibrate DIR]

Seconds are medians over rounds in which every variant ran once, one after the other, with the
quartiles beside them. quantize_static is ONNX Runtime's own quantizer on the same network, calibrated on
real images. torch.compile needs a C++ compiler, OpenVINO (pip install openvino) its package; what is
not there is skipped, and that is said.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor
from utils.backends.onnxruntime.graph import INPUT, onnx_model

from demo.render import rendered
from dfq import Quantized, Recipe, quantize_data_free
from modeling import build_model
from utils.backends.onnxruntime.export import build
from utils.backends.onnxruntime.session import OnnxNetwork
from utils.core.input_spec import InputSpec
from utils.experiment import cli
from utils.experiment.evaluation import deploy, tune_allocator
from utils.tasks.images import classification_transform, load_image

CPU = torch.device("cpu")
RECIPE = Recipe(equalize=True, quantize=True, correction=True)


class RealImages(CalibrationDataReader):
    def __init__(self, images: Tensor):
        self.batches = iter(images.split(1))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch.numpy()}


def files(quantized: Quantized, spec: InputSpec, images: Tensor, folder: Path) -> dict[str, Path]:
    """The same network as float, as our INT8 file, and as quantize_static makes it from the float file."""
    made = {name: folder / f"{name}.onnx" for name in ("float", "ours", "static")}
    onnx.save(onnx_model(quantized.float, {}, {}, spec, {}), made["float"])
    onnx.save(build(quantized, spec, {}), made["ours"])
    quantize_static(
        made["float"],
        made["static"],
        RealImages(images),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return made


def variants(
    made: dict[str, Path], quantized: Quantized, threads: int, images: Tensor
) -> dict[str, Callable[[], object]]:
    """What runs on the images [N, 3, H, W], by name, each warmed up."""
    torch.set_num_threads(threads)
    fast, eager = images.contiguous(memory_format=torch.channels_last), deploy(quantized.float, CPU)
    runs = {"torch eager FP32": partial(eager, fast)}
    runs["torch.compile FP32"] = partial(torch.compile(eager), fast)
    names = {
        "float": "ONNX Runtime FP32",
        "ours": "ONNX Runtime INT8, ours",
        "static": "ONNX Runtime INT8, quantize_static",
    }
    runs |= {names[kind]: partial(OnnxNetwork(file, threads), images) for kind, file in made.items()}
    runs["OpenVINO INT8, our file"] = openvino(made["ours"], threads, images)
    working = {}
    for name, run in runs.items():
        try:
            run()
        except Exception as error:  # a compiler or a package that is not there
            print(f"  without {name}: {str(error).strip().splitlines()[0][:100]}")
        else:
            working[name] = run
    return working


def openvino(file: Path, threads: int, images: Tensor) -> Callable[[], object]:
    def run() -> object:
        if not compiled:
            import openvino

            compiled.append(openvino.Core().compile_model(file, "CPU", {"INFERENCE_NUM_THREADS": threads}))
        return compiled[0]([images.numpy()])

    compiled: list = []
    return run


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
    print(f"\n{threads} thread(s), batch {batch:<18}{'ms':>9}{'quartiles':>18}{'images/s':>10}{'over ORT FP32':>15}")
    base = times["ONNX Runtime FP32"]
    for name, seconds in times.items():
        low, middle, high = (1000 * value for value in statistics.quantiles(seconds, n=4))
        ratio = statistics.median(b / s for b, s in zip(base, seconds, strict=True))
        print(f"{name:<38}{middle:>9.2f}{f'{low:.2f} to {high:.2f}':>18}{1000 * batch / middle:>10.0f}{ratio:>14.2f}x")


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
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(arguments)
    tune_allocator()
    network = build_model(args.model, args.weights)
    spec = cli.changed_spec(network.spec, args.image_size)
    recipe = replace(RECIPE, relu=args.relu)
    quantized = quantize_data_free(network.model, spec, recipe)
    print(f"{args.model} {spec.size[0]}x{spec.size[1]}, {recipe}")
    with tempfile.TemporaryDirectory() as folder:
        images = calibration(args.calibrate, spec, 32)
        made = files(quantized, spec, images, Path(folder))
        for threads in (1, 2):
            for batch in (1, 32):
                runs = variants(made, quantized, threads, images[:batch])
                rounds = args.rounds if batch > 1 else 5 * args.rounds
                report(measure(runs, rounds), batch, threads)


if __name__ == "__main__":
    cli.run(main, "benchmarks.int8")
