"""How well fidelity on distilled images predicts what quantization costs: python -m benchmarks.fidelity FILE ...

Over the rows of each network in recorded result files, those that leave the float network as it is: Spearman's
rank correlation between the change that was measured with labels, and what distilled images said without.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from utils.experiment import cli
from utils.experiment.records import read_lines


def ranks(values: Tensor) -> Tensor:
    """Ranks [N] from 0, equal values sharing the mean of theirs."""
    return ((values[:, None] > values).sum(1) + (values[:, None] >= values).sum(1) - 1).double() / 2


def spearman(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([ranks(first), ranks(second)]))[0, 1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="JSON-lines files that --results wrote")
    args = parser.parse_args(arguments)
    groups: dict[tuple, list] = {}
    for line in (line for file in args.files for line in read_lines(file)):
        if "fidelity" in line and line["fp32"] == line["fp32_original"]:  # fidelity is to the row's own float network
            groups.setdefault((line["model"], line["weights"], line["data"], line["fp32_original"]), []).append(line)
    print(f"{'rank correlation of the change with':<60}{'rows':>6}{'output dB':>12}{'same answers':>14}")
    for (model, weights, data, _), lines in groups.items():
        if len(lines) < 4:
            continue
        change = torch.tensor([line["quantized"] for line in lines])
        figures = [torch.tensor([line["fidelity"][name] for line in lines]) for name in ("output", "agreement")]
        shown = "".join(
            f"{spearman(change, figure):>{width}.2f}" for figure, width in zip(figures, (12, 14), strict=True)
        )
        print(f"{f'{model}, {Path(weights).name}, {Path(data).name}':<60}{len(lines):>6}{shown}")


if __name__ == "__main__":
    cli.run(main, "benchmarks.fidelity")
