"""What a network's score is likely to change by, told without labels: from rows whose change was measured.

Each recorded row is a point: how far over its noise the output was on held-out images, and what the score changed by.
A new network is taken to change as the points of all networks near its own noise did. `benchmarks/forecast.py` makes
the points, and leaves every network out in turn to see whether that holds.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
REACH = 3.0  # dB: which points are near
LEAST_POINTS, LEAST_NETWORKS = 8, 3  # near ones, without which nothing is told
COVERAGE = 0.9  # of the measured changes, that are to lie in the interval


@dataclass(frozen=True)
class Point:
    """noise: in dB, as utils.search.judge measures it. change: of the score, in points, against the network as loaded."""

    network: str
    noise: float
    change: float


@dataclass(frozen=True)
class Forecast:
    """The expected change of the score in points, and between what it lies in nine of ten networks."""

    expected: float
    low: float
    high: float

    def holds(self, change: float) -> bool:
        return self.low <= change <= self.high

    def __str__(self) -> str:
        return f"{self.expected:+z.1f} ({self.low:+z.1f} to {self.high:+z.1f})"


def forecast(noise: float, points: Iterable[Point]) -> Forecast | None:
    """From the points within REACH, every network counting alike; None where they are too few."""
    near = [point for point in points if abs(point.noise - noise) <= REACH]
    networks = {point.network for point in near}
    if len(near) < LEAST_POINTS or len(networks) < LEAST_NETWORKS:
        return None
    own = {name: sum(point.network == name for point in near) for name in networks}
    weighted = sorted((point.change, 1 / own[point.network]) for point in near)
    tail = (1 - COVERAGE) / 2
    return Forecast(*(quantile(weighted, share) for share in (0.5, tail, 1 - tail)))


def quantile(weighted: Sequence[tuple[float, float]], share: float) -> float:
    """The first value, of values with weights by rising value, at which that share of the weight is reached."""
    total, reached = sum(weight for _, weight in weighted), 0.0
    for value, weight in weighted:
        reached += weight
        if reached >= share * total:
            return value
    return weighted[-1][0]


@cache
def known_points() -> tuple[Point, ...]:
    """The recorded points, none where a check by leaving networks out did not bear them out."""
    if not FILE.exists():
        return ()
    content = json.loads(FILE.read_text())
    return tuple(Point(*point) for point in content["points"]) if content["holds"] else ()
