"""The scores of a row's networks, and the tables of them that a run prints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from utils.experiment.records import change, name_of, signed, signed_interval
from utils.tasks.metrics import Metric, interval


@dataclass(frozen=True)
class Score:
    """One network's result: metrics in percent by name, the one that counts first; seconds of its forward passes.

    network: "fp32_original" as loaded, "fp32" the row's own float network, or "quantized". interval: the
    95 % CI of the main metric; change: its difference to the network as loaded; change_interval: the 95 % CI of that.
    """

    network: str
    label: str
    metrics: Mapping[str, float]
    seconds: float
    interval: tuple[float, float]
    change: float
    change_interval: tuple[float, float]

    @property
    def value(self) -> float:
        return next(iter(self.metrics.values()))


def score(metrics: Mapping[str, Metric], seconds: Mapping[str, float], labels: Mapping[str, str]) -> list[Score]:
    """A score for every network that was evaluated, the one as loaded first; labels: what the table calls each."""
    reference = next(iter(metrics.values()))
    made = []
    for name, metric in metrics.items():
        figures = metric.compute()
        value = next(iter(figures.values()))
        change = value - (made[0].value if made else value)
        known = interval(metric), change, interval(metric, reference)
        made.append(Score(name, labels[name], figures, seconds[name], *known))
    return made


def print_table(scores: Sequence[Score], metrics: Mapping[str, Metric]) -> None:
    """FP32 first; a line per network, a column per metric, and the change from the first line with its 95 % CI.

    metrics: the accumulators, for their number of images, and per class where they have it.
    """
    samples = len(metrics[scores[0].network].records)
    names, title = list(scores[0].metrics), f"{samples:,} images"
    width = max(len(title), *(len(score.label) for score in scores))
    columns = "".join(f"{column:>16}" for column in names)
    print("\n" + f"{title:<{width}}{columns}{'change':>10}{'95 % CI':>18}{'images/s':>10}")
    for score in scores:
        shown = "".join(f"{score.metrics[name]:>16.2f}" for name in names)
        speed = samples / max(score.seconds, 1e-9)
        sure = "" if score is scores[0] else signed_interval(score.change_interval)
        print(f"{score.label:<{width}}{shown}{signed(score.change):>10}{sure:>18}{speed:>10.0f}")
    for score in scores:
        remark = getattr(metrics[score.network], "remark", str)()
        if remark:
            print(f"\n{score.label} {remark}")


def cells(scores: Sequence[Score]) -> list[list[str]]:
    """The same as text, a list for each row, the heading first."""
    names = list(scores[0].metrics)
    rows = [
        [
            score.label,
            *(f"{score.metrics[name]:.2f}" for name in names),
            *(["", ""] if score is scores[0] else [signed(score.change), signed_interval(score.change_interval)]),
        ]
        for score in scores
    ]
    return [["", *names, "change", "95 % CI"], *rows]


def print_classes(scores: Sequence[Score], metrics: Mapping[str, Metric]) -> None:
    """The main metric per class, for metrics that have it."""
    shown = [score for score in scores if hasattr(metrics[score.network], "per_class")]
    if not shown:
        return
    figures = {score.label: metrics[score.network].per_class() for score in shown}
    width = max(map(len, ("class", *next(iter(figures.values())))))
    print("\n" + f"{'class':<{width}}" + "".join(f"{label:>{len(label) + 3}}" for label in figures))
    for name in next(iter(figures.values())):
        cells = (f"{values[name]:>{len(label) + 3}.2f}" for label, values in figures.items())
        print(f"{name:<{width}}" + "".join(cells))


def row_cells(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of a table as text, a list for each, the heading first."""
    rows = [
        [
            name_of(line),
            f"{line['fp32']:.2f}",
            f"{line['quantized']:.2f}",
            change(line["quantized"], line["fp32_original"]),
            signed_interval(line["change_interval"]),
        ]
        for line in lines
    ]
    return [["", "FP32", "quantized", "change", "95 % CI"], *rows]


def print_rows(lines: Sequence[Mapping[str, Any]]) -> None:
    """The rows of a table, a line each."""
    rows = row_cells(lines)
    width = max(len(row[0]) for row in rows)
    print()
    for name, fp32, quantized, moved, sure in rows:
        print(f"{name:<{width}}{fp32:>9}{quantized:>11}{moved:>9}{sure:>18}")


def outcome(metrics: Mapping[str, Metric], scores: Sequence[Score]) -> dict[str, Any]:
    """The part of a line that the run finds out. metrics: the accumulators of the scores."""
    by_network = {score.network: score for score in scores}
    original = by_network["fp32_original"]
    quantized = by_network.get("quantized")
    return {
        "samples": len(metrics["fp32_original"].records),
        "metric": next(iter(original.metrics)),
        "fp32": by_network.get("fp32", original).value,
        "fp32_original": original.value,
        "quantized": quantized.value if quantized else None,
        "metrics": {score.network: dict(score.metrics) for score in scores},
        "intervals": {score.network: score.interval for score in scores},
        "change_interval": quantized.change_interval if quantized else None,
        "per_class": {name: metric.per_class() for name, metric in metrics.items() if hasattr(metric, "per_class")},
        "forward_seconds": {score.network: round(score.seconds, 3) for score in scores},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
