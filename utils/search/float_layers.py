"""Layers that stay in float: those whose noise dominates, as few as reach a wanted distance from float."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from utils.calibration.range_rules import MEASURED, Rerun
from utils.graph.in_place import without_overwriting
from utils.graph.nodes import weighted_nodes
from utils.passes.result import Quantized
from utils.quantization.placement import quantizer_before
from utils.quantization.recipe import Recipe
from utils.search.judge import Judge
from utils.search.search import Candidate, Found, line_of

MOST = 0.5  # of the layers, beyond which a network is better left in float as a whole


def layer_noise(quantized: Quantized, images: Tensor) -> dict[str, float]:
    """What the quantization of each layer alone, its weights and its input, adds to the outputs' power, as a share of it.

    images: [N, C, H, W], of which a few are used. The largest first; layers that are in float are not among them.
    """
    rerun = Rerun(quantized.float, images[:MEASURED])
    simulated, shares = without_overwriting(quantized.simulated), {}
    sources = {node.target: quantizer_before(simulated, node.args[0]) for node in weighted_nodes(simulated)}
    with torch.inference_mode():
        for node in weighted_nodes(rerun.model):
            layer, quantizer = simulated.get_submodule(node.target), sources[node.target]
            if layer.weight_qparams is None or quantizer is None:
                continue
            value = layer(quantizer(rerun.values[node.args[0].name]))
            shares[node.target] = rerun.noise(node.name, value)
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def describe_noise(shares: dict[str, float], count: int = 3) -> str:
    """A line on the layers that add most of the noise."""
    total = max(sum(shares.values()), 1e-30)
    most = list(shares.items())[:count]
    return ", ".join(f"{name} {100 * share / total:.0f} %" for name, share in most)


def add_until(
    found: Found,
    shares: dict[str, float],
    wanted: float,
    quantize: Callable[[Recipe], Quantized],
    judge: Judge,
    say: Callable[[str], None],
) -> Found:
    """The recipe that was found with as many of the noisiest layers in float as bring it to the wanted dB, up to MOST of them.

    How many that are is predicted from their shares, tried, and doubled where it was too few. Where none reach it, the
    nearest is taken.
    """
    names, candidates = list(shares), list(found.candidates)
    best, kept = found.chosen, found.quantized
    measured, total = 10 ** (-found.chosen.noise / 10), sum(shares.values())
    left = [measured * (1 - sum(list(shares.values())[: i + 1]) / max(total, 1e-30)) for i in range(len(names))]
    count = next((i + 1 for i, share in enumerate(left) if share <= 10 ** (-wanted / 10)), len(names))
    most = int(MOST * len(names))
    while most and best.noise < wanted:
        recipe = replace(found.chosen.recipe, float_layers=tuple(names[: min(count, most)]))
        quantized = quantize(recipe)
        candidate = Candidate(recipe, judge(quantized))
        candidates.append(candidate)
        say(line_of(candidate))
        if candidate.noise > best.noise:
            best, kept = candidate, quantized
        if count >= most:
            break
        count *= 2
    reached = (
        f"{best.noise:.1f} dB with {len(best.recipe.float_layers)} of {len(names)} layers in float, {wanted:g} wanted"
    )
    ranked = tuple(sorted(candidates, key=lambda one: -one.noise))
    return Found(ranked, best, kept, reached)
