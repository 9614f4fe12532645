"""What it is worth to measure how the terms of sums go together: python -m benchmarks.sums

Chains of residual blocks, trained for seconds to tell rendered dead leaves apart by their colours and contrast, then quantized
with and without utils.calibration.sums. Reach: the largest value of the last sum over what its range promises.
"""

import argparse
from unittest.mock import patch

import torch
from torch import Tensor, nn

import dfq
from dfq import Recipe, quantize_data_free
from utils.calibration.observers import observe
from utils.calibration.rendered import dead_leaves
from utils.core.input_spec import InputSpec
from utils.quantization.quantizer import Quantizer

SPEC = InputSpec(size=(32, 32), resize=32)
CHANNELS, CLASSES, BATCH = 24, 8, 64
HEADER = f"{'network':<34}{'accuracy':>9}  {'terms':<12}{'reach':>7}{'SQNR':>10}{'same answers':>14}"


class Block(nn.Module):
    def __init__(self, after: bool):
        super().__init__()
        self.after = after
        self.branch = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
            nn.BatchNorm2d(CHANNELS),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
            nn.BatchNorm2d(CHANNELS),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.branch(x)) if self.after else x + torch.relu(self.branch(x))


def chain(blocks: int, after: bool, pool: type[nn.Module]) -> nn.Module:
    """after: whether a ReLU follows each sum; else the branches end in one. pool: before the classifier."""
    stem = nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()
    head = pool(1), nn.Flatten(), nn.Linear(CHANNELS, CLASSES)
    return nn.Sequential(*stem, *(Block(after) for _ in range(blocks)), *head)


NETWORKS = {
    "8 blocks, ReLU behind sums, max": (8, True, nn.AdaptiveMaxPool2d),
    "8 blocks, ReLU behind sums, average": (8, True, nn.AdaptiveAvgPool2d),
    "8 blocks, ReLU in branches, max": (8, False, nn.AdaptiveMaxPool2d),
    "14 blocks, ReLU behind sums, max": (14, True, nn.AdaptiveMaxPool2d),
}


def leaves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] within the range of pixels, and their classes [N]."""
    images = dead_leaves(SPEC, count, torch.Generator().manual_seed(seed)).clamp(*SPEC.range())
    red, green, blue = images.mean((2, 3)).unbind(1)
    classes = 4 * (red > green).long() + 2 * (green > blue).long() + (images.std((1, 2, 3)) > 0.9).long()
    return images, classes


def train(network: nn.Module, images: Tensor, classes: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        some = torch.randint(0, len(images), (BATCH,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[some]), classes[some]).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def row(network: nn.Module, images: Tensor) -> str:
    """How the quantized network does on images [N, 3, 32, 32]."""
    made = quantize_data_free(network, SPEC, Recipe(quantize=True, equalize=True, correction=True))
    largest: dict[str, float] = {}
    observe(
        made.float,
        images,
        lambda node, value: largest.update({node.name: max(largest.get(node.name, 0), float(value.max()))}),
    )
    sums = [node for node in made.simulated.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    behind = sums[-1]
    while not isinstance(getattr(behind, "target", None), str) or not isinstance(
        made.simulated.get_submodule(behind.target), Quantizer
    ):
        behind = next(iter(behind.users))
    quantizer = made.simulated.get_submodule(behind.target)
    exact, ours = made.float(images), made.simulated(images)
    noise = (exact - ours).square().sum() / (exact - exact.mean(0)).square().sum()
    same = (exact.argmax(1) == ours.argmax(1)).float().mean()
    reach = largest[sums[-1].name] / float(quantizer.step_max * quantizer.scale)
    return f"{reach:>7.2f}{-10 * float(noise.log10()):>7.1f} dB{100 * float(same):>12.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sums", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250, help="of training")
    args = parser.parse_args()
    (images, classes), (others, wanted) = leaves(2000, seed=1), leaves(400, seed=2)
    print(HEADER)
    for name, about in NETWORKS.items():
        torch.manual_seed(0)
        network = train(chain(*about), images, classes, args.steps)
        with torch.no_grad():
            accuracy = (network(others).argmax(1) == wanted).float().mean()
        with patch.object(dfq, "measure_sums", lambda model, spec: None):
            apart = row(network, others)
        print(f"{name:<34}{100 * float(accuracy):>8.1f}%  {'independent':<12}{apart}")
        print(f"{'':<34}{'':>9}  {'measured':<12}{row(network, others)}", flush=True)


if __name__ == "__main__":
    main()
