"""One run over several processes, as torchrun starts them: who does which share, and how the shares come together.

Every process builds the same networks and takes its share of the batches; what they find is put together
in the order of a single process, and only the first one prints and writes. Without torchrun there is
one process, and nothing here does anything.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn

import torch
from torch import distributed

from utils.core.errors import UserError


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Within it this process is one of those that torchrun started, if it did; the others are silent but for errors."""
    if not distributed.is_torchelastic_launched():
        yield
        return
    signal.signal(signal.SIGTERM, _stopped)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        if is_first():
            yield
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                yield
    finally:
        distributed.destroy_process_group()


def _stopped(*_: object) -> NoReturn:
    raise UserError("stopped, since another process of this run has ended; rows recorded so far are kept")


def share(items: Sequence) -> Sequence:
    """This process's part: the parts of all processes, one after the other, are the items."""
    first, last = (len(items) * (rank() + end) // processes() for end in (0, 1))
    return items[first:last]


def gather(value: Any) -> list[Any]:
    """Every process's value, in their order, in every process. A lost process is a UserError."""
    if processes() == 1:
        return [value]
    values = [None] * processes()
    try:
        distributed.all_gather_object(values, value)
    except RuntimeError:  # of whatever kind the transport has
        raise UserError(
            "lost another process of this run; rows recorded so far are kept: start the same command again"
        ) from None
    return values


def concatenated(parts: list) -> list:
    """The lists of all processes as one."""
    return [item for part in gather(parts) for item in part]


def own_device(device: torch.device) -> torch.device:
    """A GPU of this process's own, where several run on one machine and the flag names no number."""
    if processes() == 1 or device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextmanager
def first_before_others() -> Iterator[None]:
    """The first process runs the block while the others wait: it downloads or renders what they then find."""
    if not is_first():
        gather(None)
    yield
    if is_first():
        gather(None)
