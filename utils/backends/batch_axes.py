"""Which axes of a network's tensors grow with the batch."""

from typing import Any

import torch
from torch import Tensor, fx

from utils.core.input_spec import InputSpec


class BatchAxes:
    """The axes of every tensor that grow with the batch, known from a run on one image and one on two.

    A network that fixes its batch has none.
    """

    def __init__(self, model: fx.GraphModule, spec: InputSpec):
        self.model, self.spec = model, spec
        self._sizes: dict[fx.Node, torch.Size] | None = None

    def of(self, node: fx.Node) -> list[int]:
        """Usually [0]."""
        one = node.meta["tensor_meta"].shape
        return [axis for axis, (a, b) in enumerate(zip(one, self.for_two(node), strict=True)) if a != b]

    def for_two(self, node: fx.Node) -> torch.Size:
        """The node's shape for two images; for as many as it takes where the network fixes that."""
        if self.model.meta.get("batch"):
            return node.meta["tensor_meta"].shape
        if self._sizes is None:
            run = _Sizes(self.model)
            with torch.no_grad():
                run.run(self.spec.probe(2))
            self._sizes = run.sizes
        return self._sizes[node]


class _Sizes(fx.Interpreter):
    """Notes the shape of every tensor."""

    def __init__(self, model: fx.GraphModule):
        super().__init__(model)
        self.sizes: dict[fx.Node, torch.Size] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, Tensor):
            self.sizes[node] = result.shape
        return result
