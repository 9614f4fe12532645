"""AdaRound block by block: the rounding of weights is learned so that the network's blocks compute what they did.

Nagel et al., Up or Down? (ICML 2020, arXiv 2004.10568), in the blocks and the order of BRECQ. It starts from weights
that GPTQ rounded and biases that are corrected. A block that comes no nearer to its float one on held-out images
stays as it was, and so does a whole network that comes no nearer on all held-out images together: see is_nearer().
"""

import copy
import hashlib
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from utils.calibration.fidelity import fidelity
from utils.calibration.images import Images
from utils.calibration.observers import BATCH, input_means
from utils.calibration.sensitivity import output_sensitivity
from utils.core import distributed
from utils.core.files import atomic_write, make_folder
from utils.core.hashing import weights_hash
from utils.graph.in_place import run_in_place, without_overwriting
from utils.graph.nodes import module_of, weighted_nodes
from utils.graph.ops import keeps_grid
from utils.passes.block_learning import (
    BlockLearner,
    Handed,
    Reconstruction,
    State,
    Values,
    channel_weights,
    images_in_step,
)
from utils.passes.blocks import Part, find_blocks, most_handed_on, parts_of
from utils.passes.log import PassLog
from utils.passes.quantize_bias import quantize_biases
from utils.passes.result import Quantized
from utils.quantization.placement import is_concat
from utils.quantization.quantizer import Quantizer

ACTION = "learned rounding"
EDITION = 2  # of how a block is learned; blocks that another one left in a folder are learned anew
MEMORY = 6 * 2**30  # bytes that values between blocks may take; where more images would, fewer are used
SAME = 0.5  # dB that decide nothing
SENSITIVITY_IMAGES = 16  # on which the output's sensitivity is measured


def learn_rounding(
    result: Quantized,
    images: Images,
    bits_bias: int | None,
    settings: Reconstruction,
    device: torch.device | None = None,
    folder: Path | None = None,
    others: Tensor | None = None,
) -> Quantized:
    """The network with learned rounding; or as it was, where is_nearer() says that learning did not bring it nearer to float.

    result: a network that is quantized, with its fidelity on the judging images. images: calibration to learn from.
    device: to learn on; None: the CPU. folder: where blocks that are done are kept, so that a run that was stopped goes on
    behind them; None: nowhere. others: [N, C, H, W], dead leaves, where images are distilled: what is learned of images
    that an optimizer made can hold for no others.
    """
    network, simulated = (without_overwriting(one) for one in (result.float, result.simulated))
    besides = [] if others is None else [others]
    before = [result.fidelity.output, *(fidelity(network, simulated, some).output for some in besides)]
    few = images.calibration[:SENSITIVITY_IMAGES]
    known = output_sensitivity(network, few, input_means(network, few)).activations if settings.sensitivity else {}
    log = copy.deepcopy(result.log)
    reconstruct(network, simulated, images, known, settings, log, device, folder)
    _round_biases_again(simulated, bits_bias, log)
    near = fidelity(network, simulated, images.judging)
    after = [near.output, *(fidelity(network, simulated, some).output for some in besides)]
    figures = zip(("held-out images", "dead leaves"), after, before, strict=False)
    told = "; on ".join(f"{kind} {new:.2f} dB, {old:.2f} dB with GPTQ alone" for kind, new, old in figures)
    if not is_nearer([new - old for new, old in zip(after, before, strict=True)]):
        result.log.note(f"learned rounding: on {told}, which is kept")
        return result
    log.note(f"learned rounding: on {told}")
    return replace(result, simulated=run_in_place(simulated), log=log, fidelity=near)


def is_nearer(gains: Sequence[float]) -> bool:
    """Whether a network came nearer to float, by the dB that it gained on each kind of images: on all together, and on none
    further by more than decides nothing."""
    return sum(gains) > 0 and min(gains) >= -SAME


