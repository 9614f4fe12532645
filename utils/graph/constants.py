"""Control flow on what does not depend on the images: flags kept in buffers, checks of means and deviations.

torch.export runs a network on tensors without values, parameters included, and refuses whatever asks for one. Here
what follows from parameters, buffers and numbers alone is computed beside it, so that these questions have an answer.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

_ASKS = {"__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "equal", "allclose", "is_nonzero"}
_MASKS = {"__imul__", "mul_", "masked_fill_", "clamp_", "zero_", "fill_", "copy_", "__iand__", "relu_", "abs_"}
_RANDOM = ("rand", "normal", "bernoulli", "multinomial", "poisson", "dropout", "empty")


class KnownConstants(TorchFunctionMode):
    """Within it, what is asked of a constant is answered from its values.

    network: as torch.export runs it. tensors: its parameters and buffers by name, with values.
    """

    def __init__(self, network: nn.Module, tensors: dict[str, Tensor]):
        super().__init__()
        self.values: dict[int, Tensor] = {}  # by the identity of the tensor without values
        self.kept: list[Tensor] = []  # so that no identity is given twice
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if name in tensors:
                self.values[id(tensor)] = tensors[name]
        self.given = set(self.values)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch._C._set_grad_enabled:  # by which torch.export cuts its graph in parts, in quadratic time
            return None
        if func == torch.Tensor.data.__get__:  # which is no operator, and so in no graph
            func = torch.Tensor.detach
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], self._positions(args[1]), *args[2:])
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        written = tensors[:1] if _writes(name) else []
        known = all(id(tensor) in self.values for tensor in tensors) and not any(word in name for word in _RANDOM)
        known &= not any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in leaves)
        if known and tensors and name in _ASKS:
            return self._computed(func, args, kwargs)
        if known and self._settles(func, name, tensors, args, kwargs):
            return written[0] if written else None
        result = func(*args, **kwargs)
        if written and (not known or id(written[0]) in self.given):  # the network's own stay as they are
            self._forget(written[0])
        elif known:
            self._note(result, self._computed(func, args, kwargs))
        return result

    def _settles(self, func: Any, name: str, tensors: list[Tensor], args: tuple, kwargs: dict) -> bool:
        """Whether a call writes into one of the network's own what the next call would leave: a mask, into weight.data.

        Such a one is written once, where the values are, and is no part of the graph.
        """
        with _disable_current_modes():
            if func == torch.Tensor.data.__set__ and len(tensors) == 2 and id(tensors[0]) in self.given:
                self.values[id(tensors[0])].copy_(self.values[id(tensors[1])])
                return True
            if name not in _MASKS or not tensors or not self._is_own(self.values[id(tensors[0])]):
                return False
            own = self.values[id(tensors[0])]
            before = own.clone()
            once = self._computed(func, args, kwargs).clone()
            if torch.equal(once, self._computed(func, args, kwargs)):
                return True
            own.copy_(before)
            return False

    def _is_own(self, value: Tensor) -> bool:
        """Whether a value is memory of the network's parameters and buffers."""
        memory = value.untyped_storage().data_ptr()
        return any(self.values[key].untyped_storage().data_ptr() == memory for key in self.given if key in self.values)

    def _positions(self, index: Any) -> Any:
        """An index with the positions that a known mask picks in its place, as how many those are is not known without values."""
        positions = []
        for part in index if isinstance(index, tuple) else (index,):
            known = self.values.get(id(part)) if isinstance(part, Tensor) and part.dtype == torch.bool else None
            if known is None or not known.dim():
                positions.append(part)
                continue
            with _disable_current_modes():
                positions += [axis.tolist() for axis in known.nonzero(as_tuple=True)]
        return tuple(positions) if isinstance(index, tuple) or len(positions) > 1 else positions[0]

    def _note(self, result: Any, computed: Any) -> None:
        """What a call gave without values, and with them."""
        pairs = zip(tree_leaves(result), tree_leaves(computed), strict=True)
        for tensor, value in ((tensor, value) for tensor, value in pairs if isinstance(tensor, Tensor)):
            self.values[id(tensor)] = value
            self.kept.append(tensor)

    def _forget(self, tensor: Tensor) -> None:
        """A constant into which something else is written, and all that shares its memory."""
        value = self.values.get(id(tensor))
        if value is not None:
            memory = value.untyped_storage().data_ptr()
            self.values = {k: v for k, v in self.values.items() if v.untyped_storage().data_ptr() != memory}

    def _computed(self, func: Any, args: tuple, kwargs: dict) -> Any:
        args, kwargs = tree_map(
            lambda leaf: self.values[id(leaf)] if isinstance(leaf, Tensor) else leaf, (args, kwargs)
        )
        with _disable_current_modes():  # and no gradient, as in all of capture()
            return func(*args, **kwargs)


def _writes(name: str) -> bool:
    in_place = name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}")  # __iadd__, of __add__
    return name in ("__setitem__", "set_") or in_place or (name.endswith("_") and not name.endswith("__"))
