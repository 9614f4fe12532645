"""--doctor: what stands in the way of a network, in one page, without data and before anything is quantized."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from utils.calibration.moments import Moments, Statistics, propagate
from utils.calibration.range_rules import guessed_tensors
from utils.core import distributed
from utils.core.errors import UserError
from utils.core.files import make_folder
from utils.core.input_spec import InputSpec
from utils.core.networks import plain
from utils.experiment import page
from utils.experiment.command_line import command
from utils.experiment.images import OF_DISTILLED
from utils.experiment.loading import Quantize
from utils.graph.capture import capture
from utils.graph.layers import WEIGHTED, Clip, Elementwise, grouped_weight
from utils.graph.nodes import module_of, returned_nodes, shape, weighted_nodes
from utils.graph.ops import operator_of
from utils.passes.dead_channels import ACTION as CLEARED
from utils.passes.dead_channels import clear_dead_channels
from utils.passes.fold_batchnorm import fold_batchnorm
from utils.passes.insert_quantizers import quantized_tensors
from utils.passes.log import PassLog
from utils.passes.result import Quantized
from utils.quantization.recipe import OF_A_ROW, SETTINGS, Recipe
from utils.quantization.target import without_kernels

if TYPE_CHECKING:
    from utils.experiment.runner import Run

SHOWN = 3  # examples that a line names
FAR = 3.0  # deviations by which the mean that a BatchNorm remembers is off, beyond which it is said
COARSE = 8  # steps from a channel's smallest to its largest weight, under which rounding takes most of what it says

Findings = dict[str, list[str]]  # lines by heading


def examine(run: "Run", quantize: Quantize) -> None:
    """Print the page, and write it where --report says. A network of which nothing can be quantized is a UserError."""
    findings, failure = diagnose(run, quantize)
    if distributed.is_main_process():
        for title, lines in findings.items():
            print(f"{title}\n" + "".join(f"  {line}\n" for line in lines))
        if run.args.report:
            title = f"{run.network.name}: what stands in the way"
            file = page.write_findings(make_folder(run.args.report) / "doctor.html", title, findings)
            print(f"{file} shows it")
    if failure is not None:
        raise failure


def diagnose(run: "Run", quantize: Quantize) -> tuple[Findings, UserError | None]:
    """All that can be said of a network, and why nothing of it can be quantized, where that is so."""
    model = plain(run.network.model)
    captured = capture(model, run.spec)
    findings = {"Network": _network(run, captured)}
    folded, log = capture(captured, run.spec), PassLog()
    statistics = fold_batchnorm(folded, log)
    findings["Captured"] = _operators(folded)
    names = [node.target for node in weighted_nodes(folded)]
    findings["Captured"] += [f"names: {', '.join(names)}"] if run.args.verbose else ["names of layers: with --verbose"]
    findings["Channels"] = _channels(folded, run.spec, statistics)
    findings["BatchNorm"] = _statistics(folded, run.spec, statistics)
    try:
        noise = run.spec.probe(2)  # for pictures, so that none are distilled: no range that follows from it is shown
        recipe = Recipe(quantize=True, **{name: getattr(run.args, name) for name in SETTINGS if name not in OF_A_ROW})
        quantized = quantize(model, run.spec, recipe, images=noise, captured=captured, real=True)
    except UserError as error:
        findings["Next"] = [f"nothing can be quantized as it is: {error}"]
        return findings, error
    try:
        findings["On integers"], written = _engine(run, recipe, quantized), True
    except UserError as error:
        findings["On integers"], written = [f"no file of it: {error}"], False
    findings["Next"] = _next(run, captured.meta["batch"], bool(statistics), findings["BatchNorm"], written)
    return findings, None


def _network(run: "Run", captured: fx.GraphModule) -> list[str]:
    count = sum(parameter.numel() for parameter in run.network.model.parameters())
    sides = " x ".join(map(str, run.spec.shape()[1:]))
    batch = captured.meta["batch"]
    outputs = [tuple(shape(node)) for node in returned_nodes(captured)]
    shown = ", ".join(" x ".join(map(str, ("N", *size[1:]))) for size in outputs)
    return [
        f"{run.network.name}, weights {run.network.weights}: {count:,} parameters, {4 * count / 1e6:.2f} MB in float32",
        f"input {sides}, " + ("any batch" if batch is None else f"{batch} image(s) at a time, as its code fixes it"),
        f"{len(outputs)} output{'s' if len(outputs) > 1 else ''}: {shown}",
    ]


def _operators(model: fx.GraphModule) -> list[str]:
    """What the network is made of, BatchNorm folded, and what the operator table lacks."""
    layers, activations, functions, unknown = Counter(), Counter(), Counter(), []
    for node in model.graph.nodes:
        module = module_of(model, node)
        if isinstance(module, WEIGHTED):
            layers[type(module).__name__] += 1
        elif isinstance(module, Clip):
            activations[_clip_name(module)] += 1
        elif isinstance(module, Elementwise):
            activations[module.kind] += 1
        elif node.op == "call_function" and "tensor_meta" in node.meta:
            row = operator_of(node)
            name = str(node.target).split(".")[1] if "." in str(node.target) else node.target.__name__
            functions[name] += 1
            if row is not None and row.onnx is None:
                unknown.append(node.name)
    lines = [
        f"layers: {_counted(layers)}",
        f"activations: {_counted(activations)}",
        f"functions: {_counted(functions)}",
    ]
    if unknown:
        lines.append(f"written by torch.onnx, and in float: {_named(unknown)}")
    return lines


def _clip_name(clip: Clip) -> str:
    """ReLU, ReLU6, or clip where bounds differ or are others."""
    if not clip.rectifies or (clip.capped and bool((clip.high != clip.high.flatten()[0]).any())):
        return "clip"
    return f"ReLU{float(clip.high.flatten()[0]):g}" if clip.capped else "ReLU"


def _channels(model: fx.GraphModule, spec: InputSpec, statistics: Statistics) -> list[str]:
    """Dead channels, and how unevenly channels share their tensor's steps."""
    log = PassLog()
    cleared = capture(model, spec)
    if statistics:
        clear_dead_channels(cleared, spec, statistics, log)
    dead = [entry for entry in log.entries if entry.action == CLEARED and not entry.skipped]
    lines = (
        [f"dead: weights that read constant channels in {len(dead)} places ({_named([one.where for one in dead])})"]
        if dead
        else ["dead: none"]
    )
    shares = {node.target: coarse_share(module_of(cleared, node)) for node in weighted_nodes(cleared)}
    worst = sorted(shares, key=lambda name: -shares[name])[:SHOWN]
    mean = sum(shares.values()) / max(1, len(shares))
    lines.append(
        f"spread: {100 * mean:.0f} % of channels have a range under {COARSE} of 256 steps at one scale per tensor; most in "
        + ", ".join(f"{name} {100 * shares[name]:.0f} %" for name in worst)
    )
    if mean > 0.05:
        lines.append("uneven: --equalize, or --per_channel, matters for this network")
    return lines


