"""Charts of a quantized network: its weights after each pass, its activations' ranges, its noisiest layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.calibration.distillation import Fit

_INK, _ACCENT, _WARN = "#33424f", "#3b6ea8", "#b5432a"


def weight_spread(file: Path, stages: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """For each stage and layer a box over its channels' largest |weight|, as the paper's figure 2 has it for one layer.

    stages: by name, the lowest and highest weight [C, 2] of every channel of every layer.
    """
    figure, rows = _figure(len(stages), len(next(iter(stages.values()))), 2.1)
    for axes, (stage, layers) in zip(rows, stages.items(), strict=True):
        _draw_boxes(axes, torch.stack([_box(_largest(ranges)) for ranges in layers.values()], 1))
        axes.sharey(rows[0])
        axes.set(yscale="log", ylabel="largest |w|", xlim=(0.5, len(layers) + 0.5))
        axes.set_title(stage, loc="left")
        axes.set_xticks([])
    rows[0].set_ylim(bottom=max(1e-4, rows[0].get_ylim()[0]))  # cleared channels are at 0
    _name_ticks(rows[-1], list(next(iter(stages.values()))), first=1)
    return _save(figure, file)


def channels(file: Path, stages: Mapping[str, Mapping[str, Tensor]], layer: str, most: int = 96) -> Path:
    """One layer's channels, a bar from lowest to highest weight for each, at every stage: the paper's figures 2 and 6.

    Of more than `most` channels those whose weights are largest at the first stage.
    """
    figure, rows = _figure(len(stages), most, 1.7)
    largest = _largest(next(iter(stages.values()))[layer])
    shown = largest.argsort(descending=True)[:most].sort().values
    for axes, (stage, layers) in zip(rows, stages.items(), strict=True):
        low, high = layers[layer][shown].T
        axes.bar(range(len(low)), (high - low).tolist(), bottom=low.tolist(), color=_ACCENT, width=0.8)
        axes.axhline(0, color=_INK, linewidth=0.6)
        _leave_room(axes)
        axes.set(ylabel="weights", xlim=(-1, len(low)))
        axes.set_title(stage, loc="left")
        axes.set_xticks([])
    rows[-1].set_xlabel(f"output channels of {layer}")
    return _save(figure, file)


def most_uneven(layers: Mapping[str, Tensor]) -> str:
    """The layer whose widest channel is furthest from its median one."""
    spread = {name: float(largest.max() / largest.median().clamp_min(1e-12)) for name, largest in _each(layers).items()}
    return max(spread, key=spread.get)


def _leave_room(axes: object) -> None:
    """Keep the longest bar from ending on the frame, where it would look cut."""
    axes.use_sticky_edges = False
    axes.margins(y=0.05)


def activation_ranges(file: Path, ranges: Mapping[str, tuple[float, float]]) -> Path:
    """The range of every quantizer."""
    figure, (axes,) = _figure(1, len(ranges), 2.6)
    low, high = zip(*ranges.values(), strict=True)
    axes.bar(range(len(ranges)), [b - a for a, b in zip(low, high, strict=True)], bottom=low, color=_ACCENT, width=0.8)
    axes.axhline(0, color=_INK, linewidth=0.6)
    _leave_room(axes)
    axes.set(ylabel="value", xlim=(-1, len(ranges)))
    if max(high) > 50:
        axes.set_yscale("symlog", linthresh=1)
    _name_ticks(axes, list(ranges))
    return _save(figure, file)


def noise(file: Path, layers: Mapping[str, float], worst: Sequence[str]) -> Path:
    """Signal-to-quantization-noise ratio of every layer in dB, the worst in red."""
    figure, (axes,) = _figure(1, len(layers), 2.6)
    colours = [_WARN if name in worst else _ACCENT for name in layers]
    axes.bar(range(len(layers)), [max(value, -5) for value in layers.values()], color=colours, width=0.8)
    axes.set(ylabel="SQNR, dB", xlim=(-1, len(layers)))
    _name_ticks(axes, list(layers))
    return _save(figure, file)


def statistics_fit(file: Path, fit: Mapping[str, Fit]) -> Path:
    """How far each layer's statistics on distilled images are from what its BatchNorm remembers."""
    figure, (axes,) = _figure(1, len(fit), 2.6)
    for label, errors in (("mean", [f.mean for f in fit.values()]), ("deviation", [f.deviation for f in fit.values()])):
        axes.plot(range(len(fit)), errors, marker="o", markersize=3, label=label)
    axes.set(ylabel="error, in deviations", xlim=(-1, len(fit)))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _name_ticks(axes, list(fit))
    return _save(figure, file)


def _each(layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _largest(ranges) for name, ranges in layers.items()}


def _largest(ranges: Tensor) -> Tensor:
    return ranges.abs().amax(1)


def _box(values: Tensor) -> Tensor:
    """[5]: smallest, lower quartile, median, upper quartile, largest."""
    return values.clamp_min(1e-6).quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=values.dtype))


def _draw_boxes(axes: object, boxes: Tensor) -> None:
    """A box at 1, 2, ... for each column of [5, N], with whiskers to its ends; few artists, as every one takes time."""
    low, q1, median, q3, high = boxes.numpy()
    places = torch.arange(1, boxes.shape[1] + 1).numpy()
    axes.vlines([*places, *places], [*low, *q3], [*q1, *high], colors=_ACCENT, linewidth=0.8)
    axes.hlines([*low, *high], [*places - 0.175] * 2, [*places + 0.175] * 2, colors=_ACCENT, linewidth=0.8)
    axes.bar(places, q3 - q1, bottom=q1, width=0.7, color=_ACCENT, alpha=0.75)
    axes.hlines(median, places - 0.35, places + 0.35, colors="white", linewidth=1)


def _figure(rows: int, columns: int, height: float) -> tuple:
    import matplotlib  # slow to import, and needed here alone

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 8, "axes.titlesize": 9}
    style |= {
        "axes.edgecolor": _INK,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with pyplot.rc_context(style):
        size = (min(max(6.5, columns / 6.5), 11), height * rows + 0.9)
        figure, axes = pyplot.subplots(rows, 1, figsize=size, layout="constrained", squeeze=False)
    return figure, list(axes[:, 0])


def _name_ticks(axes: object, names: Sequence[str], first: int = 0) -> None:
    """Every name where there is room, else some."""
    step = -(-len(names) // 70)
    places = range(0, len(names), step)
    axes.set_xticks([place + first for place in places], [names[place] for place in places], rotation=90, fontsize=6)


def _save(figure: object, file: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return file
