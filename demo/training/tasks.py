"""What is trained for each task: its network, its batches, its loss, its score and its schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

from demo import IMAGE_SIZES, RESIZED, weights
from demo.render import rendered
from demo.scenes import CLASSES, VOID
from demo.training.data import Examples, normalise
from modeling.deeplab import DeepLab
from modeling.mobilenet_v2 import mobilenet_v2
from modeling.ssd_lite import SPEC as SSD_PUBLISHED
from modeling.ssd_lite import SSDLite
from utils.core.input_spec import InputSpec
from utils.core.torchvision_compat import torchvision
from utils.experiment.evaluation import evaluate
from utils.tasks.boxes import BoxCoder, Objects
from utils.tasks.data import Batches, image_folder
from utils.tasks.detection import stack, voc_detection
from utils.tasks.metrics import ConfusionMatrix, MeanAveragePrecision, TopK
from utils.tasks.segmentation import voc_segmentation
from utils.tasks.voc import open_voc

WIDTH = 0.5  # of MobileNetV2, in all three
SSD_SPEC = replace(SSD_PUBLISHED, size=(IMAGE_SIZES["detection"],) * 2)


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up of the rate, then a cosine to zero.

    scenes: how many to train on. optimizer: "sgd" (Nesterov momentum 0.9) or "adam". decay: weight
    decay of every parameter, BatchNorm's too, as PyTorch's optimizers have it.
    """

    scenes: int
    epochs: int
    batch: int
    optimizer: str
    rate: float
    decay: float
    warm_up: int = 200  # steps

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(model.parameters(), lr=self.rate, weight_decay=self.decay)
        return torch.optim.SGD(model.parameters(), lr=self.rate, momentum=0.9, nesterov=True, weight_decay=self.decay)

    def rate_at(self, step: int) -> float:
        steps = self.epochs * (self.scenes // self.batch)
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        return self.rate * (1 + math.cos(math.pi * (step - self.warm_up) / (steps - self.warm_up))) / 2


@dataclass(frozen=True)
class Training:
    """How one network is trained.

    scenes: their kind, as demo.render knows it. short_side: of the images to crop from, in pixels.
    batch: examples, their indices and a random generator -> images [N, 3, H, W] and targets.
    loss: the network's output and the targets -> a scalar. score: network -> percentages by name.
    shipped: whether its weights are part of the demo; others stay in the cache.
    """

    scenes: str
    short_side: int
    schedule: Schedule
    network: Callable[[], nn.Module]
    batch: Callable[[Examples, ndarray, np.random.Generator], tuple[Tensor, object]]
    loss: Callable[[object, object], Tensor]
    score: Callable[[nn.Module], dict[str, float]]
    shipped: bool = True


# ---- classification


def classifier() -> nn.Module:
    return initialise(mobilenet_v2(width=WIDTH, classes=len(CLASSES)))


def residual_classifier() -> nn.Module:
    return torchvision.models.resnet18(num_classes=len(CLASSES))


def classification_batch(examples: Examples, chosen: ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random crops, turned by quarters and mirrored: from above, a scene has no top."""
    side = IMAGE_SIZES["classification"]
    images = examples.images[chosen]
    room = images.shape[1] - side
    crops = []
    for image in images:
        y, x = rng.integers(0, room + 1, 2)
        crop = np.rot90(image[y : y + side, x : x + side], rng.integers(4))
        crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return normalise(np.stack(crops)), torch.from_numpy(examples.classes[chosen, 0].astype(np.int64))


def classification_score(model: nn.Module) -> dict[str, float]:
    side = IMAGE_SIZES["classification"]
    samples, _ = image_folder(
        str(rendered("classification")), "val", InputSpec((side, side), resize=RESIZED), len(CLASSES)
    )
    return _evaluate(model, Batches(samples, 50, workers=0, seed=0), TopK())


# ---- segmentation


def segmenter() -> nn.Module:
    return with_trained_backbone(DeepLab(len(CLASSES) + 1, width=WIDTH, channels=64, reduced=24), "backbone.features")


def segmentation_batch(examples: Examples, chosen: ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random square crops, turned by quarters and mirrored, and their masks [N, H, W]."""
    side = IMAGE_SIZES["segmentation"]
    images, masks = [], []
    for index in chosen:
        x, quarters, mirror = rng.integers(examples.images.shape[2] - side + 1), rng.integers(4), rng.random() < 0.5
        for source, crops in ((examples.images, images), (examples.masks, masks)):
            crop = np.rot90(source[index, :side, x : x + side], quarters)
            crops.append(crop[:, ::-1] if mirror else crop)
    return normalise(np.stack(images)), torch.from_numpy(np.stack(masks).astype(np.int64))


def segmentation_score(model: nn.Module) -> dict[str, float]:
    side = IMAGE_SIZES["segmentation"]
    samples, names = voc_segmentation(str(rendered("voc")), "val", InputSpec((side, side), side), len(CLASSES) + 1)
    figures = _evaluate(model, Batches(samples, 20, workers=0, seed=0), ConfusionMatrix(names))
    return {"miou": next(iter(figures.values()))}


# ---- detection


def detector() -> nn.Module:
    return with_trained_backbone(_ssd_lite(), "base_net")


def _ssd_lite() -> SSDLite:
    return SSDLite(len(CLASSES) + 1, width=WIDTH, extras=((128, 256), (64, 128), (64, 128), (32, 64)))


@cache
def _coder() -> BoxCoder:
    return _ssd_lite().coder(SSD_SPEC.size)


def detection_batch(
    examples: Examples, chosen: ndarray, rng: np.random.Generator
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Images squeezed to the network's square and mirrored; for each prior its label [N, P] and offsets [N, P, 4]."""
    images = torch.from_numpy(examples.images[chosen])
    height, width = images.shape[1:3]
    targets = []
    for row, index in enumerate(chosen):
        there = examples.classes[index] >= 0
        boxes = torch.from_numpy(examples.boxes[index][there]) / torch.tensor([width, height, width, height])
        for axis in (0, 1):  # x, y
            if rng.random() < 0.5:
                images[row] = images[row].flip(1 - axis)
                boxes[:, [axis, axis + 2]] = 1 - boxes[:, [axis + 2, axis]]
        labels = torch.from_numpy(examples.classes[index][there].astype(np.int64)) + 1
        targets.append(_coder().encode(Objects(boxes, labels, torch.zeros(len(labels), dtype=torch.bool))))
    pixels = torchvision.transforms.functional.resize(
        images.permute(0, 3, 1, 2).float() / 255, SSD_SPEC.size, antialias=False
    )
    labels, offsets = (torch.stack(values) for values in zip(*targets, strict=True))
    return torchvision.transforms.functional.normalize(pixels, SSD_SPEC.mean, SSD_SPEC.std), (labels, offsets)


def detection_loss(heads: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy over objects and the three times as many hardest backgrounds, smooth L1 over
    objects' offsets (SSD, section 2.2)."""
    (logits, offsets), (labels, expected) = heads, targets
    objects = labels > 0
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    hardness = losses.detach().masked_fill(objects, -1)
    rank = hardness.argsort(dim=1, descending=True).argsort(dim=1)
    counted = objects | (rank < 3 * objects.sum(dim=1, keepdim=True))
    places = nn.functional.smooth_l1_loss(offsets[objects], expected[objects], reduction="sum")
    return (losses[counted].sum() + places) / objects.sum().clamp_min(1)


def detection_score(model: nn.Module) -> dict[str, float]:
    samples, labels = voc_detection(open_voc(str(rendered("voc")), "Main", "val"), SSD_SPEC, len(CLASSES) + 1)
    figures = _evaluate(
        model, Batches(samples, 20, workers=0, seed=0, collate=stack), MeanAveragePrecision(labels, _coder())
    )
    return {"map": next(iter(figures.values()))}


# ---- all


def with_trained_backbone(model: nn.Module, place: str) -> nn.Module:
    """The network with the trained classifier's blocks at that place."""
    model = initialise(model)
    tensors = torch.load(weights.checked("classification"), weights_only=True)
    own = model.state_dict()
    names = {f"{place}{name.removeprefix('features')}": tensor for name, tensor in tensors.items()}
    own.update({name: tensor.to(own[name].dtype) for name, tensor in names.items() if name in own})
    model.load_state_dict(own)
    return model


def initialise(model: nn.Module) -> nn.Module:
    """Depthwise weights by their own fan-in of 9, since torchvision's start so small that BatchNorm
    makes their first steps far too large."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def _evaluate(model: nn.Module, loader: object, metric: object) -> dict[str, float]:
    device = next(model.parameters()).device
    evaluate({"network": model}, loader, {"network": metric}, device)
    return metric.compute()


TRAININGS = {
    "classification": Training(
        "classification",
        RESIZED,
        Schedule(scenes=12_000, epochs=36, batch=64, optimizer="adam", rate=2e-3, decay=1e-4),
        classifier,
        classification_batch,
        nn.functional.cross_entropy,
        classification_score,
    ),
    "residual": Training(
        "classification",
        RESIZED,
        Schedule(scenes=12_000, epochs=3, batch=64, optimizer="sgd", rate=0.05, decay=1e-4),
        residual_classifier,
        classification_batch,
        nn.functional.cross_entropy,
        classification_score,
        shipped=False,
    ),
    "segmentation": Training(
        "voc",
        IMAGE_SIZES["segmentation"],
        Schedule(scenes=5_000, epochs=3, batch=16, optimizer="adam", rate=1e-3, decay=1e-4),
        segmenter,
        segmentation_batch,
        partial(nn.functional.cross_entropy, ignore_index=VOID),
        segmentation_score,
    ),
    "detection": Training(
        "voc",
        IMAGE_SIZES["detection"],
        Schedule(scenes=5_000, epochs=5, batch=32, optimizer="adam", rate=1e-3, decay=1e-4),
        detector,
        detection_batch,
        detection_loss,
        detection_score,
    ),
}
