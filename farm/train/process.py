"""The same training in this process, as a group of one: no Ray, no second process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, distributed

from farm.train.loop import FitResult, FitTask, Report, Save, fit
from farm.train.training import StepsDone


def fit_in_process(
    task: FitTask,
    trunk: Mapping[str, Tensor] | None,
    folder: Path,
    resume: Path | None = None,
    steps_done: StepsDone | None = None,
    report: Report | None = None,
) -> FitResult:
    """Runs `fit` and leaves its last checkpoint, the result included, in `folder`, unless `report` handles them."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on a launcher's variable
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)

    def keep(_metrics: dict[str, float], save: Save | None) -> None:
        if save is not None:
            save(folder)

    return fit(task, trunk=trunk, resume=resume, report=report or keep, steps_done=steps_done)
