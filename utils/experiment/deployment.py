"""What leaves a run, and what runs in its place: saved and exported networks, and an engine beside the simulation.

What exports or runs an engine is imported here alone, and only when it is asked for: it is slow to import.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from utils.backends.base import is_own, load_engine
from utils.backends.parity import AGREEMENT, Compared, Remembered
from utils.backends.torch_export import SUFFIX as PROGRAM
from utils.backends.torch_export import export_program
from utils.core import distributed
from utils.core.errors import UserError
from utils.core.predictions import Agreement
from utils.experiment import records
from utils.experiment.records import DEMO
from utils.passes.result import Quantized
from utils.quantization import serialization as artifact
from utils.quantization.recipe import Recipe
from utils.quantization.target import check_engine

if TYPE_CHECKING:
    from utils.experiment.runner import Run


def write_files(run: "Run", recipe: Recipe, quantized: Quantized, names: Mapping[int, str], probes: Tensor) -> None:
    """The files that --save and --export ask for. names: of the classes. probes: images to hold an export to."""
    args, network = run.args, run.network
    if not distributed.is_main_process():
        return
    if args.save:
        if strange := [value for value in run.extras.values() if not isinstance(value, Mapping)]:
            raise UserError(
                f"--save cannot write {type(strange[0]).__name__}, which your network brings along; leave out --save"
            )
        parts = quantized.float, quantized.simulated
        about = dict(recipe.settings), run.spec, run.task.name, network.name, DEMO if args.demo else network.weights
        extras = {**run.extras, "names": dict(names)}
        artifact.save(args.save, artifact.Saved(run.captured, *parts, *about, extras))
        print(f"saved {args.save}: {args.save.stat().st_size / 1e6:.2f} MB")
    if args.export:
        metadata = describe(run, recipe, names)
        if args.export.suffix == PROGRAM:
            print(export_program(quantized.simulated, run.spec, args.export, metadata, probes))
            return
        from utils.backends.onnxruntime.export import export

        predictions = run.task.predictions
        form = args.opset, recipe.engine, args.weight_type
        print(export(quantized, run.spec, args.export, metadata, probes, predictions, *form))


def in_engine(
    run: "Run", recipe: Recipe, quantized: Quantized, simulated: nn.Module, names: Mapping[int, str], probes: Tensor
) -> dict[str, nn.Module]:
    """The simulation, and the engine in its place, once layer by layer they do the same on a few images."""
    from utils.backends.onnxruntime.export import build, check_parity, describe_kernels

    name = run.args.engine
    check_engine(recipe.target, name)
    form = run.args.opset, recipe.engine, run.args.weight_type
    model = build(quantized, run.spec, describe(run, recipe, names), *form)
    print(describe_kernels(model, quantized, name))
    parity = check_parity(model, quantized.simulated, probes, run.task.predictions, name, recipe.engine)
    print(f"  {parity}")
    simulation = Remembered(simulated)
    engine = load_engine(name).network(model.SerializeToString(), foreign=not is_own(name, recipe.engine))
    return {
        "simulated": simulation,
        "quantized": Compared(engine, simulation, parity.first_parting, run.task.predictions),
    }


def check_agreement(engine: Compared) -> float:
    """Percent of predictions on all images that are the same in engine and simulation; too few are a UserError."""
    total = Agreement(engine.agreement.predictions)
    for same, count in distributed.all_gather((engine.agreement.same, engine.agreement.count)):
        total.same, total.count = total.same + same, total.count + count
    print(f"\nengine and simulation predict the same for {100 * total.share:.2f} % of {total.count:,}")
    if total.share < AGREEMENT:
        first = engine.first_parting.name if engine.first_parting else "none of the layers of a few images"
        raise UserError(
            f"the engine agrees with the simulation on {100 * total.share:.2f} % of predictions, where {AGREEMENT:.0%} are "
            f"asked for; they first part at {first}, and nothing was recorded"
        )
    return 100 * total.share


def describe(run: "Run", recipe: Recipe, names: Mapping[int, str]) -> dict[str, Any]:
    """An exported file's metadata."""
    return {
        "recipe": str(recipe),
        "settings": dict(recipe.settings),
        "model": run.network.name,
        "weights": run.network.weights,
        "input": asdict(run.spec),
        "classes": {str(output): name for output, name in names.items()},
        "versions": records.versions(),
        "commit": records.commit(),
    }
