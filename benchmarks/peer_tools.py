"""The quantizers that benchmarks.peers compares: each as its own documentation says to use it, and what it needs.

A peer is a function from a float network and unlabelled pictures to a network that can be scored, and a row of PEERS that
says what the function does. Its package is imported in the function alone. Recipes are the tools' defaults but for what
the row says; none was chosen by a score.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from dfq import Recipe, quantize_data_free
from utils.backends.base import INPUT, load_engine
from utils.backends.lowering import lower_to_integers
from utils.backends.onnx_writer import onnx_model
from utils.backends.onnxruntime.export import build
from utils.calibration.distillation import Distillation, distill, for_judging
from utils.calibration.images import halves
from utils.core.input_spec import InputSpec
from utils.graph.capture import capture
from utils.passes.fold_batchnorm import fold_batchnorm
from utils.passes.log import PassLog

BATCH = 16  # pictures that a tool sees at once
OURS = "this project"


@dataclass(frozen=True)
class Job:
    """What a peer is given: the float network, its input, and unlabelled pictures [N, C, H, W], ready for the network."""

    model: nn.Module
    spec: InputSpec
    pictures: Tensor

    def batches(self, size: int = BATCH) -> list[Tensor]:
        return list(self.pictures.split(size))


@dataclass(frozen=True)
class Peer:
    """A row: what quantizes, how, and with what.

    package: to install, at the version that was measured; None where this project has all. recipe: in the tool's own
    words. per_channel: of the scales of weights. pictures: whether it looks at any. ran_on: what the score is of.
    """

    tool: str
    recipe: str
    per_channel: bool
    pictures: bool
    ran_on: str
    quantize: Callable[[Job], nn.Module]
    package: str | None = None

    @property
    def version(self) -> str | None:
        """Of the package here; None where it is not installed, and where none is needed."""
        try:
            return version(self.package.partition("==")[0]) if self.package else None
        except PackageNotFoundError:
            return None

    @property
    def missing(self) -> str | None:
        """Why it cannot run here, in a line."""
        if self.package is None or self.version:
            return None
        return f"not installed; pip install {self.package}"


# ------------------------------------------------------------------------------------ this project


def ours(job: Job, recipe: Recipe, pictures: bool = False, engine: bool = False) -> nn.Module:
    """The passes of a recipe, in simulation or in ONNX Runtime; images, where it needs any, are distilled in the same time.

    pictures: take the job's in the place of distilled ones, half for ranges and corrections, half to judge by.
    """
    captured = capture(job.model, job.spec)
    if pictures:
        calibration, judging = halves(job.pictures)
    elif recipe.needs_images:
        settings = Distillation()
        calibration, judging = (
            distill(captured, job.spec, one, torch.device("cpu")) for one in (settings, for_judging(settings))
        )
    else:
        calibration = judging = None
    with torch.no_grad():
        made = quantize_data_free(job.model, job.spec, recipe, calibration, captured, judging, real=pictures)
        if engine:
            return load_engine("onnxruntime").network(build(made, job.spec, {}).SerializeToString())
        return lower_to_integers(made.simulated)


# ------------------------------------------------------------------------------------ ONNX Runtime


def float_file(job: Job) -> onnx.ModelProto:
    """The float network as ONNX, with BatchNorm folded and a dynamic batch."""
    with torch.no_grad():
        network = capture(job.model, job.spec)
        fold_batchnorm(network, PassLog())
        return onnx_model(network, job.spec, {})


def reader(batches: list[Tensor]) -> object:
    """The pictures as ONNX Runtime's calibration takes them: all, or the ranges that it asks for."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.set_range(0, len(batches))

        def __len__(self) -> int:
            return len(batches)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = iter(batches[start_index:end_index])

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else {INPUT: batch.numpy()}

    return Reader()


def quantize_static(job: Job, method: str, per_channel: bool) -> nn.Module:
    """onnxruntime.quantization.quantize_static behind quant_pre_process, as its documentation says for x86.

    method: of calibration. Histograms are collected a batch at a time, since it would keep all activations else.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        source, ready, made = (Path(folder) / f"{name}.onnx" for name in ("float", "ready", "made"))
        onnx.save(float_file(job), source)
        quant_pre_process(source, ready)
        quantization.quantize_static(
            ready,
            made,
            reader(job.batches()),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=per_channel,
            calibrate_method=quantization.CalibrationMethod[method],
            extra_options={} if method == "MinMax" else {"CalibStridedMinMax": 1},
        )
        return load_engine("onnxruntime").network(made)


# ------------------------------------------------------------------------------------------- table


def _ours(recipe: Recipe, pictures: bool = False, engine: bool = False) -> Peer:
    ran_on = "ONNX Runtime" if engine else "simulation"
    name = str(recipe).removesuffix(" per channel")
    quantize = partial(ours, recipe=recipe, pictures=pictures, engine=engine)
    return Peer(OURS, name, recipe.per_channel, pictures, ran_on, quantize)


def _static(method: str, per_channel: bool) -> Peer:
    quantize = partial(quantize_static, method=method, per_channel=per_channel)
    return Peer(
        "ONNX Runtime", f"quantize_static, {method}", per_channel, True, "ONNX Runtime", quantize, "onnxruntime==1.32.0"
    )


_LE_BC = Recipe(quantize=True, equalize=True, correction=True)
_LE_DBC_DR = Recipe(quantize=True, equalize=True, correction=True, distill_correction=True, distill_range=True)


def _per_channel(recipe: Recipe) -> Recipe:
    return Recipe(**{**recipe.__dict__, "per_channel": True})


FLOAT = "fp32"
PEERS = {
    FLOAT: Peer("", "FP32", False, False, "PyTorch", lambda job: copy.deepcopy(job.model)),
    "ours": _ours(_LE_BC),
    "ours-engine": _ours(_LE_BC, engine=True),
    "ours-distilled": _ours(_LE_DBC_DR),
    "ours-pictures": _ours(_LE_DBC_DR, pictures=True),
    "ours-channel": _ours(_per_channel(_LE_BC)),
    "ours-pictures-channel": _ours(_per_channel(_LE_DBC_DR), pictures=True),
    "ort-minmax": _static("MinMax", False),
    "ort-minmax-channel": _static("MinMax", True),
    "ort-percentile": _static("Percentile", False),
    "ort-percentile-channel": _static("Percentile", True),
    "ort-entropy": _static("Entropy", False),
    "ort-entropy-channel": _static("Entropy", True),
}
