"""Which networks of other libraries can be quantized and exported as they are.

    python -m benchmarks.coverage [--sample] [--only WORD ...] [--limit N] [--jobs 2]

Every network runs in a process of its own, within limits of time and memory, and adds one JSON line to --results;
networks that have a line are not tried again, so that a run goes on where another stopped. The report beside the lines
(results/coverage.txt) is made of the last line of each. timm is a requirement of the project already;
pip install segmentation-models-pytorch ultralytics opencv-python-headless for the other two: a library that is not
there is passed over, and that is said. --sample tries the networks of catalogue.SAMPLE alone, one small network of a
family, in the order written there.

Captured: as one graph. Exact: that graph, BatchNorm folded and layers equalized, gives the network's own outputs on
two batches; where random weights amplify float32's own rounding, it may differ by ten times what that does to the
network as it came, as in every run (utils.passes.exactness). A network without BatchNorm gets its ranges from 8 images
of noise, as from --images. Layers: convolutions and linear layers of the ONNX file, and those of them with integer
weights; the matrices of an uneven average pooling count as layers in float. Agrees: ONNX Runtime and the simulation,
layer by layer, within the bounds of utils.backends.parity. Refused: in one line. Faults: tracebacks, and what went
over the limits.
"""

import argparse
import json
import multiprocessing
import re
import resource
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks import catalogue
from benchmarks.catalogue import Entry
from dfq import Recipe, quantize_data_free
from utils.backends.onnxruntime.export import build, check_parity
from utils.core.arguments import at_least
from utils.core.errors import UserError
from utils.core.files import atomic_write
from utils.core.input_spec import InputSpec
from utils.experiment import cli
from utils.graph.capture import capture
from utils.passes.exactness import TOLERANCE, rounding_noise

RECIPE = Recipe(equalize=True, quantize=True, correction=True)
BATCHES = ((2, 11), (3, 12))  # numbers of images and seeds
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MOVES = ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten")

Record = dict[str, Any]


# ------------------------------------------------------------------------------------- one network


def examine(entry: Entry) -> Record:
    """What becomes of one network; see the module's docstring for the words."""
    record: Record = {"library": entry.library, "group": entry.group, "name": entry.name, "stage": "build"}
    start = time.perf_counter()
    try:
        _examine(entry, record)
    except UserError as error:
        record["reason"] = str(error)
    except Exception as error:  # a fault: of the library while it builds, else of ours
        record["reason"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]} ({_place(error)})"
        record["traceback"] = record["stage"] != "build"
    return record | {"seconds": round(time.perf_counter() - start, 1)}


def _examine(entry: Entry, record: Record) -> None:
    with torch.no_grad():
        model = catalogue.build(entry)
        spec = catalogue.fitting_spec(model, entry)
        model = catalogue.as_tensors(catalogue.settled(model, spec), spec)
    record |= {
        "side": spec.size[0],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batchnorms": sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()),
        "stage": "capture",
    }
    images = None if record["batchnorms"] else spec.probe(8, seed=7)
    record["ranges"] = "BatchNorm" if images is None else "images"
    try:
        quantized = quantize_data_free(model, spec, RECIPE, images, real=images is not None)
    except UserError as error:  # is it the network that cannot be captured, or what comes behind?
        record["exact"] = deviation(model, capture(model, spec), spec)
        record["stage"] = "quantize"
        raise error from None
    record |= {"exact": deviation(model, quantized.float, spec), "stage": "export"}
    if record["exact"] >= TOLERANCE:
        record["float32"] = max(rounding_noise(model, spec.probe(count, seed)) for count, seed in BATCHES)
    file = build(quantized, spec, {})
    kinds = [kind for kind, _ in file_layers(file)]
    record |= {"layers": len(kinds), "integer": kinds.count("integer"), "stage": "agree"}
    record["in_float"] = [name for kind, name in file_layers(file) if kind == "float"][:5]
    parity = check_parity(file, quantized.simulated, spec.probe(2))
    record |= {"stage": "done", "same_answers": round(parity.agreement, 4), "steps": round(parity.mean_steps, 3)}


def deviation(model: nn.Module, graph: nn.Module, spec: InputSpec) -> float:
    """By how much of its largest value any output differs, on two batches of different sizes."""
    worst = 0.0
    with torch.inference_mode():
        for images in (spec.probe(count, seed) for count, seed in BATCHES):
            for wanted, found in zip(_tensors(model(images.clone())), _tensors(graph(images.clone())), strict=True):
                scale = wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
                worst = max(worst, float((found.reshape(wanted.shape) - wanted).abs().max() / scale))
    return worst


def _tensors(outputs: object) -> list[Tensor]:
    return [value.float() for value in tree_leaves(outputs) if isinstance(value, Tensor)]


