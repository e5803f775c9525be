"""Many small targets in one run: a worker fits one after the other, so that processes and groups start once.

Every target keeps an optimizer, a clip, an early stop and a check for what is not finite of its own; one that fails
leaves the others as they would have been alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from torch import Tensor

from farm.config import UserError
from farm.train.loop import FitResult, FitTask, Save, fit
from farm.train.training import StepsDone

NAME_FILE = "target.txt"  # in a checkpoint: whose it is

PackedReport = Callable[[str, dict[str, float], Save], None]  # target, metrics, how to write its checkpoint
Finished = Callable[[str, FitResult, Save], None]
# What is wrong with one target: its settings, its answers, its numbers. All ranks meet it at the same place.
OWN_ERRORS: Final = (UserError, FloatingPointError, OSError, ValueError, SafetensorError)


@dataclass(frozen=True)
class Packed:
    """What became of each target by name: its result, or the reason why it has none."""

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
    of OWN_ERRORS fails its target alone.
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
            failures[name] = f"{type(error).__name__}: {error}"
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
