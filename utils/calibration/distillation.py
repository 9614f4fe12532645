"""Images made from BatchNorm statistics alone, to stand in for data that nobody may look at.

ZeroQ (Cai et al., CVPR 2020, arXiv 2001.00281): optimise pixels until what every BatchNorm reads has the
mean and deviation that it remembers of the training data. Here they start as noise with the spectrum and
the colours of photographs, stay within what a pixel can be, and come out as whole pixel values. Statistics alone show
no object, and leave late layers far from what they reach on photographs: so every image also shows classes,
as DeepInversion's do (Yin et al., CVPR 2020, arXiv 1912.08795), each more or less clearly.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from tqdm import tqdm

from utils.calibration.images import Images
from utils.calibration.observers import joined
from utils.calibration.rendered import dead_leaves, natural_noise
from utils.core import distributed
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.core.networks import to_fast_format
from utils.core.predictions import class_axis, first_output
from utils.graph.capture import capture

REGIONS = 4  # along a side of a map of logits, each of one class


@dataclass(frozen=True)
class Distillation:
    """images: how many to make. batch: how many share their statistics. steps: of Adam, for each batch.

    rate: Adam's first step in normalised pixels, which falls to zero along a cosine.
    start: what is rendered first, "natural" noise, "leaves" (see utils.calibration.rendered) or "white" noise; with no
    steps that is all, with steps they stay every second image; from_leaves() has the other settings that serve them.
    shift: by how many places strided convolutions read their maps shifted, at random at every step.
    The others are what benchmarks/distillation.py compares.
    robust: count a layer's error by its logarithm. jitter: shift and mirror the images anew at every step.
    evidence: weight of the classes that images are to show, beside the statistics. margin: how sure of its class the
    network should be of the image that shows it most clearly, in nats; of the others evenly less.
    """

    images: int = 64
    batch: int = 16
    steps: int = 40
    seed: int = 0
    rate: float = 0.1
    start: str = "natural"
    shift: int = 0
    robust: bool = True
    jitter: bool = False
    evidence: float = 0.05
    margin: float = 10.0


def few_images(spec: InputSpec) -> Distillation:
    """A few images in little time, for ranges that nothing else tells of; together as many as 16 of 224 pixels a side."""
    height, width = spec.size
    return Distillation(images=16, batch=max(1, min(16, 16 * 224 * 224 // (height * width))), steps=20)


# By captured network and its input: every row of a table would make them anew.
_FEW: WeakKeyDictionary[fx.GraphModule, dict[InputSpec, Tensor]] = WeakKeyDictionary()


def distill_few(network: fx.GraphModule, spec: InputSpec) -> Tensor:
    """The images of few_images(), made once for a captured network, which is not edited between."""
    known = _FEW.setdefault(network, {})
    if spec not in known:
        known[spec] = distill(network, spec, few_images(spec), torch.device("cpu"))
    return known[spec]


LEAVES = 32  # dead leaves at least, where a run would distil fewer
LEAVES_STEPS = 150  # that half of them take, for rounding to be learned from
LEAST_LEAVES, LEAVES_SEED = 8, 2**60  # of those to judge by: beyond every seed of images to calibrate on
LEAVES_FIT = 1 / 3  # of the loss; 0.10 to 0.18 on nine sound networks, 1.6 where statistics are contradicted


def from_leaves(settings: Distillation, steps: int) -> Distillation:
    """The same with dead leaves, and how half of them are distilled: by the statistics alone, as they show shapes already."""
    return replace(settings, start="leaves", steps=steps, shift=1, evidence=0.0)


@torch.no_grad()
def for_few_bits(network: fx.GraphModule, spec: InputSpec, settings: Distillation, learned: bool) -> Distillation:
    """Dead leaves, if the network's statistics take them for photographs; else the settings as they were.

    On what such a network knows, weights of few bits are rounded better than on images distilled from noise. learned:
    rounding is learned from them, for which half of them are distilled (results/rounding.txt).
    """
    few = from_leaves(replace(settings, images=min(settings.images, settings.batch)), 0)
    errors, _ = _run(network, spec, distill(network, spec, few, torch.device("cpu")))
    errors.pop("input")
    known = float(statistics_loss(errors)) < LEAVES_FIT
    return from_leaves(settings, LEAVES_STEPS if learned else 0) if known else settings


def for_judging(settings: Distillation) -> Distillation:
    """Images to judge results by: of another seed, a quarter as many, and distilled from noise even where others are not."""
    noise = settings if settings.start == Distillation.start else Distillation(batch=settings.batch)
    steps = noise.steps or Distillation.steps
    return replace(noise, images=max(2, settings.images // 4), seed=settings.seed + 1, steps=steps)


def leaves_to_judge(spec: InputSpec, count: int) -> Tensor:
    """Dead leaves [N, C, H, W] that no distilling touched, a multiple of count of them, and eight at least."""
    generator = torch.Generator().manual_seed(LEAVES_SEED)
    return as_pixels(dead_leaves(spec, count * math.ceil(LEAST_LEAVES / count), generator), spec)


def for_search(settings: Distillation) -> tuple[Distillation, Distillation, Distillation]:
    """Images to calibrate on, those by which recipes choose, both as in any run, and others to judge recipes by."""
    own = for_judging(settings)
    return settings, own, replace(own, seed=own.seed + 1)


def search_images(calibration: Tensor, own: Tensor, others: Tensor) -> Images:
    """The images that for_search asks for; those to judge by in turn, as utils.search.auto.unseen takes them apart."""
    return Images(calibration, torch.stack([own, others], 1).flatten(0, 1))


@dataclass(frozen=True)
class Fit:
    """How far a layer's statistics on images are from what it should see, in its deviations: root mean square
    over channels of the means' and the deviations' errors."""

    mean: float
    deviation: float

    @property
    def total(self) -> float:
        return math.hypot(self.mean, self.deviation)


# ----------------------------------------------------------------------------------- arithmetic


class ChannelMoments(torch.autograd.Function):
    """Mean and variance [C] of x [N, C, ...], reading x once in either direction."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        count = x.numel() // x.shape[1]
        mean = x.mean(axes)
        variance = (torch.linalg.vector_norm(x, dim=axes).square() / count - mean.square()).clamp_min(0)
        ctx.save_for_backward(x, mean)
        ctx.count = count
        return mean, variance

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        slope = 2 * grad_variance / ctx.count
        offset = grad_mean / ctx.count - slope * mean
        view = (-1, *[1] * (x.dim() - 2))
        return torch.addcmul(offset.view(view), x, slope.view(view))


