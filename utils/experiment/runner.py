"""The rows of a run or of a table: each recipe's networks quantized, scored on the same images, and recorded."""

import json
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from utils.backends.base import ENGINES
from utils.calibration.distillation import LEAVES, for_few_bits
from utils.calibration.fidelity import held_out
from utils.calibration.images import Images
from utils.core import distributed
from utils.core.errors import UserError
from utils.core.files import make_folder
from utils.core.hashing import weights_hash
from utils.core.input_spec import InputSpec
from utils.experiment import cli, deployment, doctor, page, recipe_search, records, scores
from utils.experiment.command_line import command, says, words_of
from utils.experiment.evaluation import Evaluator, agreement, networks_of
from utils.experiment.images import images_of, settings_of
from utils.experiment.loading import Quantize
from utils.graph.capture import capture
from utils.passes.result import Quantized
from utils.quantization.recipe import Recipe
from utils.search.auto import unseen
from utils.search.candidates import OUTER_BITS, outer_bits
from utils.search.judge import Judge, views
from utils.tasks.base import Data, Task
from utils.tasks.metrics import Metric


@dataclass(frozen=True)
class Run:
    """What the rows of a run have in common.

    argv: the script's arguments, None where they are the process's own. extras: what the task needs besides to evaluate
    a saved network.
    """

    task: Task
    argv: Sequence[str] | None
    args: Namespace
    network: records.Loaded
    spec: InputSpec
    device: torch.device
    extras: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def weights_sha256(self) -> str:
        return weights_hash(self.network.model)

    @cached_property
    def captured(self) -> fx.GraphModule:
        """The network's graph, to be read or copied, not edited."""
        return capture(self.network.model, self.spec)

    def command(self, recipe: Recipe) -> str:
        """The command line of one row, to be typed again."""
        looks = recipe.needs_images or self.args.fidelity
        return command(self.task.program, self.argv, recipe.words, looks)

    def line(self, recipe: Recipe) -> dict[str, Any]:
        """The part of a row's line that is known before it runs."""
        args = Namespace(**vars(self.args) | recipe.settings)
        typed = self.command(recipe) if args.table else command(self.task.program, self.argv)
        name = f"auto: {recipe}" if args.auto else str(recipe)
        return records.settings(self.task.name, args, typed, self.network, self.weights_sha256, name)

    def float_keys(self, recipe: Recipe) -> dict[str, str]:
        """What decides what a row's float networks compute: the weights, and the passes on them."""
        settings = {"fp32_original": None, "fp32": recipe.float_settings}
        return {name: json.dumps([self.weights_sha256, passes]) for name, passes in settings.items()}


@dataclass(frozen=True)
class Row:
    """One recipe's result.

    networks, metrics: by name, the one as loaded first; labels: what a table calls each. images: those that the run
    used, or None. line: what is recorded.
    """

    recipe: Recipe
    quantized: Quantized
    images: Images | None
    networks: Mapping[str, nn.Module]
    metrics: Mapping[str, Metric]
    labels: Mapping[str, str]
    scores: Sequence[scores.Score]
    line: Mapping[str, Any]


def run_rows(run: Run, data: Data | None, recipes: Sequence[Recipe], quantize: Quantize) -> None:
    """Quantize, evaluate and record a row for every recipe; of a table, for every one that is not recorded yet.

    data: None where the network is only to be written.
    """
    if run.args.doctor:
        doctor.examine(run, quantize)
        return
    evaluator = Evaluator(data, run.args, run.device) if data else None
    if run.args.auto:
        _run_auto(run, evaluator, quantize)
    else:
        _run_recipes(run, evaluator, recipes, quantize)


def _run_auto(run: Run, evaluator: Evaluator | None, quantize: Quantize) -> None:
    """The row of the recipe that a search finds."""
    captured = _captured(run, evaluator)
    run = _for_few_bits(run, captured)
    images = images_of(run.args, run.task, run.network.model, run.spec, run.device, True, captured)
    images, judging = unseen(images)
    found, ranking = recipe_search.find(run, captured, images, judging, quantize)
    recipe, quantized = found.chosen.recipe, found.quantized
    _write_files(run, recipe, quantized, evaluator)
    if evaluator is None:
        _say(run, quantized, images)
    else:
        row = evaluate_row(run, evaluator, recipe, quantized, images, {"ranking": ranking})
        _keep(run, evaluator, row)


