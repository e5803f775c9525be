"""The queue of driver tasks: bounded, first in first out, and one task's death is one outcome."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.train import ControllerError, WorkerGroupError

from farm.fleet.pool import TargetFailed, describe, run_bounded

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


@ray.remote(num_cpus=0, max_calls=1, max_retries=0)
def _work(folder: str, name: str, how: str) -> str:
    started = Path(folder) / f"{time.monotonic_ns()}-{name}"
    started.touch()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise OSError("no room\nand a second line")
    time.sleep(0.2)
    (Path(folder) / f"{name}.peak").write_text(str(len([p for p in Path(folder).glob("*-*")])))
    return name.upper()


@pytest.mark.ray
def test_a_killed_and_a_raising_task_are_one_outcome_each_and_order_is_kept(
    ray_cluster: object, tmp_path: Path
) -> None:
    specs = {
        name: (str(tmp_path), name, how)
        for name, how in {"a": "ok", "b": "kill", "c": "raise", "d": "ok", "e": "ok"}.items()
    }
    started: list[str] = []
    outcomes = {outcome.name: outcome for outcome in run_bounded(specs, _work, 2, started.append)}
    assert {name: outcomes[name].value for name in "ade"} == {"a": "A", "d": "D", "e": "E"}
    assert "WorkerCrashed" in describe(outcomes["b"].error)
    assert describe(outcomes["c"].error) == "OSError: no room"
    assert started == list("abcde")


@pytest.mark.ray
def test_no_more_than_width_tasks_are_in_flight(ray_cluster: object, tmp_path: Path) -> None:
    specs = {name: (str(tmp_path), name, "ok") for name in "abc"}
    ended: list[str] = []
    for outcome in run_bounded(specs, _work, width=1):
        ended.append(outcome.name)
        assert int((tmp_path / f"{outcome.name}.peak").read_text()) == len(ended)
    assert ended == ["a", "b", "c"]


def test_a_width_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="width"):
        list(run_bounded({}, _work, width=0))


TRACEBACKS = """[Rank 0 Error Snippet]:
Traceback (most recent call last):
  File "farm/train/loop.py", line 197, in _cached
    raise UserError(
farm.errors.UserError: t: form cached would cache 9.0 GiB; raise adapt.cached_bytes
"""


@pytest.mark.parametrize(
    "error",
    [
        WorkerGroupError(TRACEBACKS, {}),
        ControllerError(RuntimeError(TRACEBACKS)),
        TargetFailed(str(WorkerGroupError(TRACEBACKS, {}))),
    ],
    ids=["workers", "controller", "pack"],
)
def test_a_failed_training_is_told_by_what_its_worker_raised(error: Exception) -> None:
    assert (
        describe(error)
        == "farm.errors.UserError: t: form cached would cache 9.0 GiB; raise adapt.cached_bytes"
    )