def coarse_share(layer: torch.nn.Module) -> float:
    """The share of a layer's output channels whose weights are within so few of the tensor's steps that rounding spoils them."""
    view = grouped_weight(layer).abs()
    reach = view.amax((2, 3)).flatten()
    alive = reach > 0
    coarse = alive & (2 * 127 * reach / reach.max().clamp_min(1e-30) < COARSE)
    return float(coarse.sum() / alive.sum().clamp_min(1))


def _statistics(model: fx.GraphModule, spec: InputSpec, statistics: Statistics) -> list[str]:
    """What BatchNorm tells of, what it does not, and what the network contradicts."""
    layers = weighted_nodes(model)
    lines = [f"statistics: of {sum(node.target in statistics for node in layers)} of {len(layers)} layers"]
    guesses = guessed_tensors(model, statistics)
    names = {node.name: guesses[node.name] for node in quantized_tensors(model) if node.name in guesses}
    if names:
        lines.append(
            f"without: {len(names)} tensors that are quantized are behind layers that no BatchNorm tells of, up to "
            f"{max(names.values())} in a row ({_named(list(names))}); their ranges need images, best your own: --images DIR"
        )
    off = contradictions(model, spec, statistics)
    far = {name: value for name, value in off.items() if value > FAR}
    if far:
        worst = sorted(far, key=lambda name: -far[name])[:SHOWN]
        lines.append(
            f"contradicted: the means of {len(far)} layers are over {FAR:g} standard deviations from what the layers before make of them "
            f"({', '.join(f'{name} {far[name]:.3g}' for name in worst)}): statistics of another state of the weights; "
            "prefer ranges and corrections from images (--auto finds out)"
        )
    elif off:
        lines.append(
            f"consistent: means within {max(off.values()):.2g} standard deviations of what the layers before make of them"
        )
    return lines