def _for_few_bits(run: Run, captured: fx.GraphModule) -> Run:
    """For weights of few bits the run as if its command line asked for what serves them, unless that says otherwise."""
    args, chosen = run.args, {}
    if args.bits_weight >= OUTER_BITS:
        return run
    outer = outer_bits(args.bits_weight, args.target)
    if outer and not says(words_of(run.argv), ("bits_first_last",)):
        chosen["bits_first_last"] = outer
        if distributed.is_main_process():
            print(f"bits: {args.bits_weight} of weights, {outer} of the first and the last layer's")
    return _with_leaves(_typed(run, chosen), captured, True)


def _with_leaves(run: Run, captured: fx.GraphModule, learned: bool) -> Run:
    """The run as if its command line asked for dead leaves, where these serve weights of few bits and it does not say.

    learned: rounding may be learned from them.
    """
    args = run.args
    if args.bits_weight >= OUTER_BITS or args.images or says(words_of(run.argv), ("distill_start", "distill_steps")):
        return run
    settings = for_few_bits(captured, run.spec, settings_of(args), learned)
    if settings.start == args.distill_start:
        return run
    if distributed.is_main_process():
        more = f", half of them distilled for {settings.steps} steps" if settings.steps else ""
        print(f"images: dead leaves, which meet the network's statistics as they are{more}")
    chosen = {"distill_start": settings.start, "distill_steps": settings.steps}
    if args.distill_images < LEAVES and not says(words_of(run.argv), ("distill_images",)):
        chosen["distill_images"] = LEAVES
    return _typed(run, chosen)


def _typed(run: Run, flags: Mapping[str, Any]) -> Run:
    """The run as if its command line had these flags too."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return replace(run, argv=words_of(run.argv) + words, args=Namespace(**vars(run.args) | flags))


def _run_recipes(run: Run, evaluator: Evaluator | None, recipes: Sequence[Recipe], quantize: Quantize) -> None:
    captured, kinds = None, {False: run, True: run}  # by whether rounding is learned
    looking = sorted({recipe.learns_rounding for recipe in recipes if recipe.needs_images})
    if run.args.bits_weight < OUTER_BITS and looking:
        captured = _captured(run, evaluator)
        kinds |= {learned: _with_leaves(run, captured, learned) for learned in looking}
    args, defaults = run.args, cli.defaults(run.task)
    runs = [kinds[one.learns_rounding] if one.needs_images or args.fidelity else run for one in recipes]
    lines = [own.line(recipe) for own, recipe in zip(runs, recipes, strict=True)]
    done = _recorded(run, defaults)
    missing = [i for i, line in enumerate(lines) if records.identity(line, defaults) not in done]
    if args.table:
        print(f"{len(recipes)} rows, {len(recipes) - len(missing)} of them in {args.results} already")
    needed = any(recipes[i].needs_images for i in missing)
    model, spec = run.network.model, run.spec
    captured = captured or (_captured(run, evaluator) if missing else None)

    @cache
    def images_for(learned: bool) -> Images | None:
        return images_of(kinds[learned].args, run.task, model, spec, run.device, needed, captured)

    start = time.monotonic()
    for count, i in enumerate(missing, start=1):
        learned = recipes[i].learns_rounding
        images = images_for(learned if learned in looking or not looking else looking[0])
        sources = {"images": images.calibration, "judging": images.judging, "real": images.real} if images else {}
        quantized = quantize(model, spec, recipes[i], captured=captured, device=run.device, **sources)
        _write_files(runs[i], recipes[i], quantized, evaluator)
        if evaluator is None:
            _say(runs[i], quantized, images)
            return
        row = evaluate_row(runs[i], evaluator, recipes[i], quantized, images)
        lines[i] = row.line
        _keep(runs[i], evaluator, row)
        if args.table and count < len(missing):
            seconds = time.monotonic() - start
            left = seconds / count * (len(missing) - count)
            print(f"\nrow {count} of {len(missing)} after {_minutes(seconds)}; about {_minutes(left)} left\n")
    if args.table:
        _finish_table(run, [done.get(records.identity(line, defaults), line) for line in lines])


def _captured(run: Run, evaluator: Evaluator | None) -> fx.GraphModule:
    """The network's graph, whose batch the evaluation must be able to feed."""
    captured = run.captured
    if captured.meta["batch"] not in (None, run.args.batch_size) and evaluator is not None:
        raise UserError(
            f"the network takes {captured.meta['batch']} image(s) at a time; pass --batch_size {captured.meta['batch']}"
        )
    return captured


