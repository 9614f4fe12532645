"""Whether what a network's score changes by can be told without labels: every recorded row against its forecast.

    python -m benchmarks.forecast

reads results/*.jsonl, leaves each network out in turn, forecasts its rows from those of the others, and writes
results/forecast.txt and the points that `--auto` forecasts from. It says whether they hold: nine of ten rows inside
their interval, which is at most 3 points wide where the true loss is under 3.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from utils.experiment.records import name_of, read_lines
from utils.search.forecast import COVERAGE, FILE, Forecast, Point, forecast

RESULTS = Path(__file__).resolve().parents[1] / "results"
WIDEST = 3.0  # points, where the true loss is under as many


def recorded(files: Sequence[Path]) -> dict[Point, str]:
    """The points of all rows whose noise was measured, with the row's name; the last line of each counts."""
    found: dict[tuple[str, ...], Point] = {}
    for file in files:
        for line in read_lines(file):
            noise = (line.get("fidelity") or {}).get("noise")
            if noise is None or line["quantized"] is None:
                continue
            network = f"{line['task']} {line['model']} {Path(line['weights']).name}"
            row = f"{name_of(line)} W{line['bits']['weight']}A{line['bits']['activation']}"
            change = line["quantized"] - line["fp32_original"]
            found[network, row, line["engine"], line["data"]] = Point(network, noise, change)
    return {point: row for (_, row, *_), point in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.parse_args()
    points = recorded(sorted(RESULTS.glob("*.jsonl")))
    told: list[tuple[Point, Forecast]] = []
    lines = [
        "noise in dB over held-out images; change of the score in points; forecast from the rows of all other networks",
        "",
    ]
    for point, row in sorted(points.items(), key=lambda item: (item[0].network, -item[0].noise)):
        made = forecast(point.noise, [other for other in points if other.network != point.network])
        if made is not None:
            told.append((point, made))
        verdict = (
            "nothing told: too few rows like it"
            if made is None
            else f"forecast {made}" + ("" if made.holds(point.change) else "  OUTSIDE")
        )
        lines.append(f"{point.network:<62} {row:<34} {point.noise:6.1f} dB {point.change:+7.2f}  {verdict}")
    inside = sum(made.holds(point.change) for point, made in told)
    small = [(point, made) for point, made in told if point.change > -WIDEST]
    narrow = sum(made.high - made.low <= WIDEST for _, made in small)
    holds = bool(told) and inside >= COVERAGE * len(told) and narrow >= COVERAGE * len(small)
    lines += [
        "",
        f"{len(points)} rows of {len({point.network for point in points})} networks; told {len(told)}; inside their interval "
        f"{inside} of {len(told)}; with a true loss under {WIDEST:g} points {len(small)}, their interval at most that wide {narrow}",
        "it holds: --auto prints a forecast" if holds else "it does not hold: --auto prints the ranking alone",
    ]
    (RESULTS / "forecast.txt").write_text("\n".join(lines) + "\n")
    FILE.write_text(
        json.dumps(
            {"holds": holds, "points": [[p.network, round(p.noise, 3), round(p.change, 3)] for p in points]}, indent=0
        )
        + "\n"
    )
    print("\n".join(lines[-2:]))


if __name__ == "__main__":
    main()
