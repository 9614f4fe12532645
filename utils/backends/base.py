"""What every engine of utils/backends gives, and where it is found."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, fx, nn

from utils.core.errors import UserError
from utils.quantization.target import Target

if TYPE_CHECKING:
    import onnx

INPUT = "images"  # of a file that this project writes
FLOAT_LAYERS = "float_layers"  # in its metadata: the names of its layers whose weights are not quantized


@dataclass(frozen=True)
class Kernels:
    """What an engine makes of a network.

    engine: its name. integer: the layers with weights that run on integers. floating: the others, and why. operators:
    of the whole optimised graph, how many of each kind.
    """

    engine: str
    integer: list[str]
    floating: dict[str, str]
    operators: dict[str, int]

    def __str__(self) -> str:
        layers = len(self.integer) + len(self.floating)
        lines = [f"  {self.engine} runs {len(self.integer)} of {layers} layers on integers"]
        return "\n".join(lines + [f"  in float {name}: {reason}" for name, reason in self.floating.items()])


class Network(Protocol):
    """An engine in the place of a network: images [N, C, H, W] -> its output, or a tuple of several."""

    def __call__(self, images: Tensor) -> Tensor | tuple[Tensor, ...]: ...

    def tensors(self, images: Tensor) -> dict[str, Tensor]:
        """The file's outputs by name."""


class Engine(Protocol):
    """The module session.py of an engine's folder."""

    def network(self, model: Path | bytes, threads: int | None = None, foreign: bool = False) -> nn.Module:
        """The file, or the serialised model, as a Network.

        threads: None for as many as torch uses. foreign: of a file made for another engine, which is run as it was
        written, without rewriting weights as this engine would by default.
        """

    def find_kernels(self, model: "onnx.ModelProto", simulated: fx.GraphModule) -> Kernels:
        """What the engine makes of the model."""


@dataclass(frozen=True)
class Runs:
    """An engine that can run here. title: its name. packages: what must be installed. module: an Engine."""

    title: str
    packages: tuple[str, ...]
    module: str


ENGINES: Mapping[str, Runs] = {
    "onnxruntime": Runs("ONNX Runtime", ("onnx", "onnxruntime"), "utils.backends.onnxruntime.session"),
    "openvino": Runs("OpenVINO", ("onnx", "openvino"), "utils.backends.openvino.session"),
}


def is_own(engine: str, target: Target) -> bool:
    """Whether the engine is the one that the target's files are made for."""
    return ENGINES[engine].title == target.title


def missing_package(engine: str) -> str | None:
    """The first package that the engine needs and that is not installed."""
    return next((name for name in ENGINES[engine].packages if find_spec(name) is None), None)


def load_engine(name: str) -> Engine:
    """The engine's module; a UserError where its package is not installed."""
    if missing := missing_package(name):
        raise UserError(f"--engine {name} needs the package {missing}; pip install {missing}")
    return import_module(ENGINES[name].module)
