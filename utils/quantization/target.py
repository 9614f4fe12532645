"""Targets: the engines that a network is quantized for, each as data.

The passes read a target to choose grids and to place quantizers, so that the simulation computes what the engine will;
utils/backends/ writes the file that the engine takes, and runs it where it can. Adding a target is a row of TARGETS.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from utils.core.errors import UserError
from utils.quantization.qparams import may_have_zero_points


@dataclass(frozen=True)
class Target:
    """What an engine computes with.

    title: its name in sentences. signed: activations are int8 with zero point 0; else uint8 with a zero point.
    zero_points: whether weights may have one (--asymmetric). per_channel: weights have a scale for every output channel
    even without --per_channel. integer_biases: biases are int32 in the steps of the accumulator; else float.
    quantizes_summands: a layer's output is quantized before the sum that it feeds; else the engine adds in the layer's
    own kernel, before anything is rounded. weights: how a file may hold them, int8 or uint8, the fastest first. caps: whether a channel's
    upper bound is applied to "integers", to "floats" before they are quantized, or to floats "between" two quantizers. engines: the choices of --engine that
    run its file, the target's own first. bits_weight, bits_activation: those that its integer kernels take; weights of
    fewer than 8 bits are integers of 8 bits there, on fewer levels. bits_first: of the weights of layers that read the
    network's input, at most. far: the share of a layer's values that may be more than a step off, where the engine's
    arithmetic has flaws of its own. rules: the function, as module:name, that refuses a file which breaks the engine's
    rules, where the engine itself is not here to refuse it.
    """

    title: str
    signed: bool
    zero_points: bool
    per_channel: bool
    integer_biases: bool
    quantizes_summands: bool
    weights: tuple[str, ...]
    caps: str
    engines: tuple[str, ...]
    bits_weight: tuple[int, ...] = (8,)
    bits_activation: tuple[int, ...] = (8,)
    bits_first: int = 8
    far: float = 0.0
    rules: str | None = None

    def __str__(self) -> str:
        """Its grids in a line."""
        activations = "int8 activations, zero point 0" if self.signed else "uint8 activations"
        scales = "a scale per output channel of every weight, " if self.per_channel else ""
        biases = "int32 biases" if self.integer_biases else "biases in float"
        sums = "" if self.quantizes_summands else ", layers that feed a sum added in float"
        first = f", {self.bits_first} bits for weights that read the input" if self.bits_first < 8 else ""
        return f"for {self.title}: {activations}, {scales}{biases}{sums}{first}"


DEFAULT = "onnxruntime"

# OpenVINO: without VNNI, x86 adds two products of uint8 and int8 in 16 bits, which saturate. Weights of 7 bits never do;
# its documentation gives them to the first layer, whose weights are large (docs.openvino.ai, "Saturation (overflow) Issue
# Workaround"). --bits_weight 7 gives them to all.
TARGETS: Mapping[str, Target] = {
    DEFAULT: Target(
        title="ONNX Runtime",
        signed=False,
        zero_points=True,
        per_channel=False,
        integer_biases=True,
        quantizes_summands=True,
        weights=("int8", "uint8"),
        caps="between",
        engines=("onnxruntime",),
        bits_weight=(8, 7, 6, 5, 4, 3, 2),
    ),
    "openvino": Target(
        title="OpenVINO",
        signed=False,
        zero_points=False,
        per_channel=False,
        integer_biases=False,
        quantizes_summands=False,
        weights=("int8",),
        caps="integers",
        engines=("openvino", "onnxruntime"),
        bits_weight=(8, 7),
        bits_first=7,
        far=200e-6,
    ),
    "tensorrt": Target(
        title="TensorRT",
        signed=True,
        zero_points=False,
        per_channel=True,
        integer_biases=False,
        quantizes_summands=True,
        weights=("int8",),
        caps="floats",
        engines=("onnxruntime",),
        rules="utils.backends.tensorrt.rules:check_tensorrt",
    ),
}


def target_of(name: str) -> Target:
    """The target by the name that --target gives it."""
    if name not in TARGETS:
        raise UserError(f"argument --target: invalid choice: {name!r} (choose from {', '.join(TARGETS)})")
    return TARGETS[name]


def check_target(settings: Mapping[str, object]) -> None:
    """Refuse settings of a recipe that its target has no kernels for, as a UserError in the flags' words.

    Other bits than those of the default target can be simulated; only what is exported or run must have them.
    """
    name = settings["target"]
    target = target_of(name)
    if settings["asymmetric"] and not target.zero_points:
        raise UserError(f"--target {name} has no weights with zero points; leave out --asymmetric")
    if settings["asymmetric"] and not may_have_zero_points(settings["bits_weight"], settings["per_channel"]):
        raise UserError(
            "--asymmetric with --per_channel is for fewer than 8 bits of weights: of 8 engines compute a zero point for "
            "every channel slowly; leave out --asymmetric, or --per_channel"
        )
    if name == DEFAULT:
        return
    if (lacking := without_kernels(settings)) is not None:
        raise UserError(f"--target {name} has no kernels for {lacking}; leave it out")


def without_kernels(settings: Mapping[str, object]) -> str | None:
    """The first of a recipe's widths that its target has no integer kernels for, and those that it has, in words.

    What has such a width is simulated alone, or written as a program of torch.export. None: all can be exported and run.
    """
    target = target_of(settings["target"])
    weights, activations = set(target.bits_weight), set(target.bits_activation)
    widths = {
        "bits_weight": weights,
        "bits_activation": activations,
        "bits_first_last": weights & activations,  # of these layers' weights and of what they read
        "bits_bias": {32},
    }
    for flag, allowed in widths.items():
        if settings[flag] is not None and settings[flag] not in allowed:
            return f"--{flag} {settings[flag]}, only for {in_words(allowed)}"
    return None


def in_words(bits: Collection[int]) -> str:
    """Widths, as an error says them."""
    low, high = min(bits), max(bits)
    whole_range = high - low + 1 == len(bits) > 2
    return f"{low} to {high}" if whole_range else " or ".join(map(str, sorted(bits, reverse=True)))


def check_weight_type(target: Target, weight_type: str | None) -> None:
    """Refuse what a target's files cannot hold weights as; None, for the fastest that is exact, is always good."""
    if weight_type is not None and weight_type not in target.weights:
        raise UserError(f"files for {target.title} hold weights as {target.weights[0]} alone; leave out --weight_type")


def check_engine(name: str, engine: str) -> None:
    """Refuse an engine that does not run what is made for a target."""
    if engine == "simulate" or engine in target_of(name).engines:
        return
    raise UserError(
        f"--engine {engine} runs what --target {engine} makes, and this is for {name}; pass --target {engine}"
        if engine in TARGETS
        else f"--engine {engine} does not run what --target {name} makes"
    )