def _keep(run: Run, evaluator: Evaluator, row: Row) -> None:
    """The row's page, if one was asked for, and its line."""
    if distributed.is_main_process():
        _report(run, evaluator, row)
        records.record(run.args.results, row.line)


def evaluate_row(
    run: Run,
    evaluator: Evaluator,
    recipe: Recipe,
    quantized: Quantized,
    images: Images | None,
    known: Mapping[str, Any] = MappingProxyType({}),
) -> Row:
    """Score a recipe's networks and print what was found. known: what else its line says."""
    args, labels, line = run.args, dict(recipe.labels), run.line(recipe) | known
    networks = networks_of(run.network.model, quantized, recipe)
    print(cli.headline(args, run.network, len(evaluator.data.samples), recipe.row_name))
    measured = _say(run, quantized, images)
    if args.engine != "simulate":
        name, simulated = labels["quantized"], networks.pop("quantized")
        labels |= {"simulated": f"{name}, simulated", "quantized": f"{name}, {ENGINES[args.engine].title}"}
        names, probes = evaluator.data.names, evaluator.probes()
        networks |= deployment.in_engine(run, recipe, quantized, simulated, names, probes)

    metrics, seconds = evaluator.score(networks, {n: k for n, k in run.float_keys(recipe).items() if n in networks})
    found = scores.score(metrics, seconds, labels)
    scores.print_table(found, metrics)
    if not args.table:
        scores.print_classes(found, metrics)
    line |= scores.outcome(metrics, found)
    if images and images.real:
        line["images"] = {"calibration": len(images.calibration), "judging": len(images.judging)}
        line["images"]["skipped"] = list(images.skipped)
    if measured:
        line["fidelity"] = measured
    if args.engine != "simulate":
        line["agreement"] = deployment.check_agreement(networks["quantized"])
    return Row(recipe, quantized, images, networks, metrics, labels, found, line)


def _say(run: Run, quantized: Quantized, images: Images | None) -> dict[str, Any]:
    """Print what the passes did, and how near the network is to float on images; returns the latter, as a line has it."""
    args = run.args
    if args.verbose or not args.table:
        print(quantized.log.report(args.verbose))
    else:
        print("".join(f"{line}\n" for line in quantized.log.warning_lines()), end="")
    if quantized.fidelity is None:
        return {}
    count = len(images.judging)
    same = agreement(
        quantized.float, quantized.simulated, images.judging, run.task.predictions, quantized.float.meta["batch"] or 16
    )
    print(quantized.fidelity.report(count, args.verbose, images.real))
    print(f"  on {held_out(count, images.real)}: {same:.1f} % of predictions agree with the float network's")
    judge = Judge(run.captured, views(images.judging, images.real))
    return {"images": count, "agreement": same, "noise": judge(quantized).noise} | asdict(quantized.fidelity)


def _recorded(run: Run, defaults: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of a table, the lines that the results file holds already, by identity."""
    own = {}
    if run.args.table and distributed.is_main_process():
        lines = records.recover(run.args.results)
        own = {records.identity(line, defaults): line for line in lines if line["task"] == run.task.name}
    return distributed.all_gather(own)[0]  # other machines may not see the file


def _write_files(run: Run, recipe: Recipe, quantized: Quantized, evaluator: Evaluator | None) -> None:
    if run.args.save or run.args.export:
        names = evaluator.data.names if evaluator else run.network.extras.get("names", {})
        probes = evaluator.probes() if evaluator else run.spec.probe(8)
        deployment.write_files(run, recipe, quantized, names, probes)


def _report(run: Run, evaluator: Evaluator, row: Row) -> None:
    """The row's page, if one was asked for."""
    if run.args.report:
        from utils.experiment import report  # draws with matplotlib, which is slow to import

        folder = run.args.report / records.file_name(row.line) if run.args.table else run.args.report
        file = report.write_row(make_folder(folder), run, evaluator, row)
        print(f"\n{file} shows it, with the files beside it")


def _finish_table(run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
    scores.print_rows(rows)
    if run.args.report and distributed.is_main_process():
        links = [f"{records.file_name(row)}/report.html" for row in rows]
        title, lead = f"{run.network.name}: {len(rows)} rows", f"weights {run.network.weights}"
        page.write_index(run.args.report / "index.html", title, lead, scores.row_cells(rows), links)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
