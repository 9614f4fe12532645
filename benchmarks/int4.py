"""How small and how fast files with weights of 4 bits are in ONNX Runtime, by how they are stored.

    python -m benchmarks.int4 [--model NAME --weights FILE --image_size 224]

Per channel, first and last layers at 8 bits. Beside the forms that --export writes stand two that it does not: the one
that ONNX means for weights of 4 bits, a DequantizeLinear that reads them, without a Cast in between; and one whose
DequantizeLinears know the zero point of every channel, which the others count from. Seconds are measured as
benchmarks.int8 measures them; "starts in" is the time that a session takes to open, the best of five.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx
import torch
from onnx import helper, numpy_helper

from benchmarks.int8 import RECIPE, describe_processor, measure, original, report
from dfq import quantize_data_free
from modeling import build_model
from utils.backends.onnx_writer import WITH_INT4, onnx_model
from utils.backends.onnxruntime.export import build, check_parity, describe_kernels
from utils.backends.onnxruntime.session import OnnxNetwork
from utils.experiment import cli
from utils.passes.result import Quantized

FLOAT = "ONNX Runtime FP32"  # the base of benchmarks.int8's ratios
STORED_IN_4 = f"ONNX Runtime W4A8, --opset {WITH_INT4}"
ASYMMETRIC = "ONNX Runtime W4A8 asymmetric"


def without_casts(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, whose DequantizeLinears read weights of 4 bits themselves; ONNX wants their zero points of 4 too."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    packed = {n.output[0]: n for n in model.graph.node if n.op_type == "Cast" and n.input[0] in constants}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in packed:
            continue
        zero, weights = constants[node.input[2]], constants[packed[node.input[0]].input[0]]
        values = numpy_helper.to_array(zero)
        zero.CopyFrom(helper.make_tensor(zero.name, weights.data_type, values.shape, values.flatten().tolist()))
        node.input[0] = weights.name
    for node in packed.values():
        model.graph.node.remove(node)
    onnx.checker.check_model(model, full_check=True)
    return model


def with_known_zero_points(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, whose DequantizeLinears know the zero points that its Subs take off."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {node.output[0]: node for node in model.graph.node}
    for node in [node for node in model.graph.node if node.op_type == "DequantizeLinear"]:
        counted = made_by.get(node.input[0])
        taken = made_by.get(counted.input[0]) if counted and counted.op_type == "Cast" else None
        if taken is None or taken.op_type != "Sub":
            continue
        zero = constants[node.input[2]]
        own = numpy_helper.to_array(constants[taken.input[1]]).flatten() + numpy_helper.to_array(zero)
        zero.CopyFrom(numpy_helper.from_array(own.astype(numpy_helper.to_array(zero).dtype), zero.name))
        wide = made_by[taken.input[0]]
        counted.input[0] = wide.input[0]
        model.graph.node.remove(taken)
        model.graph.node.remove(wide)
    onnx.checker.check_model(model, full_check=True)
    return model


def start_seconds(file: Path) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        OnnxNetwork(file, 1)
        times.append(time.perf_counter() - start)
    return min(times)


def describe(model: onnx.ModelProto, quantized: Quantized, images: torch.Tensor) -> str:
    """Which layers run on integers, and whether the engine gives what the simulation does."""
    kernels = describe_kernels(model, quantized)
    parity = check_parity(model, quantized.simulated, images)
    off = sum(layer.off + layer.far for layer in parity.layers)
    layers = len(kernels.integer) + len(kernels.floating)
    return f"{len(kernels.integer)} of {layers} layers on integers, {off} values off"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int4", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mobilenet_v2", help="as for main_cls.py")
    parser.add_argument("--weights", help="as for main_cls.py")
    parser.add_argument("--image_size", type=int, nargs="+", help="side, or height and width")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    network = build_model(args.model, args.weights)
    spec = cli.changed_spec(network.spec, args.image_size)
    recipe = replace(RECIPE, per_channel=True)
    print(f"{args.model} {spec.size[0]}x{spec.size[1]}, {recipe}, per channel; processor {describe_processor()}")
    eight = quantize_data_free(network.model, spec, recipe)
    recipe = replace(recipe, bits_weight=4, bits_first_last=8)
    four = quantize_data_free(network.model, spec, recipe)
    zeros = quantize_data_free(network.model, spec, replace(recipe, asymmetric=True))
    stored, stored_zeros = (build(one, spec, {}, WITH_INT4) for one in (four, zeros))
    models = {
        FLOAT: (onnx_model(original(network.model, spec), spec, {}), None),
        "ONNX Runtime W8A8": (build(eight, spec, {}), eight),
        "ONNX Runtime W4A8": (build(four, spec, {}), four),
        STORED_IN_4: (stored, four),
        "ONNX Runtime W4A8, without the Cast": (without_casts(stored), four),
        ASYMMETRIC: (build(zeros, spec, {}), zeros),
        f"{ASYMMETRIC}, --opset {WITH_INT4}": (stored_zeros, zeros),
        f"{ASYMMETRIC}, zero points known": (with_known_zero_points(stored_zeros), zeros),
    }
    images = spec.probe(8)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        runs = {}
        for name, (model, quantized) in models.items():
            file = Path(folder) / f"{len(runs)}.onnx"
            onnx.save(model, file)
            size = f"{file.stat().st_size / 1e6:.2f} MB, starts in {1000 * start_seconds(file):.0f} ms"
            print(f"{name:<50}{size}; {describe(model, quantized, images) if quantized else 'float'}")
            runs[name] = partial(OnnxNetwork(file, 1), images[:1])
            runs[name]()
        report(measure(runs, 5 * args.rounds), 1, 1)


if __name__ == "__main__":
    cli.run(main, "benchmarks.int4")
