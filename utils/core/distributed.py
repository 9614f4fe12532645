"""One run over several processes, as torchrun starts them: the shard of each, and how the shards come together.

Every process builds the same networks and takes its shard of the batches; results are gathered
in the order of a single process, and only the main process prints and writes. Without torchrun there is
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


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main_process() -> bool:
    return rank() == 0


@contextmanager
def process_group() -> Iterator[None]:
    """Within it this process is one of those that torchrun started, if it did; the others are silent but for errors."""
    if not distributed.is_torchelastic_launched():
        yield
        return
    signal.signal(signal.SIGTERM, _stopped)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        if is_main_process():
            yield
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                yield
    finally:
        distributed.destroy_process_group()


def _stopped(*_: object) -> NoReturn:
    raise UserError("stopped, since another process of this run has ended; rows recorded so far are kept")


def shard(items: Sequence) -> Sequence:
    """This process's part of the items: the shards of all processes, one after the other, are the items."""
    first, last = (len(items) * (rank() + end) // world_size() for end in (0, 1))
    return items[first:last]


def all_gather(value: Any) -> list[Any]:
    """Every process's value, in their order, in every process. A lost process is a UserError."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    try:
        distributed.all_gather_object(values, value)
    except RuntimeError:  # of whatever kind the transport has
        raise UserError(
            "lost another process of this run; rows recorded so far are kept: start the same command again"
        ) from None
    return values


def all_gather_lists(parts: list) -> list:
    """The lists of all processes as one."""
    return [item for part in all_gather(parts) for item in part]


def own_device(device: torch.device) -> torch.device:
    """A GPU of this process's own, where several run on one machine and the flag names no number."""
    if world_size() == 1 or device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextmanager
def main_process_first() -> Iterator[None]:
    """The main process runs the block while the others wait: it downloads or renders what they then find."""
    if not is_main_process():
        all_gather(None)
    yield
    if is_main_process():
        all_gather(None)
