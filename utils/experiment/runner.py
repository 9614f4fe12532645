"""The rows of a table: each recipe's networks on the same images, scored, printed, recorded and drawn."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils.data import Dataset, default_collate

from utils.backends.parity import AGREEMENT, Agreement, Compared, Remembered
from utils.calibration.distillation import statistics_fit
from utils.calibration.fidelity import Fidelity, fidelity
from utils.core import distributed
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.experiment import cli, page
from utils.experiment import records as results
from utils.experiment.evaluation import evaluate
from utils.experiment.page import Picture, Section
from utils.experiment.pictures import distilled_pictures, make_folder, network_pictures
from utils.graph.capture import capture
from utils.passes.log import PassLog
from utils.quantization import serialization as artifact
from utils.tasks.data import BadSample, Batches
from utils.tasks.metrics import Metric

ROOM = 2 * 2**30  # bytes of decoded images that the rows of a table share


@dataclass(frozen=True)
class Data:
    """What a task's networks are evaluated on.

    samples: images and their targets. metric: a new accumulator, given that of the network as loaded or None.
    draw: folder, networks and their metrics by caption, device -> the files it wrote to show what they say.
    names: of the classes, by the network's output. collate: a list of samples -> (images, targets).
    """

    samples: Dataset
    metric: Callable[[Metric | None], Metric]
    draw: Callable[[Path, Mapping[str, nn.Module], Mapping[str, Metric], torch.device], list[Path]]
    names: Mapping[int, str]
    collate: Callable = default_collate


class Recipe(Protocol):
    """The passes of a row; str() is the row's name, settings are its flags by name, words as one would type them."""

    labels: Mapping[str, str]
    needs_images: bool
    settings: Mapping[str, Any]
    words: Sequence[str]


class Quantized(Protocol):
    """What the passes made."""

    float: fx.GraphModule
    simulated: fx.GraphModule | None
    log: PassLog
    fidelity: Fidelity | None


Quantize = Callable[[nn.Module, InputSpec, Recipe, Tensor | None], Quantized]
ToEvaluate = Callable[[nn.Module, Quantized, Recipe], dict[str, nn.Module]]


