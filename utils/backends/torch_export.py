"""The simulated network as a program of torch.export, for those who stay in PyTorch: one file, no code of this project."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from utils.backends.lowering import lower_to_integers
from utils.core.errors import UserError
from utils.core.files import atomic_write
from utils.core.input_spec import InputSpec
from utils.graph.nodes import first_line, outputs_of

SUFFIX = ".pt2"


def export_program(
    simulated: fx.GraphModule,
    spec: InputSpec,
    file: Path,
    metadata: Mapping[str, Any],
    images: Tensor | None = None,
) -> str:
    """Write what --engine simulate scores, integers carried exactly; read it back, run it, and compare bit for bit.

    metadata: what JSON can say, kept in the file as "dfq.json". images: to compare on (default: random ones). Returns a line to print. What torch.export cannot write, and a program
    that computes something else than the network, are UserErrors; a file of that name then stays as it is.
    """
    images = spec.probe(8) if images is None else images
    lowered, batch = lower_to_integers(simulated), simulated.meta["batch"]
    images = images[: batch or len(images)]
    shapes = None if batch else ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        expected = [value.clone() for value in outputs_of(lowered(images.clone()))]
        try:
            program = torch.export.export(lowered, (images.clone(),), dynamic_shapes=shapes, strict=False)
        except Exception as error:  # of many classes, torch's and those of what it calls
            raise UserError(f"torch.export cannot write the network: {first_line(error)[:240]}") from error
        with atomic_write(file) as beside:
            with open(beside, "wb") as stream:
                torch.export.save(program, stream, extra_files={"dfq.json": json.dumps(metadata)})
            with open(beside, "rb") as stream:
                found = outputs_of(torch.export.load(stream).module()(images.clone()))
            if not all(map(torch.equal, found, expected)):
                raise UserError(f"{str(file)!r} computes something else than the network; nothing was exported")
            size = beside.stat().st_size
    return f"exported {file}: torch.export, {size / 1e6:.2f} MB, equal to the simulation on {len(images)} images"
