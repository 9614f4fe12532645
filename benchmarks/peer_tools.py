"""The quantizers that benchmarks.peers compares: each as its own documentation says to use it, and what it needs.

A peer is a function from a float network and unlabelled pictures to a network that can be scored, and a row of PEERS that
says what the function does. Its package is imported in the function alone. Recipes are the tools' defaults but for what
the row says; none was chosen by a score.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
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


# ---------------------------------------------------------------------- NNCF, Brevitas, MCT, AIMET


def nncf_quantize(job: Job, per_channel: bool) -> nn.Module:
    """nncf.quantize on the network as ONNX: its defaults, fast bias correction among them.

    On PyTorch's network it would have to compile an extension first.
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

    scales = AdvancedQuantizationParameters(weights_quantization_params=QuantizationParameters(per_channel=per_channel))
    made = nncf.quantize(
        float_file(job),
        nncf.Dataset(job.batches(1), lambda picture: {INPUT: picture.numpy()}),
        subset_size=len(job.pictures),
        advanced_parameters=scales,
    )
    return load_engine("onnxruntime").network(made.SerializeToString())


def brevitas_ptq(job: Job, per_channel: bool) -> nn.Module:
    """Brevitas' own post-training script for ImageNet with its defaults: ReLU6 to ReLU, 20 equalizations, bias correction."""
    from brevitas.graph.quantize import preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq.ptq_common import (
        apply_bias_correction,
        calibrate,
        quantize_model,
    )

    loader = [(batch, None) for batch in job.batches()]
    with torch.no_grad():
        model = preprocess_for_quantize(copy.deepcopy(job.model), equalize_iters=20, equalize_merge_bias=True)
        model = quantize_model(
            model,
            backend="fx",
            weight_bit_width=8,
            act_bit_width=8,
            bias_bit_width=32,
            weight_quant_granularity="per_channel" if per_channel else "per_tensor",
            act_quant_percentile=99.999,
            act_quant_type="sym",
            scale_factor_type="float_scale",
            quant_format="int",
        )
        calibrate(loader, model)
        apply_bias_correction(loader, model)
    return model.eval()


def mct_ptq(job: Job, device: str) -> nn.Module:
    """Model Compression Toolkit's pytorch_post_training_quantization with its defaults for a device."""
    import model_compression_toolkit as mct

    def representative() -> Iterator[list[Tensor]]:
        yield from ([batch] for batch in job.batches())

    made, _ = mct.ptq.pytorch_post_training_quantization(
        copy.deepcopy(job.model),
        representative,
        target_platform_capabilities=mct.get_target_platform_capabilities(device_type=device),
    )
    return made


def aimet_sim(job: Job, per_channel: bool, equalize: bool) -> nn.Module:
    """AIMET's QuantizationSimModel with its default scheme and configuration, on the network that AIMET prepares.

    equalize: first ReLU6 to ReLU, as AIMET asks for, and its cross-layer equalization; else BatchNorm folding alone.
    """
    import aimet_torch
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.cross_layer_equalization import equalize_model
    from aimet_torch.model_preparer import prepare_model

    one = job.pictures[:1]
    model = prepare_model(copy.deepcopy(job.model)).eval()
    if equalize:
        for name in [name for name, module in model.named_modules() if isinstance(module, nn.ReLU6)]:
            model.set_submodule(name, nn.ReLU())
        equalize_model(model, dummy_input=one)
    else:
        fold_all_batch_norms(model, tuple(one.shape), dummy_input=one)
    name = "default_config_per_channel.json" if per_channel else "default_config.json"
    config = Path(aimet_torch.__path__[0]) / "common" / "quantsim_config" / name
    sim = aimet_torch.QuantizationSimModel(model, one, config_file=str(config))
    with torch.no_grad():
        sim.compute_encodings(lambda network: [network(batch) for batch in job.batches()])
    return sim.model.eval()


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


def _nncf(per_channel: bool) -> Peer:
    quantize = partial(nncf_quantize, per_channel=per_channel)
    return Peer("NNCF", "quantize, fast bias correction", per_channel, True, "ONNX Runtime", quantize, "nncf==3.4.0")


def _brevitas(per_channel: bool) -> Peer:
    quantize = partial(brevitas_ptq, per_channel=per_channel)
    recipe = "ptq_evaluate: ReLU, equalization, bias corr."
    return Peer("Brevitas", recipe, per_channel, True, "its simulation", quantize, "brevitas==0.13.4")


def _mct(device: str, per_channel: bool) -> Peer:
    quantize = partial(mct_ptq, device=device)
    package = "model-compression-toolkit==2.6.1"
    return Peer("MCT", f"pytorch_post_training, {device}", per_channel, True, "its simulation", quantize, package)


def _aimet(per_channel: bool, equalize: bool) -> Peer:
    quantize = partial(aimet_sim, per_channel=per_channel, equalize=equalize)
    recipe = "ReLU, equalize_model, QuantSim" if equalize else "fold_all_batch_norms, QuantSim"
    return Peer("AIMET", recipe, per_channel, True, "its simulation", quantize, "aimet-torch==2.42.0")


_LE_BC = Recipe(quantize=True, equalize=True, correction=True)
_LE_BC_DR = Recipe(quantize=True, equalize=True, correction=True, distill_range=True)


def _per_channel(recipe: Recipe) -> Recipe:
    return Recipe(**{**recipe.__dict__, "per_channel": True})


FLOAT = "fp32"
PEERS = {
    FLOAT: Peer("", "FP32", False, False, "PyTorch", lambda job: copy.deepcopy(job.model)),
    "ours": _ours(_LE_BC),
    "ours-engine": _ours(_LE_BC, engine=True),
    "ours-distilled": _ours(_LE_BC_DR),
    "ours-pictures": _ours(_LE_BC_DR, pictures=True),
    "ours-channel": _ours(_per_channel(_LE_BC)),
    "ours-pictures-channel": _ours(_per_channel(_LE_BC_DR), pictures=True),
    "ort-minmax": _static("MinMax", False),
    "ort-minmax-channel": _static("MinMax", True),
    "ort-percentile": _static("Percentile", False),
    "ort-percentile-channel": _static("Percentile", True),
    "ort-entropy": _static("Entropy", False),
    "ort-entropy-channel": _static("Entropy", True),
    "nncf": _nncf(False),
    "nncf-channel": _nncf(True),
    "brevitas": _brevitas(False),
    "brevitas-channel": _brevitas(True),
    "mct": _mct("qnnpack", False),
    "mct-channel": _mct("tflite", True),
    "mct-imx500": _mct("imx500", True),
    "aimet": _aimet(False, False),
    "aimet-channel": _aimet(True, False),
    "aimet-cle": _aimet(False, True),
    "aimet-cle-channel": _aimet(True, True),
}
