"""Train SSD-Lite's heads on a sound backbone: python -m benchmarks.train_detector --help

For measuring on real photographs with a network whose BatchNorm statistics are those of its weights. The
backbone is frozen, statistics included, so that its two feature maps are computed once, for every
picture and its mirror image; extra blocks and headers learn on those, with BatchNorm as in training.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from demo.training.tasks import detection_loss
from modeling.checkpoint import read_checkpoint
from modeling.ssd_lite import SPEC, SSDLite
from utils.experiment import cli
from utils.tasks.boxes import BoxCoder, Objects
from utils.tasks.data import Batches
from utils.tasks.detection import stack, voc_detection
from utils.tasks.voc import open_voc

BATCH = 32


def detector(stem: Path, backbone: Path, classes: int) -> SSDLite:
    """SSD-Lite with blocks 1 to 18 of a MobileNetV2 classifier, and the stem of a checkpoint in this network's layout,
    which is made for this network's normalisation of pixels."""
    torch.manual_seed(0)
    model = SSDLite(classes)
    tensors = {f"base_net{name.removeprefix('features')}": t for name, t in read_checkpoint(str(backbone)).items()}
    tensors |= {name: t for name, t in read_checkpoint(str(stem)).items() if name.startswith("base_net.0.")}
    own = model.state_dict()
    own.update({name: tensor for name, tensor in tensors.items() if name in own})
    model.load_state_dict(own)
    return model


@torch.no_grad()
def feature_maps(model: SSDLite, loader: Batches, coder: BoxCoder) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backbone's two maps (half precision), labels [N, P] and offsets [N, P, 4] of all pictures, then of their mirror images."""
    rows = []
    for mirrored in (False, True):
        for batch in tqdm(loader, desc="mirror images" if mirrored else "pictures", unit="batch"):
            images = batch.images.flip(3) if mirrored else batch.images
            targets = [coder.encode(mirror(objects) if mirrored else objects) for objects in batch.targets]
            labels, offsets = (torch.stack(values) for values in zip(*targets, strict=True))
            tap, last = model.backbone(images.contiguous(memory_format=torch.channels_last))
            rows.append((tap.half(), last.half(), labels, offsets))
    return tuple(torch.cat(values) for values in zip(*rows, strict=True))


def mirror(objects: Objects) -> Objects:
    left, top, right, bottom = objects.boxes.unbind(1)
    return Objects(torch.stack([1 - right, top, 1 - left, bottom], 1), objects.labels, objects.difficult)


def order(count: int, epochs: int) -> Iterator[Tensor]:
    """Batches of indices, shuffled anew each epoch."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(BATCH)


def train(model: SSDLite, examples: tuple[Tensor, Tensor, Tensor, Tensor], epochs: int, rate: float) -> None:
    """Adam with a cosine to zero over extra blocks and headers."""
    learning = nn.ModuleList([model.extras, model.classification_headers, model.regression_headers]).train()
    optimizer = torch.optim.Adam(learning.parameters(), lr=rate, weight_decay=1e-4)
    steps = epochs * math.ceil(len(examples[0]) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    smooth = 0.0
    with tqdm(order(len(examples[0]), epochs), total=steps, unit="step") as progress:
        for step, chosen in enumerate(progress):
            tap, last, labels, offsets = (values[chosen] for values in examples)
            maps = (x.float().contiguous(memory_format=torch.channels_last) for x in (tap, last))
            loss = detection_loss(model.heads(*maps), (labels, offsets))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            smooth += (float(loss.detach()) - smooth) / min(step + 1, 50)
            progress.set_postfix(loss=f"{smooth:.3f}")
    model.eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_detector", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder in VOC's format; trained on ImageSets/Main/trainval.txt")
    parser.add_argument("--stem", type=Path, required=True, help="SSD-Lite checkpoint whose first layer to take")
    parser.add_argument("--backbone", type=Path, required=True, help="MobileNetV2 checkpoint whose blocks to take")
    parser.add_argument("--classes", type=int, required=True, help="of the data, without the background")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, required=True, help="checkpoint to write")
    args = parser.parse_args(arguments)
    model = detector(args.stem, args.backbone, args.classes + 1).eval().to(memory_format=torch.channels_last)
    coder = model.coder(SPEC.size)
    samples, _ = voc_detection(open_voc(args.data, "Main", "trainval"), SPEC, args.classes + 1)
    train(model, feature_maps(model, Batches(samples, BATCH, 0, 0, stack), coder), args.epochs, args.rate)
    torch.save(model.state_dict(), args.output)


if __name__ == "__main__":
    cli.run(main, "benchmarks.train_detector")
