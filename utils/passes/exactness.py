"""Self-checks: passes that should leave the network's output as it is are held to that on a probe batch."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.passes.log import PassLog

TOLERANCE = 1e-3  # by how much of its largest value an exact pass may move an output; float32 alone moves some by 1e-4


@dataclass(frozen=True)
class Reference:
    """What the network must go on to compute.

    probe: images [N, C, H, W]. outputs: what it gave on them. loaded: the network before any pass.
    """

    probe: Tensor
    outputs: list[Tensor]
    loaded: nn.Module


def probed_outputs(model: nn.Module, probe: Tensor) -> list[Tensor]:
    """The tensors that the network returns on the probe, in whatever structure; in float32 also where it asks for autocast."""
    with torch.no_grad(), _WithoutAutocast():
        return [leaf for leaf in tree_leaves(model(probe)) if isinstance(leaf, Tensor)]


class _WithoutAutocast(TorchFunctionMode):
    """Whatever runs within computes in the types of its operands."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def deviation(expected: list[Tensor], model: nn.Module, probe: Tensor) -> float:
    """The largest change of any value on the probe, as a share of the largest value of its output."""
    pairs = zip(expected, probed_outputs(model, probe), strict=True)
    return max(float((before - after).abs().max() / before.abs().max().clamp_min(1e-30)) for before, after in pairs)


def note_change(name: str, expected: list[Tensor], model: nn.Module, probe: Tensor, log: PassLog) -> None:
    """Say by how much a pass that is not exact moved the output on the probe."""
    log.note(f"{name} moved the output by {deviation(expected, model, probe):.1e} of its largest value")


def check_capture(model: nn.Module, network: fx.GraphModule, spec: InputSpec, probe: Tensor, log: PassLog) -> Reference:
    """Hold a captured network to the one as loaded, on the probe and on a batch of another size."""
    _check_finite(network)
    reference = Reference(probe, probed_outputs(model, probe), model)
    check_unchanged("capture", network, reference, log)
    if network.meta["batch"] is None:
        other = spec.probe(3, seed=1)
        check_unchanged("capture", network, Reference(other, probed_outputs(model, other), model), log)
        _warn_of_neighbours(reference, log)
    else:
        log.note(
            f"the network fixes its batch: it is captured, and runs, with {network.meta['batch']} image(s) at a time"
        )
    return reference


def _check_finite(network: fx.GraphModule) -> None:
    """Refuse weights and statistics that are no numbers: nothing of their layer could be quantized."""
    for name, module in network.named_modules():
        held = dict(module.named_parameters(recurse=False))
        if isinstance(module, _BatchNorm):
            held |= {key: value for key, value in module.named_buffers(recurse=False) if value.is_floating_point()}
        for key, value in held.items():
            if not value.isfinite().all():
                raise UserError(
                    f"{name}.{key} holds values that are no finite numbers; train or load the network anew, quantization cannot mend it"
                )


def _warn_of_neighbours(reference: Reference, log: PassLog) -> None:
    """Say where what the network gives for an image depends on the images beside it."""
    images = len(reference.probe)
    if not all(output.dim() and len(output) == images for output in reference.outputs):
        return
    moved = deviation([output[:1] for output in reference.outputs], reference.loaded, reference.probe[:1])
    if moved > TOLERANCE:
        log.warn(
            f"an image's output depends on the others in its batch (it moves by {moved:.1e} of its largest value when they "
            "are left out), as behind a BatchNorm without running statistics; scores hold for the batch size they were measured with"
        )


def check_unchanged(name: str, model: nn.Module, reference: Reference, log: PassLog) -> None:
    """Refuse a pass that should be exact and moved the output by more than TOLERANCE.

    Some networks amplify float32's own rounding to more than that, where statistics of no variance
    multiply it layer after layer; they are allowed ten times what the loaded network shows of it.
    """
    moved = deviation(reference.outputs, model, reference.probe)
    if moved <= TOLERANCE:
        return
    noise = rounding_noise(reference.loaded, reference.probe)
    if moved <= 10 * noise:
        log.note(
            f"{name} moved the output by {moved:.1e} of its largest value; "
            f"float32's rounding alone moves it by {noise:.1e}"
        )
        return
    raise UserError(
        f"{name} should leave the network's output as it is, but moved it by {moved:.1e} of its largest value "
        f"(tolerance {TOLERANCE:.0e}): this network is not handled rightly, and nothing was recorded"
    )


def rounding_noise(model: nn.Module, probe: Tensor) -> float:
    """How far the network's output in float32 is from that in float64, as a share of its largest value.

    0 where it is written for one of them alone.
    """
    try:
        exact = [output.float() for output in probed_outputs(copy.deepcopy(model).double(), probe.double())]
    except RuntimeError:  # it converts to float32 on the way
        return 0.0
    return deviation(exact, model, probe)
