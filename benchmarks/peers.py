"""Other quantizers beside ours: the same float network, scored on the same images, at W8A8.

    python -m benchmarks.peers --data DIR --images DIR [--model NAME --weights FILE] [--only NAME ...]

Every peer of benchmarks/peer_tools.py runs in a process of its own (--peer NAME), so that one that is not installed, or
fails, costs a line with the reason. A line that is there already, of the same network, data and version, is not measured
again: to compare tools that cannot be installed together, run the command once in the environment of each. The pictures of
--images are for the tools that calibrate; they have no labels and must be others than those that are scored. The table is
written beside the lines.
"""

import fnmatch
import json
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peer_tools import FLOAT, OURS, PEERS, Job, Peer
from modeling import build_model
from utils.calibration.images import picture_files
from utils.core.arguments import Parser, at_least
from utils.core.errors import UserError
from utils.core.files import atomic_write
from utils.core.hashing import weights_hash
from utils.core.input_spec import InputSpec
from utils.core.predictions import count_classes
from utils.experiment import cli
from utils.experiment.evaluation import evaluate, tune_allocator
from utils.experiment.records import commit, record
from utils.tasks.classification import TASK, read_image
from utils.tasks.data import Batches
from utils.tasks.metrics import TopK, interval

Line = Mapping[str, Any]
CPU = torch.device("cpu")
# What lines of one table have in common, and one line of each peer differs by.
SETTING = ("weights_sha256", "input", "data", "limit", "images", "calibration")


# ---------------------------------------------------------------------------------------- one peer


