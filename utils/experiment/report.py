"""The page of one row: what the passes did to the network, and what the networks predict, in pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, fx, nn

from utils.calibration.distillation import statistics_fit
from utils.calibration.fidelity import Fidelity, fidelity
from utils.calibration.images import Images
from utils.core.input_spec import InputSpec
from utils.experiment import charts, cli, page, scores
from utils.experiment.evaluation import Evaluator
from utils.experiment.page import Picture, Section
from utils.graph.nodes import module_of
from utils.quantization.quantizer import Quantizer
from utils.tasks.pictures import denormalise, grid

if TYPE_CHECKING:
    from utils.experiment.runner import Row, Run


def write_row(folder: Path, run: "Run", evaluator: Evaluator, row: "Row") -> Path:
    """Draw a row's pictures and write the page that shows them; returns its file."""
    quantized, data = row.quantized, evaluator.data
    near, source = (
        quantized.fidelity,
        "held-out images, " + ("yours" if row.images and row.images.real else "distilled"),
    )
    if quantized.simulated and near is None:
        probes, source = evaluator.probes(), "images of the evaluation"
        near = fidelity(quantized.float.cpu(), quantized.simulated, probes)
    sections = []
    if quantized.log.weights:
        sections += network_sections(folder, quantized.log.weights, quantized.simulated, near)
    captioned = {row.labels[name]: model for name, model in row.networks.items()}
    metrics = {row.labels[name]: metric for name, metric in row.metrics.items()}
    files = data.draw(folder, captioned, metrics, run.device)
    shown = [Picture(file, file.stem.replace("_", " ")) for file in files if file.suffix == ".png"]
    sections.append(Section("Samples", "What the networks predict.", shown))
    if row.images is not None:
        sections.append(images_section(folder, row.images, run.network.model, run.spec))
    title = f"{run.network.name} {row.recipe.row_name}"
    headline = cli.headline(run.args, run.network, len(data.samples), row.recipe.row_name)
    lead = f"{headline}. Quantization noise is measured on {source}."
    return page.write(folder / "report.html", title, lead, scores.cells(row.scores), quantized.log, sections, row.line)


def images_section(folder: Path, images: Images, model: nn.Module, spec: InputSpec) -> Section:
    """Draw some of the images that the method used, and how closely each layer's statistics are met on them."""
    name = "images" if images.real else "distilled"
    sheet = folder / f"{name}.png"
    grid([denormalise(image, spec) for image in images.calibration[:16]], columns=4).save(sheet)
    pictures = [Picture(sheet, "Some of them.")]
    fit = statistics_fit(model, spec, images.calibration)
    if len(fit) > 1:  # the input and at least one BatchNorm
        plot = charts.statistics_fit(folder / f"{name}_fit.png", fit)
        pictures.append(Picture(plot, "How close each layer's statistics on them are."))
    if images.real:
        return Section("Your images", f"{images.description}.", pictures)
    return Section(
        "Distilled images",
        f"{images.description}. Rendered without data, and made from BatchNorm statistics.",
        pictures,
    )


def network_sections(
    folder: Path, weights: Mapping[str, Mapping[str, Tensor]], simulated: fx.GraphModule | None, near: Fidelity | None
) -> list[Section]:
    """Draw what the passes did to the weights, the activation ranges and each layer's quantization noise.

    weights: of the pass log. near: of the quantized network, None where there is none.
    """
    layer = charts.most_uneven(next(iter(weights.values())))
    spread = "Largest |weight| of each layer's channels after each pass: box from quartile to quartile, whiskers to the extremes."
    channels = (
        f"From lowest to highest weight, the channels of {layer} (the largest, where they are many), whose widest channel "
        "is furthest from its median one after BatchNorm folding."
    )
    pictures = [
        Picture(charts.weight_spread(folder / "weights.png", weights), spread),
        Picture(charts.channels(folder / "channels.png", weights, layer), channels),
    ]
    text = "One scale per tensor serves its widest channel: weights far below that are rounded to 0."
    sections = [Section("Weights", text, pictures)]
    if simulated is None:
        return sections
    ranges = quantizer_ranges(simulated)
    picture = Picture(charts.activation_ranges(folder / "activations.png", ranges), "Range of every quantizer.")
    sections.append(Section("Activations", f"{len(ranges)} tensors are quantized.", [picture]))
    worst = sorted(near.layers, key=near.layers.get)[:5]
    picture = Picture(
        charts.noise(folder / "noise.png", near.layers, worst), "Signal-to-quantization-noise ratio, layer by layer."
    )
    noisiest = ", ".join(f"{name} {near.layers[name]:.1f} dB" for name in worst)
    text = f"The output is {near.output:.1f} dB above its quantization noise. Noisiest layers: {noisiest}."
    return [*sections, Section("Quantization noise", text, [picture])]


def quantizer_ranges(simulated: fx.GraphModule) -> dict[str, tuple[float, float]]:
    """The smallest and the largest value that every quantizer lets through, by its name in the graph."""
    modules = {node.name: module_of(simulated, node) for node in simulated.graph.nodes}
    return {
        name: (module.scale * module.step_min, module.scale * module.step_max)
        for name, module in modules.items()
        if isinstance(module, Quantizer)
    }
