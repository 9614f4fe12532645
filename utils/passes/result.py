"""What the passes make of a network."""

from dataclasses import dataclass

from torch import fx

from utils.calibration.fidelity import Fidelity
from utils.passes.log import PassLog


@dataclass(frozen=True)
class Quantized:
    """A row's networks.

    float: the row's own float network, after --relu and the exact passes. simulated: the quantized network in
    simulation, its parameters at its layers and quantizers; None without --quantize. log: what the passes did.
    fidelity: how near the two are on distilled images, where there were any.
    """

    float: fx.GraphModule
    simulated: fx.GraphModule | None
    log: PassLog
    fidelity: Fidelity | None = None