def measure(name: str, args: Namespace) -> Line:
    """Quantize with one peer and score what it made; the line that is recorded."""
    peer = PEERS[name]
    if peer.missing:
        raise UserError(f"{peer.tool}: {peer.missing}")
    torch.manual_seed(0)
    network = build_model(args.model, args.weights)
    spec = cli.changed_spec(network.spec, args.image_size, args.resize)
    classes = count_classes(network.model, spec, TASK.class_axis)
    data = TASK.open_data(Namespace(data=args.data, split="val", classes=None, limit=args.limit), spec, classes, {})
    job = Job(network.model, spec, pictures(args.images, spec, args.calibration))
    start = time.perf_counter()
    made = peer.quantize(job)
    seconds = time.perf_counter() - start
    metric = TopK()
    batches = Batches(data.samples, args.batch_size, 0, 0, data.collate)
    evaluate({name: made}, batches, {name: metric}, CPU)
    return setting(network, spec, args) | {
        "peer": name,
        "version": _version(peer),
        "seconds": round(seconds, 1),
        "samples": len(metric.records),
        **metric.compute(),
        "hits": _packed([hit for _, hit, _ in metric.records]),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def setting(network: Any, spec: InputSpec, args: Namespace) -> dict[str, Any]:
    """What lines of one table have in common."""
    return {
        "model": network.name,
        "weights": network.weights,
        "weights_sha256": weights_hash(network.model),
        "input": [*spec.size, spec.resize],
        "data": args.data,
        "limit": args.limit,
        "images": args.images,
        "calibration": args.calibration,
    }


def pictures(folder: str, spec: InputSpec, count: int) -> Tensor:
    """Unlabelled pictures [N, C, H, W] as the evaluation brings its own to the input, evenly spread over the folder."""
    files = picture_files(Path(folder))
    count = min(count, len(files))
    return torch.stack([read_image(files[i * len(files) // count], spec) for i in range(count)])


def _version(peer: Peer) -> str | None:
    """What a row's figures are of: a peer's version, or our commit."""
    return commit() if peer.tool == OURS else peer.version


def _packed(hits: Sequence[bool]) -> str:
    """Which images were right, as hexadecimal digits, so that any two rows can be compared image by image."""
    return f"{int(''.join('01'[hit] for hit in hits), 2):x}"


def _unpacked(line: Line) -> TopK:
    """A metric with the line's hits."""
    metric = TopK()
    metric.records = [(0, bit == "1", False) for bit in f"{int(line['hits'], 16):0{line['samples']}b}"]
    return metric


# --------------------------------------------------------------------------------------- all peers


def run_all(names: Iterable[str], args: Namespace, words: Sequence[str], shared: Line) -> None:
    """Every one of the peers that is not recorded yet, each in a process of its own; what fails is recorded with its reason."""
    for name in names:
        if name in _done(read(args.results), shared):
            continue
        start = time.monotonic()
        reason = PEERS[name].missing or _run_alone([*words, "--peer", name], args.timeout)
        if reason:
            record(args.results, {**shared, "peer": name, "version": _version(PEERS[name]), "reason": reason})
        print(f"{name}: {reason or 'recorded'} ({time.monotonic() - start:.0f} s)", flush=True)


def _run_alone(words: Sequence[str], seconds: float) -> str | None:
    """Run this module with these words in a process of its own; in a line, why that failed."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.peers", *words], capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"over {seconds:g} s"
    if done.returncode == 0:
        return None
    said = [text.strip() for text in done.stderr.splitlines() if text.strip()]
    return f"ended with code {done.returncode}: {said[-1][:200] if said else 'without a word'}"


def _done(lines: Iterable[Line], shared: Line) -> set[str]:
    """The peers whose line in this setting is of the version that is here, or that are not here."""
    own = (line for line in lines if _same(line, shared) and "reason" not in line)
    return {line["peer"] for line in own if _version(PEERS[line["peer"]]) in (None, line["version"])}


def _same(first: Line, second: Line) -> bool:
    return all(first[key] == second[key] for key in SETTING)


def read(file: Path) -> list[Line]:
    """The lines of a file, of peers that there still are."""
    texts = file.read_text().splitlines() if file.exists() else []
    return [line for line in map(json.loads, texts) if line["peer"] in PEERS]


# ------------------------------------------------------------------------------------------ report

HEADER = (
    f"{'tool':<22}{'recipe':<46}{'weights':<12}{'data':<14}{'top-1':>7}{'change':>8}{'95 % CI':>18}{'s':>7}  scored in"
)


def report(lines: Sequence[Line]) -> str:
    """A table for every network and setting: of each peer its last score, or why there is none."""
    text = []
    while lines:
        own = {line["peer"]: line for line in lines if _same(line, lines[0]) and "reason" in line}
        own |= {line["peer"]: line for line in lines if _same(line, lines[0]) and "reason" not in line}
        text.append(_table([own[name] for name in PEERS if name in own]))
        lines = [line for line in lines if not _same(line, lines[0])]
    return "\n\n".join(text) + "\n"


def _table(lines: Sequence[Line]) -> str:
    first = next((line for line in lines if "hits" in line), lines[0])
    reference = next((line for line in lines if line["peer"] == FLOAT and "hits" in line), None)
    height, width, resize = first["input"]
    title = f"{first['model']}, weights {first['weights']}; {first.get('samples', 0):,} images of {first['data']}"
    title += f", short side {resize}, crop {height}x{width}"
    about = (
        f"pictures: {first['calibration']} of {first['images']}, evenly spread, without labels; none of them is scored"
    )
    return "\n".join([title, about, HEADER, *(_row(line, reference) for line in lines)])


def _row(line: Line, reference: Line | None) -> str:
    peer = PEERS[line["peer"]]
    tool = f"{peer.tool} {line['version'] or ''}".strip() if peer.tool != OURS else peer.tool
    weights = "" if line["peer"] == FLOAT else "per channel" if peer.per_channel else "per tensor"
    seen = "" if line["peer"] == FLOAT else f"{line['calibration']} pictures" if peer.pictures else "none"
    start = f"{tool:<22}{peer.recipe:<46}{weights:<12}{seen:<14}"
    if "reason" in line:
        return f"{start}  {line['reason']}"
    start += f"{line['top1']:>7.2f}"
    if line["peer"] == FLOAT or reference is None:
        return f"{start}{'':>33}  {peer.ran_on}"
    low, high = interval(_unpacked(line), _unpacked(reference))
    change = f"{line['top1'] - reference['top1']:>+8.2f}{f'{low:+.2f} to {high:+.2f}':>18}"
    return f"{start}{change}{line['seconds']:>7.0f}  {peer.ran_on}"


# ------------------------------------------------------------------------------------ command line


def parse_args(arguments: Sequence[str] | None) -> Namespace:
    parser = Parser(prog="python -m benchmarks.peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mobilenet_v2", help="as for main_cls.py")
    parser.add_argument("--weights", help="as for main_cls.py")
    parser.add_argument("--data", metavar="DIR", required=True, help="labelled images to score on, as for main_cls.py")
    parser.add_argument("--images", metavar="DIR", required=True, help="pictures to calibrate with, not of --data")
    parser.add_argument("--calibration", type=at_least(2), default=256, metavar="N", help="of them (default: 256)")
    parser.add_argument("--image_size", type=at_least(1), nargs="+", metavar="PIXELS", help="as for main_cls.py")
    parser.add_argument("--resize", type=at_least(1), metavar="PIXELS", help="as for main_cls.py")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="score on N images, evenly spread")
    parser.add_argument("--batch_size", type=at_least(1), default=20, metavar="N", help="images at once (default: 20)")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="NAME", help="peers by name, such as ort* (default: all)"
    )
    parser.add_argument("--peer", choices=PEERS, metavar="NAME", help="this one, in this process")
    parser.add_argument("--timeout", type=at_least(1), default=3600, metavar="SECONDS", help="of one peer")
    parser.add_argument("--results", type=Path, default=Path("results/peers/peers.jsonl"), metavar="FILE")
    args = parser.parse_args(arguments)
    scored, calibrated = Path(args.data).resolve(), Path(args.images).resolve()
    if scored.is_relative_to(calibrated) or calibrated.is_relative_to(scored):
        parser.error("--images and --data share pictures; pass pictures that are not scored")
    return args


def chosen(patterns: Sequence[str]) -> list[str]:
    """The float network, and the peers whose name any of the shell's patterns fits; a UserError for one that fits none."""
    for pattern in patterns:
        if not fnmatch.filter(PEERS, pattern):
            raise UserError(f"--only {pattern}: there is no such peer; choose from {', '.join(PEERS)}")
    return [name for name in PEERS if name == FLOAT or any(fnmatch.fnmatchcase(name, one) for one in patterns)]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    tune_allocator()
    if args.peer:
        record(args.results, measure(args.peer, args))
        return
    names = chosen(args.only)
    network = build_model(args.model, args.weights)
    shared = setting(network, cli.changed_spec(network.spec, args.image_size, args.resize), args)
    run_all(names, args, list(sys.argv[1:] if arguments is None else arguments), shared)
    text = report(read(args.results))
    with atomic_write(args.results.with_suffix(".txt")) as file:
        file.write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    cli.run(main, "benchmarks.peers")