def squared_errors(x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Squared errors [C] of x's mean and deviation against those given, in units of the given variance."""
    seen_mean, seen_variance = ChannelMoments.apply(x)
    scale = variance + eps
    deviation = (seen_variance + eps).sqrt() - scale.sqrt()
    return (seen_mean - mean).square() / scale, deviation.square() / scale


# ------------------------------------------------------------------------------------ the images


def white_noise(spec: InputSpec, count: int, generator: torch.Generator) -> Tensor:
    """Noise [N, 3, H, W] of the prior's mean and deviation, every pixel for itself."""
    mean, variance = (moment[:, None, None] for moment in spec.prior())
    return mean + variance.sqrt() * torch.randn(spec.shape(count), generator=generator)


STARTS = {"natural": natural_noise, "leaves": dead_leaves, "white": white_noise}


def distill(model: nn.Module, spec: InputSpec, settings: Distillation, device: torch.device) -> Tensor:
    """Images [images, 3, H, W] on the CPU on which the network's BatchNorms see what they remember.

    Of leaves half are distilled, and each follows on itself as it was rendered: together they teach more than either.
    Several processes share the batches; each batch has a seed of its own, so that the images are the same.
    A network without BatchNorm, or not enough memory, is a UserError. A loss that is no number ends a
    batch with the best images so far, and says so.
    """
    network = capture(model, spec)
    if not any(_remembers(module) for module in network.modules()):
        raise UserError(
            "the network has no BatchNorm with running statistics, from which images would be distilled; pass --images DIR with pictures, or use a network trained with BatchNorm"
        )
    network = to_fast_format(network, device)
    if settings.start == "leaves" and settings.steps:
        half = replace(settings, images=(settings.images + 1) // 2)
        pairs = [_made(network, spec, one, device) for one in (half, replace(half, steps=0))]
        return torch.stack(pairs, 1).flatten(0, 1)[: settings.images]
    return _made(network, spec, settings, device)


def _made(network: fx.GraphModule, spec: InputSpec, settings: Distillation, device: torch.device) -> Tensor:
    """The images [images, 3, H, W] of all batches, which the processes share, after all steps."""
    firsts = distributed.shard(range(0, settings.images, settings.batch))
    made = []
    with tqdm(
        total=len(firsts) * settings.steps,
        desc=f"distilling {settings.images} images",
        unit="step",
        disable=not (settings.steps and distributed.is_main_process()),
    ) as progress:
        for first in firsts:
            size = min(settings.batch, settings.images - first)
            generator = torch.Generator().manual_seed(settings.seed * 2**20 + first)
            try:
                made.append(_batch(network, spec, size, settings, generator, device, progress))
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, MemoryError) or "memory" in str(error):
                    raise UserError(
                        f"not enough memory to distill {size} images at once; lower --distill_batch (now {settings.batch})"
                    ) from None
                raise
    return as_pixels(torch.cat(distributed.all_gather_lists(made)), spec)


@torch.enable_grad()
def _batch(
    network: fx.GraphModule,
    spec: InputSpec,
    size: int,
    settings: Distillation,
    generator: torch.Generator,
    device: torch.device,
    progress: tqdm,
) -> Tensor:
    mean, std = (torch.tensor(t)[:, None, None] for t in (spec.mean, spec.std))
    low, high = (-mean / std).to(device), ((1 - mean) / std).to(device)
    start = STARTS[settings.start](spec, size, generator)
    images = start.to(device).clamp(low, high).contiguous(memory_format=torch.channels_last).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=settings.rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    best, lowest = images.detach().clone(), math.inf
    target = None
    for _ in range(settings.steps):
        seen = _jittered(images, generator) if settings.jitter else images
        with _shifting(network, settings.shift, generator):
            errors, logits = _run(network, spec, seen)
        loss = statistics_loss(errors, settings.robust)
        if settings.evidence and _tells_classes(logits):
            target = target or class_targets(logits, settings.margin, generator)
            loss = loss + settings.evidence * evidence_loss(logits, *target)
        value = float(loss.detach())
        if not math.isfinite(value):
            tqdm.write(
                f"the loss became {value}; this batch keeps its best images (loss {lowest:.4g})", file=sys.stderr
            )
            break
        if value < lowest:
            best, lowest = images.detach().clone(), value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            images.clamp_(low, high)
        progress.update()
        progress.set_postfix(loss=f"{value:.4f}")
    return best.cpu()


def statistics_loss(errors: dict[str, tuple[Tensor, Tensor]], robust: bool = True) -> Tensor:
    """Mean error over layers, each layer's in units of its variance, so that all count the same.

    errors: by layer, the squared errors of its channels' means and deviations. robust: as log(1 + error), which leaves
    small errors as they are, and keeps a layer whose statistics no image can meet, as after fine-tuning with frozen
    BatchNorm, from deciding what the images become.
    """
    layers = torch.stack([mean.mean() + deviation.mean() for mean, deviation in errors.values()])
    return (layers.log1p() if robust else layers).mean()


def class_targets(logits: Tensor, margin: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For every answer of the network a random class, and how sure of it the network should be, in nats.

    logits: as evidence_loss takes them; an image's answer, or those of a detector's 16th of priors, have one class
    each, and a map's have one in each of 4 x 4 regions. Returns both without the axis of classes. Margins are uniform
    from 0, as photographs are of every clearness. A class of -1 asks for nothing.
    """
    axis = class_axis(logits)
    shape = [size for i, size in enumerate(logits.shape) if i != axis]
    regions = [shape[0], *(min(REGIONS, side) for side in shape[1:])] if logits.dim() > 3 else shape
    wanted = torch.randint(logits.shape[axis], regions, generator=generator)
    wanted_margin = margin * torch.rand(regions, generator=generator)
    if logits.dim() == 3:
        wanted[torch.rand(regions, generator=generator) > 1 / REGIONS**2] = -1
    for i, side in enumerate(shape[1:], start=1):
        place = torch.arange(side) * regions[i] // side
        wanted, wanted_margin = (t.index_select(i, place) for t in (wanted, wanted_margin))
    return wanted.to(logits.device), wanted_margin.to(logits.device)


def evidence_loss(logits: Tensor, wanted: Tensor, margin: Tensor) -> Tensor:
    """How far the logits are from showing the wanted classes: mean log(1 + nats that are missing).

    logits: [N, C] of images, [N, C, H, W] of pixels or [N, P, C] of a detector's priors. wanted, margin: the same without
    C, as class_targets gives them. An answer's margin is its logit over the logsumexp of the others.
    """
    axis = class_axis(logits)
    place = wanted.clamp_min(0).unsqueeze(axis)
    others = logits.scatter(axis, place, -torch.inf).logsumexp(axis)
    missing = (margin - (logits.gather(axis, place).squeeze(axis) - others)).clamp_min(0).log1p()
    return (missing * (wanted >= 0)).sum() / (wanted >= 0).sum().clamp_min(1)


def _tells_classes(output: Tensor) -> bool:
    """Whether an output can be logits of several classes."""
    return output.dim() in (2, 3, 4) and output.shape[class_axis(output)] > 1


@torch.no_grad()
def statistics_fit(model: nn.Module, spec: InputSpec, images: Tensor) -> dict[str, Fit]:
    """How well every BatchNorm's statistics are met on the images, the network's input first."""
    errors, _ = _run(capture(model, spec), spec, images)
    return {name: Fit(*(float(error.mean().sqrt()) for error in pair)) for name, pair in errors.items()}


def describe_fit(fit: dict[str, Fit], images: int, kind: str = "images") -> str:
    """The fit in a line: over all layers, and where it is worst."""
    worst = max(fit, key=lambda name: fit[name].total)
    overall = math.sqrt(sum(one.total**2 for one in fit.values()) / len(fit))
    return f"{images} {kind} meet the statistics within {overall:.2g} deviations (worst: {fit[worst].total:.2g} at {worst})"


def _run(network: fx.GraphModule, spec: InputSpec, images: Tensor) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Squared errors of every BatchNorm's statistics on the images, the network's input first; and the first output.

    As many images at a time as the network takes; the statistics are those of all.
    """
    mean, variance = (moment.to(images.device) for moment in spec.prior())
    errors = {"input": squared_errors(images, mean, variance, 0.0)}
    parts = images.split(network.meta["batch"] or len(images))
    with _listening(network, errors, len(parts)):
        outputs = [first_output(network(part)) for part in parts]
    return errors, joined(outputs)


@contextmanager
def _listening(network: fx.GraphModule, errors: dict[str, tuple[Tensor, Tensor]], parts: int) -> Iterator[None]:
    """While open, every BatchNorm writes its squared errors once it has seen all parts."""

    def listen(name: str, norm: _BatchNorm) -> None:
        errors[name], seen = (), []  # in the network's order

        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            seen.append(inputs[0])
            if len(seen) == parts:
                errors[name] = squared_errors(joined(seen), norm.running_mean, norm.running_var, norm.eps)
                seen.clear()

        handles.append(norm.register_forward_pre_hook(hook))

    handles = []
    for name, module in network.named_modules():
        if _remembers(module):
            listen(name, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _shifting(network: fx.GraphModule, reach: int, generator: torch.Generator) -> Iterator[None]:
    """While open, every strided convolution reads its map shifted by up to reach places, the edge reflected.

    A strided convolution passes little or nothing back to some places of its map, so that images get a grid; shifted
    at random, all places have their share: the swing convolution of GENIE (Jeon et al., CVPR 2023, arXiv 2212.04780).
    """

    def shifted(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        sides = inputs[0].shape[2:]
        if min(sides) <= reach:
            return inputs
        start = torch.randint(2 * reach + 1, (len(sides),), generator=generator).tolist()
        wide = F.pad(inputs[0], (reach, reach) * len(sides), mode="reflect")
        return (wide[:, :, *(slice(a, a + side) for a, side in zip(start, sides, strict=True))],)

    convolutions = (one for one in network.modules() if isinstance(one, _ConvNd) and not one.transposed)
    strided = [one for one in convolutions if max(one.stride) > 1]
    handles = [one.register_forward_pre_hook(shifted) for one in strided if reach]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _remembers(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_var is not None


def _jittered(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images shifted by up to a sixteenth of their sides, around the edges, and mirrored half of the time."""
    room = [side // 16 for side in images.shape[2:]]
    shifts = [int(torch.randint(-r, r + 1, (), generator=generator)) for r in room]
    moved = torch.roll(images, shifts, (2, 3))
    return moved.flip(3) if torch.rand((), generator=generator) < 0.5 else moved


def as_pixels(images: Tensor, spec: InputSpec) -> Tensor:
    """The nearest images whose pixels are whole steps of 1/255."""
    return from_bytes(to_bytes(images, spec), spec)


def to_bytes(images: Tensor, spec: InputSpec) -> Tensor:
    mean, std = (torch.tensor(t)[:, None, None] for t in (spec.mean, spec.std))
    return ((images * std + mean) * 255).round().clamp(0, 255).byte()


def from_bytes(pixels: Tensor, spec: InputSpec) -> Tensor:
    mean, std = (torch.tensor(t)[:, None, None] for t in (spec.mean, spec.std))
    return (pixels.float() / 255 - mean) / std
