"""Forecasts: from points near by, every network counting alike, and none where there are too few."""

import json

import pytest

from utils.search import forecast as module
from utils.search.forecast import LEAST_POINTS, Point, forecast, known_points, quantile


def points(**changes):
    return [Point(name, 20.0, change) for name, some in changes.items() for change in some]


def test_nine_of_ten_lie_inside():
    many = [Point("abc"[i % 3], 20.0, -i / 100) for i in range(300)]
    told = forecast(21.0, many)
    inside = sum(told.holds(point.change) for point in many) / len(many)
    assert 0.88 <= inside <= 0.92 and told.low < told.expected < told.high
    assert str(told) == "-1.5 (-2.9 to -0.1)"


def test_a_network_of_many_rows_counts_as_one_of_few():
    told = forecast(20.0, points(a=[-5.0] * 50, b=[0.0] * 4, c=[0.0] * 4))
    assert told.expected == 0.0 and told.low == -5.0


def test_nothing_is_told_from_few_or_far():
    few = points(a=[0.0], b=[0.0], c=[0.0])
    assert len(few) < LEAST_POINTS and forecast(20.0, few) is None
    assert forecast(20.0, points(a=[0.0] * 20)) is None
    assert forecast(30.0, points(a=[0.0] * 9, b=[0.0], c=[0.0])) is None


def test_quantiles_are_of_the_weight():
    assert quantile([(1.0, 1.0), (2.0, 1.0), (3.0, 2.0)], 0.5) == 2.0
    assert quantile([(1.0, 1.0), (2.0, 1.0), (3.0, 2.0)], 0.51) == 3.0


@pytest.mark.parametrize("holds", [True, False])
def test_points_that_were_not_borne_out_are_not_used(holds, tmp_path, monkeypatch):
    file = tmp_path / "points.json"
    file.write_text(json.dumps({"holds": holds, "points": [["a", 20.0, -0.5]]}))
    monkeypatch.setattr(module, "FILE", file)
    known_points.cache_clear()
    assert known_points() == ((Point("a", 20.0, -0.5),) if holds else ())
    known_points.cache_clear()