def file_layers(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """("integer" or "float", name) of every convolution and linear layer of the file: those that multiply by a constant."""
    graph = model.graph
    made_by = {output: node for node in graph.node for output in node.output}
    fixed = {tensor.name for tensor in graph.initializer}
    fixed |= {output for node in graph.node if node.op_type == "Constant" for output in node.output}

    def origin(name: str) -> str:
        while name in made_by and made_by[name].op_type in MOVES:
            name = made_by[name].input[0]
        return name

    def is_integer(name: str) -> bool:
        maker = made_by.get(name)
        return maker is not None and maker.op_type == "DequantizeLinear" and origin(maker.input[0]) in fixed

    layers = []
    for node in graph.node:
        if node.op_type in LAYERS:
            weights = [origin(name) for name in node.input[: 2 if node.op_type == "MatMul" else None]]
            weights = weights if node.op_type == "MatMul" else weights[1:2]
            if any(map(is_integer, weights)):
                layers.append(("integer", node.name))
            elif any(name in fixed for name in weights):
                layers.append(("float", node.name))
    return layers


def _place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


# --------------------------------------------------------------------------------------- processes


@dataclass
class Job:
    entry: Entry
    process: BaseProcess
    pipe: Connection
    deadline: float


def run_all(work: Iterable[Entry], jobs: int, seconds: float, memory: float) -> Iterator[Record]:
    """The networks' records as they come, each from a process of its own.

    seconds, memory: what a process may take, in seconds and GB. The processes are forks of this one, which has
    loaded the libraries and has computed nothing.
    """
    context, running, waiting = multiprocessing.get_context("fork"), [], iter(work)
    while True:
        while len(running) < jobs and (entry := next(waiting, None)) is not None:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(entry, sender, memory))
            process.start()
            sender.close()
            running.append(Job(entry, process, receiver, time.monotonic() + seconds))
        if not running:
            return
        ready = wait([job.pipe for job in running], timeout=1)
        for job in list(running):
            late = time.monotonic() > job.deadline
            if job.pipe in ready or late:
                running.remove(job)
                yield _finish(job, f"over {seconds:g} s" if late and job.pipe not in ready else None)


def _child(entry: Entry, pipe: Connection, memory: float) -> None:
    limit = int(memory * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    pipe.send(examine(entry))


def _finish(job: Job, late: str | None) -> Record:
    if late:
        job.process.kill()
    try:
        record = None if late else job.pipe.recv()
    except EOFError:
        record = None
    job.process.join()
    job.pipe.close()
    if record is not None:
        return record
    reason = late or f"the process died with code {job.process.exitcode}"
    return {
        **{"library": job.entry.library, "group": job.entry.group, "name": job.entry.name},
        **{
            "stage": "limits",
            "reason": reason,
            "seconds": round(job.deadline - time.monotonic(), 1) if not late else 0,
        },
    }


# ------------------------------------------------------------------------------------------ report


@dataclass
class Totals:
    """What of a set of networks came how far. Networks that their own library cannot build are not counted."""

    networks: int = 0
    captured: int = 0
    exact: int = 0
    exported: int = 0
    whole: int = 0
    agree: int = 0
    refused: int = 0
    faults: int = 0

    def add(self, record: Record) -> None:
        self.networks += 1
        self.captured += "exact" in record
        self.exact += _is_exact(record)
        self.exported += "layers" in record
        self.whole += "layers" in record and record["integer"] == record["layers"]
        self.agree += record["stage"] == "done"
        fault = bool(record.get("traceback")) or record["stage"] == "limits"
        self.refused += "reason" in record and not fault
        self.faults += fault

    def __str__(self) -> str:
        counts = [self.captured, self.exact, self.exported, self.whole, self.agree]
        shares = "".join(f"{count:>6} {count / max(self.networks, 1):>6.1%}" for count in counts)
        return f"{self.networks:>9}{shares}{self.refused:>9}{self.faults:>8}"


HEADING = (
    f"{'':<44}{'networks':>9}"
    + "".join(f"{word:>13}" for word in ("captured", "exact", "exported", "all INT8", "agree"))
) + f"{'refused':>9}{'faults':>8}"


def report(records: Iterable[Record]) -> str:
    """A line a network, then the totals of each library and of all, with and without BatchNorm."""
    records = sorted(records, key=lambda record: (record["library"], record["group"], record["name"]))
    built = [record for record in records if record["stage"] != "build"]
    lines = [f"{'':<66}{'side':>5}{'exact to':>10}{'INT8 layers':>13}{'agrees':>8}{'s':>6}  reason"]
    lines += [_line(record) for record in records]
    lines += ["", HEADING]
    for library in dict.fromkeys(record["library"] for record in built):
        lines.append(_total(library, (record for record in built if record["library"] == library)))
    lines.append(_total("all", built))
    lines.append(_total("all with BatchNorm", (record for record in built if record.get("batchnorms", 1))))
    if len(built) < len(records):
        lines.append(f"not counted: {len(records) - len(built)} that their own library does not build or run")
    return "\n".join(lines) + "\n"


def _total(name: str, records: Iterable[Record]) -> str:
    totals = Totals()
    for record in records:
        totals.add(record)
    return f"{name:<44}{totals}"


def _line(record: Record) -> str:
    exact = f"{record['exact']:.0e}" if "exact" in record else "-"
    layers = f"{record['integer']} of {record['layers']}" if "layers" in record else "-"
    agrees = {"done": "yes", "agree": "no"}.get(record["stage"], "-")
    remarks = ["ranges from images"] * (record.get("ranges") == "images")
    remarks += [f"float32 alone {record['float32']:.0e}"] if "float32" in record else []
    remarks += [f"in float {name}" for name in record.get("in_float", [])]
    reason = record.get("reason", ", ".join(remarks))
    fault = "FAULT " if record.get("traceback") else ""
    name = f"{record['library']} {record['group']} {record['name']}"
    return f"{name:<66}{record.get('side', ''):>5}{exact:>10}{layers:>13}{agrees:>8}{record['seconds']:>6.0f}  {fault}{reason[:220]}".rstrip()


# ------------------------------------------------------------------------------------ command line


def read_records(file: Path) -> dict[str, Record]:
    """The last record of every network, by its key."""
    lines = file.read_text().splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines if line.strip()]
    return {f"{record['library']}:{record['name']}": record for record in records if "library" in record}


