"""Many small targets in one run: a worker fits one after the other, so that processes and groups start once.

Every target keeps an optimizer, a clip, an early stop and a check for what is not finite of its own; one that fails
leaves the others as they would have been alone.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from torch import Tensor, distributed

from farm.config import UserError
from farm.train.loop import FitResult, FitTask, Save, fit
from farm.train.training import StepsDone

NAME_FILE = "target.txt"  # in a checkpoint: whose it is

PackedReport = Callable[[str, dict[str, float], Save], None]  # target, metrics, how to write its checkpoint
Finished = Callable[[str, FitResult, Save], None]
# What is wrong with one target: its settings, its answers, its numbers.
OWN_ERRORS: Final = (UserError, FloatingPointError, OSError, ValueError, SafetensorError)


@dataclass(frozen=True)
class Packed:
    """What became of each target by name: its result, or the traceback of why it has none."""

    results: Mapping[str, FitResult]
    failures: Mapping[str, str]


def fit_packed(
    tasks: Sequence[FitTask],
    trunk: Mapping[str, Tensor],
    *,
    done: Callable[[str], bool],
    report: PackedReport,
    finished: Finished,
    started: Callable[[str], StepsDone | None] = lambda _name: None,
    resume: Path | None = None,
) -> Packed:
    """Fits every task that is not `done` yet, in order; every rank has to do the same.

    `started(target)` is called before a target begins, and gives what its steps are counted by. `finished(target,
    result, save)` is called once for each, before the next one begins; what it keeps is what `done` says when the run
    is started again. `resume` is a checkpoint that `report`'s save wrote: the target in it goes on from there. An error
    of OWN_ERRORS fails its target alone; where ranks have to keep step, any of them is raised that one rank may be
    alone with.
    """
    results: dict[str, FitResult] = {}
    failures: dict[str, str] = {}
    for task in tasks:
        name = task.target.name
        if done(name):
            continue
        saves: list[Save] = []

        def keep(
            metrics: dict[str, float], save: Save | None, name: str = name, saves: list[Save] = saves
        ) -> None:
            assert save is not None
            saves[:] = [_named(save, name)]
            report(name, metrics, saves[0])

        try:
            results[name] = fit(
                task, trunk=trunk, resume=_of(resume, name), report=keep, steps_done=started(name)
            )
        except OWN_ERRORS as error:
            # A rank with a full disk would enter the next target's collectives while the others wait in this one's.
            if distributed.get_world_size() > 1 and not isinstance(error, FloatingPointError):
                raise
            failures[name] = "".join(traceback.format_exception(error))
            continue
        finished(name, results[name], saves[0])
    return Packed(results, failures)


def _named(save: Save, name: str) -> Save:
    def write(folder: Path) -> None:
        save(folder)
        (folder / NAME_FILE).write_text(name)

    return write


def _of(resume: Path | None, name: str) -> Path | None:
    """The checkpoint, if it is this target's."""
    if resume is None or not (resume / NAME_FILE).exists() or (resume / NAME_FILE).read_text() != name:
        return None
    return resume
