"""What each target costs in accuracy: the same passes, quantized for each, scored on the same images.

    python -m benchmarks.targets [--limit 200] [--run "cls --data DIR --weights FILE" ...] [--passes --equalize --correction]

Without --run, the three networks of the demo. ONNX Runtime's target is there twice, per tensor and per channel: TensorRT's
has a scale per channel anyway, so that the difference to the second is what activations symmetric around 0 cost. OpenVINO
runs its own file where it is installed; the others are scored in simulation.
"""

import argparse
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import main_cls
import main_det
import main_seg
from utils.backends.base import missing_package
from utils.experiment import cli
from utils.experiment.records import read_lines

SCRIPTS = {"cls": main_cls, "seg": main_seg, "det": main_det}
VARIANTS = {
    "onnxruntime": [],
    "onnxruntime, per channel": ["--per_channel"],
    "openvino": ["--target", "openvino"],
    "openvino, 7 bits": ["--target", "openvino", "--bits_weight", "7"],
    "tensorrt": ["--target", "tensorrt"],
}
HEADER = f"{'network':<34}{'images':>7}  {'target':<26}{'metric':<11}{'FP32':>8}{'INT8':>8}{'change':>8}{'in engine':>11}{'agree':>8}"


def lines(
    words: Sequence[str], passes: Sequence[str], limit: int, variants: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """A recorded line for every variant, or in words why there is none. words: the task, and the flags of its script."""
    task, *flags = words
    shared = [*flags, "--quantize", *passes, "--limit", str(limit), "--workers", "0"]
    for name in variants:
        engine = ["--engine", "openvino"] if name.startswith("openvino") and missing_package("openvino") is None else []
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "runs.jsonl"
            try:
                SCRIPTS[task].main([*shared, *VARIANTS[name], *engine, "--results", str(results)])
                yield name, read_lines(results)[0]
            except cli.UserError as error:
                yield name, str(error)


def row(name: str, line: Mapping[str, Any]) -> str:
    """The line in the table's columns; where an engine ran it, its score and how often it agrees with the simulation."""
    metrics, metric = line["metrics"], line["metric"]
    ran = "simulated" in metrics
    fp32, simulated = metrics["fp32_original"][metric], metrics["simulated" if ran else "quantized"][metric]
    engine = f"{metrics['quantized'][metric]:>11.2f}{line['agreement']:>7.2f}%" if ran else f"{'-':>11}{'-':>8}"
    weights = f"{line['model']}, {Path(line['weights']).name}"[:33]
    return (
        f"{weights:<34}{line['samples']:>7}  {name:<26}{metric:<11}{fp32:>8.2f}{simulated:>8.2f}"
        f"{simulated - fp32:>+8.2f}{engine}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="append", metavar="WORDS", help="task (cls, seg, det) and flags of its script")
    parser.add_argument("--limit", type=int, default=200, help="images of each (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument(
        "--passes",
        nargs=argparse.REMAINDER,
        default=["--equalize", "--correction"],
        help="flags of the passes; put last",
    )
    args = parser.parse_args(arguments)
    rows = [HEADER]
    for words in args.run or list(SCRIPTS):
        for name, line in lines(shlex.split(words), args.passes, args.limit, args.variants):
            rows.append(row(name, line) if isinstance(line, Mapping) else f"{words}  {name}: {line}")
            print(f"\n{rows[-1]}\n", flush=True)
    print("\n".join([f"passes: {' '.join(args.passes)}", *rows]))


if __name__ == "__main__":
    cli.run(main, "benchmarks.targets")