def remembered_sizes(file: Path) -> Callable[[str], dict[str, int]]:
    """catalogue.timm_sizes, which takes minutes, kept in the file of results: the choice then stays the same."""
    lines = file.read_text().splitlines() if file.exists() else []
    known = {line["timm"]: line["sizes"] for line in map(json.loads, lines) if "timm" in line}

    def sizes(module: str) -> dict[str, int]:
        if module not in known:
            known[module] = catalogue.timm_sizes(module)
            append(file, {"timm": module, "sizes": known[module]})
        return known[module]

    return sizes


def append(file: Path, record: Record) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", action="store_true", help="one small network of a family instead of all")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="regular expressions: of library:name, any of them")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="at most N networks, of all kinds")
    parser.add_argument("--jobs", type=at_least(1), default=2, help="processes at a time (default: 2)")
    parser.add_argument("--timeout", type=at_least(1), default=600, metavar="SECONDS", help="of one network")
    parser.add_argument("--memory", type=at_least(1), default=8, metavar="GB", help="of one network (default: 8)")
    parser.add_argument("--again", action="store_true", help="try networks again whose last line is not of a success")
    parser.add_argument("--results", type=Path, default=Path("results/coverage.jsonl"), metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    for library in catalogue.missing():
        print(f"without {library}, which is not installed")
    known = read_records(args.results)
    done = {key for key, record in known.items() if not args.again or _is_success(record)}
    entries = catalogue.sample() if args.sample else catalogue.entries(remembered_sizes(args.results))
    chosen = [entry for entry in entries if _matches(entry, args.only)]
    work = [entry for entry in chosen[: args.limit] if entry.key not in done]
    print(f"{len(chosen[: args.limit])} networks, {len(work)} to try", flush=True)
    for count, record in enumerate(run_all(work, args.jobs, args.timeout, args.memory), start=1):
        append(args.results, record)
        print(f"{count:>5} {_line(record)}", flush=True)
    text = write_report(args.results)
    print("\n" + text.rpartition("\n\n")[2])


def write_report(results: Path) -> str:
    """The report of a file of results, written beside it: what was tried, and of how many, then what came of it."""
    records = read_records(results)
    scope = f"{len(records)} networks tried. The catalogue has up to {catalogue.size()}"
    sampled = [entry.key in records for entry in catalogue.sample()]
    scope += f"; its sample (benchmarks/catalogue.py, SAMPLE, the quick ones first) {len(sampled)}, of which {sum(sampled)} were tried.\n\n"
    text = scope + report(records.values())
    with atomic_write(results.with_suffix(".txt")) as file:
        file.write_text(text)
    return text


def _is_exact(record: Record) -> bool:
    return "exact" in record and record["exact"] < max(TOLERANCE, 10 * record.get("float32", 0.0))


def _is_success(record: Record) -> bool:
    return record["stage"] == "done" and record["integer"] == record["layers"] and _is_exact(record)


def _matches(entry: Entry, words: list[str] | None) -> bool:
    return not words or any(map(partial(re.search, string=entry.key), words))


if __name__ == "__main__":
    cli.run(main, "benchmarks.coverage")