def reconstruct(
    network: fx.GraphModule,
    simulated: fx.GraphModule,
    images: Images,
    sensitivity: Mapping[str, Tensor],
    settings: Reconstruction,
    log: PassLog,
    device: torch.device | None = None,
    folder: Path | None = None,
) -> None:
    """Learn the rounding of all layers of a simulated network, block by block, in place.

    network: the float one. images: calibration to learn from, judging to judge by. sensitivity: by node, [C] as
    Sensitivity.activations holds them. device, folder: as in learn_rounding.
    """
    blocks, names = find_blocks(network), {node.name for node in network.graph.nodes}
    calibration = affordable(images.calibration, most_handed_on(network, blocks), log)
    kept = folder and _Kept(folder, network, simulated, calibration, images.judging, settings)
    device, free = device or torch.device("cpu"), free_quantizers(simulated)
    batch = network.meta["batch"] or min(settings.batch, BATCH)
    exact_parts, parts = (parts_of(one.to(device), blocks, names) for one in (network, simulated))
    learning, judging = (_start(network, some.to(device)) for some in (calibration, images.judging))
    quiet = not distributed.is_main_process()
    with tqdm(total=len(blocks) * settings.iterations, unit="step", disable=quiet) as progress:
        for i, (target, part) in enumerate(zip(exact_parts, parts, strict=True)):
            progress.set_description(f"learning rounding, block {i + 1} of {len(blocks)}")
            weights = channel_weights(sensitivity, target)
            seed = settings.seed * 2**20 + i
            step = batch if network.meta["batch"] else images_in_step(learning, part, settings.crop, batch)
            learner = BlockLearner(target, part, learning, judging, weights, free, step, settings, seed)
            state = kept.read(i) if kept else None
            if state is None:
                state = learner.learn(progress)
                if kept:
                    kept.write(i, state)
            else:
                progress.update(settings.iterations)
            learner.apply(state, simulated)
            _note(blocks[i], state, log)
            for handed in (learning, judging):
                advance(handed.exact, exact_parts, i, batch)
                advance(handed.rounded, parts, i, batch)
    network.cpu()
    simulated.cpu()


def _round_biases_again(simulated: fx.GraphModule, bits: int | None, log: PassLog) -> None:
    """To the steps that the new scales give; the log gets what is new, the biases that now overflow."""
    for node in weighted_nodes(simulated):
        module_of(simulated, node).bias_qparams = None
    again, known = PassLog(), {(entry.action, entry.where) for entry in log.entries if entry.skipped}
    quantize_biases(simulated, bits, again)
    log.entries += [entry for entry in again.entries if entry.skipped and (entry.action, entry.where) not in known]


def _note(layers: list[str], state: State, log: PassLog) -> None:
    where = layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
    if state["gain"] > 0:
        log.applied(ACTION, where, f"{state['gain']:.1f} dB less noise of the block's output on held-out images")
    else:
        log.skipped(ACTION, where, "the block's output on held-out images came no nearer")


def _start(network: fx.GraphModule, images: Tensor) -> Handed:
    entry = next(node.name for node in network.graph.nodes if node.op == "placeholder")
    return Handed({entry: images}, {entry: images})


def advance(values: Values, parts: list[Part], i: int, batch: int) -> None:
    """Run part i on what is handed to it, so many images at a time, and forget what nothing reads any more."""
    part, needed = parts[i], {name for later in parts[i + 1 :] for name in later.inputs}
    read = [values[name].split(batch) for name in part.inputs]
    with torch.no_grad():
        made = [part.graph(*some) for some in zip(*read, strict=True)]
    del read
    for k, name in enumerate(part.outputs):
        if name in needed:
            values[name] = torch.cat([some[k] for some in made])
    for name in [name for name in values if name not in needed]:
        del values[name]


def affordable(images: Tensor, values: int, log: PassLog) -> Tensor:
    """As many of the images as fit into MEMORY. values: that each hands on between blocks at most, in float32."""
    count = max(2, MEMORY // (4 * 4 * max(1, values)))  # of two networks, before and behind a block
    if count < len(images):
        log.note(f"learned rounding: from {count} of {len(images)} images, since more need over {MEMORY >> 30} GiB")
    return images[:count]


def free_quantizers(simulated: fx.GraphModule) -> set[str]:
    """The quantizers whose scale may be learned: those that share it with no other, as the inputs of a concat do."""
    nodes = (node for node in simulated.graph.nodes if isinstance(module_of(simulated, node), Quantizer))
    return {node.target for node in nodes if not _reaches_concat(node)}


def _reaches_concat(node: fx.Node) -> bool:
    return any(is_concat(user) or (keeps_grid(user) and _reaches_concat(user)) for user in node.users)


class _Kept:
    """The blocks that are done, as files in a folder of this run's own."""

    def __init__(
        self,
        folder: Path,
        network: nn.Module,
        simulated: nn.Module,
        learning: Tensor,
        judging: Tensor,
        settings: Reconstruction,
    ):
        grids = [module.qparams for module in simulated.modules() if isinstance(module, Quantizer)]
        digest = hashlib.sha256(
            f"{EDITION} {weights_hash(network)} {weights_hash(simulated)} {grids} {settings}".encode()
        )
        for images in (learning, judging):
            digest.update(images.contiguous().numpy().tobytes())
        self.folder = make_folder(folder / digest.hexdigest()[:16], "$DFQ_CACHE")

    def _file(self, i: int) -> Path:
        return self.folder / f"block{i}.pt"

    def read(self, i: int) -> State | None:
        try:
            return torch.load(self._file(i), weights_only=True) if self._file(i).exists() else None
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, BadZipFile):
            return None  # damaged: the block is learned anew

    def write(self, i: int, state: State) -> None:
        with atomic_write(self._file(i)) as beside:
            torch.save(state, beside)
