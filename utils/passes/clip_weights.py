"""Weight clipping, the baseline of the paper's section 5.1.2: cut what makes a range wide, correct the rest."""

from torch import fx

from utils.graph.nodes import module_of, weighted_nodes
from utils.passes.log import PassLog


def clip_weights(model: fx.GraphModule, limit: float, log: PassLog) -> None:
    """Cut weights of convolutions and linear layers to [-limit, limit]; changes the network's function."""
    for node in weighted_nodes(model):
        weight = module_of(model, node).weight.data
        beyond = int((weight.abs() > limit).sum())
        if beyond:
            weight.clamp_(-limit, limit)
            log.applied("clipped weights", node.target, f"{beyond} of {weight.numel()}")