@dataclass
class Experiment:
    """What the rows of a run have in common.

    program: the script. argv: its arguments. data: None where the network is only to be written. extras: what the task
    needs besides to evaluate a saved network. known: metric and seconds of every float network so far, by label.
    """

    task: str
    program: str
    argv: Sequence[str] | None
    args: argparse.Namespace
    network: results.Loaded
    spec: InputSpec
    data: Data | None
    device: torch.device
    extras: Mapping[str, Any] = field(default_factory=dict)
    known: dict[str, tuple[Metric, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.data is None:
            return
        args, count = self.args, len(self.data.samples)
        if distributed.processes() > count:
            raise UserError(f"{distributed.processes()} processes for {count} images; start at most {count}")
        room = ROOM if args.table else 0
        self.batches = Batches(self.data.samples, args.batch_size, args.workers, args.seed, self.data.collate, room)

    def run(self, recipes: Sequence[Recipe], quantize: Quantize, to_evaluate: ToEvaluate) -> None:
        """A row for every recipe; of a table, for every one that the results file does not hold yet."""
        lines = [self._settings(recipe) for recipe in recipes]
        own = results.recorded(self.args.results) if self.args.table and distributed.is_first() else {}
        there = distributed.gather(own)[0]  # other machines may not see the file
        missing = [i for i, line in enumerate(lines) if results.identity(line) not in there]
        if self.args.table:
            print(f"{len(recipes)} rows, {len(recipes) - len(missing)} of them in {self.args.results} already")
        images = cli.distilled_images(
            self.args, self.network.model, self.spec, self.device, any(recipes[i].needs_images for i in missing)
        )
        start = time.monotonic()
        for done, i in enumerate(missing, start=1):
            recipe = recipes[i]
            quantized = quantize(self.network.model, self.spec, recipe, images)
            self._write(recipe, quantized)
            if self.data is None:
                return
            networks = to_evaluate(self.network.model, quantized, recipe)
            lines[i] |= self._row(recipe, quantized, networks, images)
            if distributed.is_first():
                results.record(self.args.results, lines[i])
            if self.args.table and done < len(missing):
                seconds = time.monotonic() - start
                left = seconds / done * (len(missing) - done)
                print(f"\nrow {done} of {len(missing)} after {_minutes(seconds)}; about {_minutes(left)} left\n")
        if self.args.table:
            rows = [there.get(results.identity(line), line) for line in lines]
            results.print_rows(rows)
            if self.args.report and distributed.is_first():
                links = [f"{_file_name(row)}/report.html" for row in rows]
                title, lead = f"{self.network.name}: {len(rows)} rows", f"weights {self.network.weights}"
                page.write_index(self.args.report / "index.html", title, lead, results.row_cells(rows), links)

    def _settings(self, recipe: Recipe) -> dict[str, Any]:
        args = argparse.Namespace(**vars(self.args) | recipe.settings)
        command = cli.command(self.program, self.argv, recipe.words if self.args.table else None)
        return results.settings(self.task, args, command, self.network, str(recipe))

    def _row(
        self, recipe: Recipe, quantized: Quantized, networks: dict[str, nn.Module], distilled: Tensor | None
    ) -> dict[str, Any]:
        """Evaluate a recipe's networks, print their scores and draw what was asked for; returns what to record.

        networks: by the names of recipe.labels, the one as loaded first. distilled: the images behind the fidelity.
        """
        args, data, labels = self.args, self.data, dict(recipe.labels)
        print(cli.headline(args, self.network, len(data.samples), str(recipe)))
        if args.verbose or not args.table:
            print(quantized.log.report(args.verbose))
        if quantized.fidelity:
            print(quantized.fidelity.report(len(distilled), args.verbose))

        if args.engine == "onnxruntime":
            name = labels["quantized"]
            labels |= {"simulated": f"{name}, simulated", "quantized": f"{name}, ONNX Runtime"}
            networks |= self._in_engine(recipe, quantized, networks.pop("quantized"))

        metrics, seconds = self._evaluate({labels[name]: model for name, model in networks.items()})
        metrics, seconds = ({name: found[labels[name]] for name in networks} for found in (metrics, seconds))
        self.known |= {labels[name]: (metrics[name], seconds[name]) for name in networks if name.startswith("fp32")}

        scores = results.scores(metrics, seconds, labels)
        results.print_table(scores, metrics)
        if not args.table:
            results.print_classes(scores, metrics)
        line = results.outcome(metrics, scores)
        if quantized.fidelity:
            line["fidelity"] = {"images": len(distilled)} | asdict(quantized.fidelity)
        if args.engine == "onnxruntime":
            line["agreement"] = self._agreement(networks["quantized"])
        if args.report and distributed.is_first():
            known = self._settings(recipe) | line
            self._report(recipe, quantized, labels, networks, metrics, scores, distilled, known)
        return line

    def _write(self, recipe: Recipe, quantized: Quantized) -> None:
        """The files that --save and --export ask for."""
        args = self.args
        if not distributed.is_first() or not (args.save or args.export):
            return
        if args.save:
            parts = quantized.float, quantized.simulated
            model, name, weights = capture(self.network.model, self.spec), self.network.name, self.network.weights
            extras = {**self.extras, "names": dict(self._names())}
            artifact.save(
                args.save,
                artifact.Saved(model, *parts, dict(recipe.settings), self.spec, self.task, name, weights, extras),
            )
            print(f"saved {args.save}: {args.save.stat().st_size / 1e6:.2f} MB")
        if args.export:
            from utils.backends.onnxruntime.export import (
                export,  # onnx and onnxruntime are slow to import, and needed here alone
            )

            print(export(quantized, self.spec, args.export, self._metadata(recipe), self._probes()))

    def _in_engine(self, recipe: Recipe, quantized: Quantized, simulated: nn.Module) -> dict[str, nn.Module]:
        """The simulation, and ONNX Runtime in its place, once layer by layer they do the same on a few images."""
        from utils.backends.onnxruntime.export import build, check_parity, describe_kernels
        from utils.backends.onnxruntime.session import OnnxNetwork

        model = build(quantized, self.spec, self._metadata(recipe))
        print(describe_kernels(model, quantized))
        parity = check_parity(model, quantized.simulated, self._probes())
        print(f"  {parity}")
        simulation = Remembered(simulated)
        engine = Compared(OnnxNetwork(model.SerializeToString()), simulation, parity.first_parting)
        return {"simulated": simulation, "quantized": engine}

    def _agreement(self, compared: Compared) -> float:
        """Percent of predictions on all images that are the same in engine and simulation; too few are a UserError."""
        total = Agreement()
        for own in distributed.gather(compared.agreement):
            total.same, total.predictions = total.same + own.same, total.predictions + own.predictions
        print(f"\nengine and simulation predict the same for {100 * total.share:.2f} % of {total.predictions:,}")
        if total.share < AGREEMENT:
            first = compared.first_parting.name if compared.first_parting else "none of the layers of a few images"
            raise UserError(
                f"the engine agrees with the simulation on {100 * total.share:.2f} % of predictions, where {AGREEMENT:.0%} are "
                f"asked for; they first part at {first}, and nothing was recorded"
            )
        return 100 * total.share

    def _probes(self, count: int = 8) -> Tensor:
        """A few images of the evaluation, or random ones."""
        if self.data is None:
            return self.spec.probe(count)
        samples = (self.data.samples[i] for i in range(len(self.data.samples)))
        good = list(islice((sample for sample in samples if not isinstance(sample, BadSample)), count))
        return self.data.collate(good)[0]

    def _names(self) -> Mapping[int, str]:
        return self.data.names if self.data else self.network.extras.get("names", {})

    def _metadata(self, recipe: Recipe) -> dict[str, Any]:
        return {
            "recipe": str(recipe),
            "settings": dict(recipe.settings),
            "model": self.network.name,
            "weights": self.network.weights,
            "input": asdict(self.spec),
            "classes": {str(output): name for output, name in self._names().items()},
            "versions": results.versions(),
            "commit": results.commit(),
        }

    def _evaluate(self, networks: Mapping[str, nn.Module]) -> tuple[dict[str, Metric], dict[str, float]]:
        """Metrics and seconds of networks by label; those that an earlier row has evaluated are not run again."""
        metrics = {label: metric for label, (metric, _) in self.known.items()}
        seconds = {label: spent for label, (_, spent) in self.known.items()}
        original = next(iter(networks))
        fresh = {}
        for label in networks:
            if label not in metrics:
                metrics[label] = fresh[label] = self.data.metric(metrics.get(original))
        run = {label: networks[label] for label in fresh}
        return metrics, seconds | evaluate(run, self.batches, fresh, self.device, self.args.skip_bad_images)

    def _report(
        self,
        recipe: Recipe,
        quantized: Quantized,
        labels: Mapping[str, str],
        networks: Mapping[str, nn.Module],
        metrics: Mapping[str, Metric],
        scores: Sequence[results.Score],
        distilled: Tensor | None,
        line: Mapping[str, Any],
    ) -> None:
        """The row's pictures, and the page that shows them."""
        folder = make_folder(self.args.report / _file_name(line)) if self.args.table else self.args.report
        near, seen_on = quantized.fidelity, "distilled images"
        if quantized.simulated and near is None:
            near, seen_on = (
                fidelity(quantized.float.cpu(), quantized.simulated, self._probes()),
                "images of the evaluation",
            )
        sections = (
            network_pictures(folder, quantized.log.weights, quantized.simulated, near) if quantized.log.weights else []
        )
        captioned = {labels[name]: model for name, model in networks.items()}
        files = self.data.draw(
            folder, captioned, {labels[name]: metric for name, metric in metrics.items()}, self.device
        )
        shown = [Picture(file, file.stem.replace("_", " ")) for file in files if file.suffix == ".png"]
        sections.append(Section("Samples", "What the networks say.", shown))
        if distilled is not None:
            fit = statistics_fit(self.network.model, self.spec, distilled)
            sheet, plot = distilled_pictures(folder, distilled, fit, self.spec)
            pictures = [Picture(sheet, "Some of them."), Picture(plot, "How near each layer's statistics on them are.")]
            text = f"{len(distilled)} images, made from BatchNorm statistics alone."
            sections.append(Section("Distilled images", text, pictures))
        title = f"{self.network.name} {recipe}"
        lead = (
            cli.headline(self.args, self.network, len(self.data.samples), str(recipe))
            + f". Noise is seen on {seen_on}."
        )
        page.write(folder / "report.html", title, lead, results.cells(scores), quantized.log, sections, line)
        print(f"\n{folder / 'report.html'} shows it, with the files beside it")


def _file_name(line: Mapping[str, Any]) -> str:
    """A folder's name for a row: Original, ReLU_LE_BC, LE_BC_per_channel."""
    name = "".join(letter if letter.isalnum() else "_" for letter in results.name_of(line))
    return "_".join(part for part in name.split("_") if part)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