def contradictions(model: fx.GraphModule, spec: InputSpec, statistics: Statistics) -> dict[str, float]:
    """By layer, how far its BatchNorm's means are from those that follow from its input's, in deviations: the median channel's.

    model: with BatchNorm folded. The mean of a layer's output is what the layer makes of its input's mean.
    """
    moments, off = propagate(model, spec, statistics), {}
    with torch.no_grad():
        for node in weighted_nodes(model):
            known, source = statistics.get(node.target), moments.get(node.args[0].name)
            if known is None or not isinstance(source, Moments):
                continue
            layer = module_of(model, node)
            axis = len(shape(node)) - 1 if isinstance(layer, torch.nn.Linear) else 1
            mean = layer(source.mean.contiguous()).transpose(0, axis).flatten(1).mean(1)
            off[node.target] = float(_deviations(mean, known.mean, known.variance).median())
    return off


def _deviations(found: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    alive = variance > 1e-8 * variance.max().clamp_min(1e-30)
    return ((found - mean).abs() / variance.sqrt().clamp_min(1e-15))[alive] if bool(alive.any()) else torch.zeros(1)


def _engine(run: "Run", recipe: Recipe, quantized: Quantized) -> list[str]:
    """What the engine at hand makes of the target's file, and how large that is."""
    from utils.backends.onnxruntime.export import about_widths, build, checking_engine, describe_kernels

    target = f"target: {str(recipe.engine).removeprefix('for ')}"
    if (lacking := without_kernels(recipe.settings)) is not None:
        return [target, f"simulated alone: it has no kernels for {lacking}"]
    model = build(quantized, run.spec, {}, run.args.opset, recipe.engine, run.args.weight_type)
    size = f"file: {len(model.SerializeToString()) / 1e6:.2f} MB, ONNX opset {model.opset_import[0].version}"
    size = "; ".join([size, *about_widths(model, quantized)])
    engine, notes = checking_engine(recipe.engine)
    if engine != recipe.target:
        layers = [module_of(quantized.simulated, node) for node in weighted_nodes(quantized.simulated)]
        count = sum(layer.weight_qparams is not None for layer in layers)
        weights = f"{count} of {len(layers)} layers have integer weights and inputs; {recipe.engine.title} is not here to say which kernels it takes"
        return [target, weights, *notes, size]
    kernels = describe_kernels(model, quantized, engine)
    lines = [target, *str(kernels).replace("  ", "").splitlines()]
    lines += [
        f"not quantized: {reason}"
        for action in ("quantized weights", "inserted quantizers")
        for reason in quantized.log.reasons(action)
    ]
    floating = {kind: count for kind, count in kernels.operators.items() if not _on_integers(kind)}
    if floating:
        lines.append(f"other operators in float: {_counted(floating)}")
    return [*lines, size]


def _on_integers(kind: str) -> bool:
    """Whether an operator of the engine's graph computes on integers, or moves or converts values."""
    return kind.startswith(("QLinear", "Q", "Dequantize", "Dynamic")) or kind in (
        *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Slice", "Split", "Pad", "MaxPool"),
        *("Identity", "Shape", "Gather", "Cast", "Constant", "Expand", "Min", "ReorderInput", "ReorderOutput"),
    )


def _next(run: "Run", batch: int | None, known: bool, found: Sequence[str], written: bool) -> list[str]:
    """The command to type, and what it may lack.

    batch: that the network fixes. known: whether BatchNorm tells of anything; found: what was said of it. written: whether
    there can be a file of it.
    """
    file = f"{run.network.name.replace(':', '_').replace('/', '_')}-int8"
    export = written and not without_kernels(vars(run.args))
    words = ["--auto", *(["--export", f"{file}.onnx"] if export else ["--save", f"{file}.dfq"])]
    idle = [] if export else ["--opset", "--weight_type"]
    if run.args.data and batch not in (None, run.args.batch_size):
        words += ["--batch_size", str(batch)]
        idle.append("--batch_size")
    if not known and not run.args.images:
        idle += [f"--{name}" for name in OF_DISTILLED]
        return [
            command(run.task.program, run.argv, [*words, "--images", "DIR"], without=idle),
            "DIR is a folder of 8 or more unlabelled pictures: no BatchNorm tells of any range",
        ]
    lines = [command(run.task.program, run.argv, words, without=idle)]
    if not run.args.images and any(line.startswith(("without:", "contradicted:")) for line in found):
        lines.append("add --images DIR, a folder of 8 or more unlabelled pictures: some ranges are guesses without")
    return lines


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1])) or "none"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
