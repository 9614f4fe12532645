"""Networks that are captured once for all runs of a process, and of its forks."""

from collections.abc import Callable

from torch import fx, nn

from utils.core.hashing import weights_hash
from utils.core.input_spec import InputSpec

Capture = Callable[[nn.Module, InputSpec], fx.GraphModule]


def captures_shared(capture: Capture) -> Capture:
    """Runs on the demo's networks, which read a graph and do not edit it, share one of each; others have their own."""
    known: dict[tuple[str, str, InputSpec], fx.GraphModule] = {}

    def captured(model: nn.Module, spec: InputSpec) -> fx.GraphModule:
        if not type(getattr(model, "network", model)).__module__.startswith(("modeling.", "torchvision.models.")):
            return capture(model, spec)
        key = weights_hash(model), str(model), spec
        if key not in known:
            known[key] = capture(model, spec)
        return known[key]

    return captured
