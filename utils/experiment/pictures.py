"""Pictures of what networks say about images."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, fx, nn
from torch.utils.data import Dataset, Subset

from utils.calibration.distillation import Fit
from utils.calibration.fidelity import Fidelity
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.experiment import charts
from utils.experiment.page import Picture, Section
from utils.graph.nodes import module_of
from utils.quantization.quantizer import Quantizer
from utils.tasks.boxes import BoxCoder
from utils.tasks.data import BadSample
from utils.tasks.metrics import ConfusionMatrix, MeanAveragePrecision, TopK

_CAPTION = 16  # height in pixels of the line above a panel
_GAP = 4  # between two panels
_SHOWN = 0.3  # score from which a detection is drawn


def make_folder(folder: Path) -> Path:
    """Make the folder for pictures, before the work that they are to show."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {str(folder)!r} for pictures ({error.strerror}); pass --report with another"
        ) from None
    return folder


def classification_pictures(
    folder: Path,
    networks: Mapping[str, nn.Module],
    metrics: Mapping[str, TopK],
    device: torch.device,
    samples: Dataset,
    names: Mapping[int, str],
    spec: InputSpec,
    count: int = 12,
) -> list[Path]:
    """Draw sheets of images with their class and each network's answer; returns the PNG files.

    One sheet of images evenly spread, and one of images on which the last network changed the first
    one's mind, if there are any. metrics: by caption; they hold the answers, so that networks and device
    stay idle. names: of the classes, by the network's output.
    """
    answers = [metric.predictions for metric in metrics.values()]
    scored = _scored(samples, len(answers[0]))
    changed = [i for i, (first, last) in enumerate(zip(answers[0], answers[-1], strict=True)) if first != last]
    files = []
    for kind, positions in (("spread", range(len(scored))), ("changed", changed)):
        shown = [positions[i * len(positions) // count] for i in range(count)] if len(positions) > count else positions
        if not shown:
            continue
        pictures = []
        for position in shown:
            image, label = samples[scored[position]]
            said = {caption: names.get(metric.predictions[position], "?") for caption, metric in metrics.items()}
            lines = [f"truth: {names.get(label, '?')}", *(f"{caption}: {name}" for caption, name in said.items())]
            pictures.append(
                captioned(denormalise(image, spec), lines, right=[name == names.get(label) for name in said.values()])
            )
        files.append(folder / f"{kind}.png")
        grid(pictures, columns=4).save(files[-1])
    return files


def segmentation_pictures(
    folder: Path,
    networks: Mapping[str, nn.Module],
    metrics: Mapping[str, ConfusionMatrix],
    device: torch.device,
    samples: Dataset,
    spec: InputSpec,
    count: int = 4,
) -> list[Path]:
    """Draw image, truth and each network's prediction side by side; returns the PNG files.

    Drawn are the first images, and those where the last network scores worst against the first one
    (with one network: where it scores worst). networks, metrics: by caption, as they were evaluated
    on samples.
    """
    scores = torch.tensor([metrics[name].per_image for name in networks]).nan_to_num()
    harm = scores[-1] - scores[0] if len(scores) > 1 else scores[0]
    scored = _scored(samples, len(harm))
    chosen = {"first": range(min(count, len(harm))), "worst": harm.argsort(stable=True)[:count].tolist()}

    files = []
    for kind, positions in chosen.items():
        for rank, position in enumerate(positions, start=1):
            image, mask = samples[scored[position]]
            panels = {"image": denormalise(image, spec), "truth": paint_classes(mask)}
            for name, model, score in zip(networks, networks.values(), scores[:, position], strict=True):
                with torch.inference_mode():
                    prediction = model(image[None].to(device)).argmax(dim=1)[0]
                panels[f"{name}: mIoU {score:.1f}"] = paint_classes(prediction)
            files.append(folder / f"{kind}_{rank}_{_name(samples, scored[position])}.png")
            side_by_side(panels).save(files[-1])
    return files


def detection_pictures(
    folder: Path,
    networks: Mapping[str, nn.Module],
    metrics: Mapping[str, MeanAveragePrecision],
    device: torch.device,
    samples: Dataset,
    coder: BoxCoder,
    labels: Mapping[str, int],
    spec: InputSpec,
    count: int = 8,
) -> list[Path]:
    """Draw the annotated objects and each network's detections side by side, and write precision and
    recall as CSV; returns the files.

    Drawn are images evenly spread over samples, and detections that a user would trust: scores of
    0.3 and more. networks, metrics: by caption. labels: the network's output for each class name.
    """
    names = {label: name for name, label in labels.items()}
    files = []
    for index in range(0, len(samples), max(1, len(samples) // count)):
        if len(files) == count or isinstance(sample := samples[index], BadSample):
            continue
        image, objects = sample
        picture = denormalise(image, spec)
        marks = [" (difficult)" if difficult else "" for difficult in objects.difficult.tolist()]
        captions = [names[label] + mark for label, mark in zip(objects.labels.tolist(), marks, strict=True)]
        panels = {"truth": draw_boxes(picture, objects.boxes, objects.labels, captions)}
        for name, model in networks.items():
            with torch.inference_mode():
                found = coder.detect(model(image[None].to(device)))[0]
            shown = [
                i for i, score in enumerate(found.scores.tolist()) if score >= _SHOWN and int(found.labels[i]) in names
            ]
            captions = [f"{names[int(found.labels[i])]} {found.scores[i]:.2f}" for i in shown]
            panels[name] = draw_boxes(picture, found.boxes[shown], found.labels[shown], captions)
        files.append(folder / f"{len(files) + 1}_{_name(samples, index)}.png")
        side_by_side(panels).save(files[-1])
    files.append(folder / "precision_recall.csv")
    write_curves(files[-1], metrics)
    return files


def distilled_pictures(folder: Path, images: Tensor, fit: Mapping[str, Fit], spec: InputSpec) -> list[Path]:
    """Draw a contact sheet of distilled images [N, 3, H, W], and how well each layer's statistics are met; returns the PNG files."""
    sheet = folder / "distilled.png"
    grid([denormalise(image, spec) for image in images[:16]], columns=4).save(sheet)
    return [sheet, charts.statistics_fit(folder / "distilled_fit.png", fit)]


def network_pictures(
    folder: Path, weights: Mapping[str, Mapping[str, Tensor]], simulated: fx.GraphModule | None, near: Fidelity | None
) -> list[Section]:
    """Draw what the passes did to the weights, the activations' ranges and the layers' noise; returns the report's sections.

    weights: of PassLog. near: of the quantized network, None where there is none.
    """
    layer = charts.most_uneven(next(iter(weights.values())))
    sections = [
        Section(
            "Weights",
            "One grid per tensor serves its widest channel: what lies far below that is rounded away.",
            [
                Picture(
                    charts.weight_spread(folder / "weights.png", weights),
                    "Largest |weight| of each layer's channels after each pass: box from quartile to quartile, whiskers to the extremes.",
                ),
                Picture(
                    charts.channels(folder / "channels.png", weights, layer),
                    f"From lowest to highest weight, the channels of {layer}, which has the widest spread as loaded.",
                ),
            ],
        )
    ]
    if simulated is None:
        return sections
    quantizers = {node.name: module_of(simulated, node) for node in simulated.graph.nodes}
    quantizers = {name: module for name, module in quantizers.items() if isinstance(module, Quantizer)}
    ranges = {
        name: (module.scale * module.step_min, module.scale * module.step_max) for name, module in quantizers.items()
    }
    picture = Picture(charts.activation_ranges(folder / "activations.png", ranges), "Range of every quantizer.")
    sections.append(Section("Activations", f"{len(ranges)} tensors are quantized.", [picture]))
    worst = sorted(near.layers, key=near.layers.get)[:5]
    text = f"Output {near.output:.1f} dB over its quantization noise, {near.agreement:.1f} % of answers as the float network's. "
    text += "Noisiest layers: " + ", ".join(f"{name} {near.layers[name]:.1f} dB" for name in worst) + "."
    picture = Picture(
        charts.noise(folder / "noise.png", near.layers, worst), "Signal over quantization noise, layer by layer."
    )
    return [*sections, Section("Noise", text, [picture])]


def draw_boxes(picture: Image.Image, boxes: Tensor, labels: Tensor, captions: Sequence[str]) -> Image.Image:
    """A copy of the picture with captioned boxes [K, 4] (corners as fractions) in the colours of their labels [K]."""
    picture = picture.copy()
    draw, size = ImageDraw.Draw(picture), torch.tensor([picture.width, picture.height] * 2)
    for corners, label, caption in reversed(
        list(zip((boxes * size).tolist(), labels.tolist(), captions, strict=True))
    ):  # the best on top
        left, top, right, bottom = corners
        colour = tuple(voc_palette()[label].tolist())
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=2)
        draw.text((max(left, 0) + 3, max(top, 0) + 2), caption, fill="white", stroke_width=1, stroke_fill=colour)
    return picture


def write_curves(file: Path, metrics: Mapping[str, MeanAveragePrecision]) -> None:
    """Precision and recall of every class and network at each of its detections' scores, as CSV."""
    with file.open("w", newline="", encoding="utf-8") as text:
        rows = csv.writer(text)
        rows.writerow(("network", "class", "score", "precision", "recall"))
        for network, metric in metrics.items():
            for name, curve in metric.curves().items():
                points = torch.stack([curve.scores, curve.precision, curve.recall], 1).tolist()
                rows.writerows((network, name, *(f"{value:.6f}" for value in point)) for point in points)


def _scored(samples: Dataset, count: int) -> Sequence[int]:
    """The samples that were scored, `count` of them: all, or those that can be read."""
    if len(samples) == count:
        return range(count)
    return [index for index in range(len(samples)) if not isinstance(samples[index], BadSample)]


def captioned(picture: Image.Image, lines: Sequence[str], right: Sequence[bool]) -> Image.Image:
    """A picture over its lines; the first in black, the others green where right and red where not."""
    width = max(picture.width, 160)
    scale = width / picture.width
    height = round(picture.height * scale)
    sheet = Image.new("RGB", (width, height + _CAPTION * len(lines)), "white")
    sheet.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (0, 0))
    draw = ImageDraw.Draw(sheet)
    colours = ["black", *("darkgreen" if good else "firebrick" for good in right)]
    for number, (line, colour) in enumerate(zip(lines, colours, strict=True)):
        draw.text((2, height + 2 + number * _CAPTION), line, fill=colour)
    return sheet


def grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size in rows of `columns`."""
    width, height = (side + _GAP for side in pictures[0].size)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width - _GAP, rows * height - _GAP), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * width, number // columns * height))
    return sheet


def side_by_side(panels: Mapping[str, Image.Image]) -> Image.Image:
    """Images in a row, each under its caption."""
    width = sum(panel.width + _GAP for panel in panels.values()) - _GAP
    sheet = Image.new("RGB", (width, _CAPTION + max(panel.height for panel in panels.values())), "white")
    draw, left = ImageDraw.Draw(sheet), 0
    for caption, panel in panels.items():
        draw.text((left + 2, 2), caption, fill="black")
        sheet.paste(panel, (left, _CAPTION))
        left += panel.width + _GAP
    return sheet


def denormalise(image: Tensor, spec: InputSpec) -> Image.Image:
    """The picture that a network's input [3, H, W] was made from."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    pixels = (image.cpu() * std + mean).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())


def paint_classes(mask: Tensor) -> Image.Image:
    """Class indices [H, W] in the colours of VOC's palette."""
    return Image.fromarray(voc_palette()[mask.cpu().numpy()])


def voc_palette() -> np.ndarray:
    """[256, 3] uint8: VOC's colour of each class index.

    Bits 0, 3, 6 of the index are the highest bits of red, bits 1, 4, 7 of green, bits 2, 5 of blue.
    """
    index = np.arange(256)[:, None]
    channel = np.arange(3)
    return sum((index >> (3 * level + channel) & 1) << (7 - level) for level in range(3)).astype(np.uint8)


def _name(samples: Dataset, index: int) -> str:
    if isinstance(samples, Subset):
        samples, index = samples.dataset, samples.indices[index]
    return Path(samples.paths[index]).stem
