"""The command line of a run, and of one row of it, to be typed again."""

import os
import shlex
import sys
from collections.abc import Container, Sequence

from utils.core import distributed
from utils.experiment.images import OF_IMAGES

# Flags of what chooses passes or only looks at them: a row of it is typed without.
OF_A_CHOICE = ("--table", "--rows", "--auto", "--max_noise", "--force", "--doctor", "--report")


def command(
    program: str,
    argv: Sequence[str] | None,
    passes: Sequence[str] | None = None,
    looks: bool = True,
    without: Sequence[str] = (),
) -> str:
    """The command line that started this run, to be typed again; or that of one of its rows, with that row's passes in
    the place of what chose them.

    without: other flags that go. looks: whether that row looks at images; where it does not, and the run says how images
    are made, they serve to judge it: --fidelity.
    """
    words = words_of(argv)
    if passes is not None:
        words = [*_without(words, (*OF_A_CHOICE, *without)), *passes]
        if not looks and says(words, OF_IMAGES):
            words.append("--fidelity")
    start = (
        ["torchrun", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"]
        if distributed.world_size() > 1
        else ["python"]
    )
    return shlex.join([*start, program, *words])


def words_of(argv: Sequence[str] | None) -> list[str]:
    """A script's arguments; None: the process's own."""
    return list(sys.argv[1:] if argv is None else argv)


def says(words: Sequence[str], names: Container[str]) -> bool:
    """Whether a command line has one of the flags. names: without their dashes."""
    return any(word.partition("=")[0].removeprefix("--") in names for word in words)


def _without(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The words of a command line without these flags and their values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in flags
        if not dropping:
            kept.append(word)
    return kept
