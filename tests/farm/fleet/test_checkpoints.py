"""Two training runs of one name in one store: neither breaks the other, and one goes on from what a killed one left."""

import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from farm.artifacts import Artifacts
from farm.draft.checkpoint import EXPERT_FILE, TRUNK_FILE
from farm.fleet.checkpoints import take_over
from farm.fleet.stage_keys import ADAPT
from farm.fleet.trainers import Attempts, TrainJob, train
from farm.resources import AdaptResources
from farm.store import ObjectStore, open_store
from farm.train.loop import FitTask
from farm.train.process import fit_in_process
from tests.farm.train.test_loop import changed, task, trunk_of

__all__ = ["task"]  # the fixture
EPOCHS = 12  # of three steps each, a checkpoint after every one


@pytest.fixture
def store(store_uri: str) -> ObjectStore:
    return open_store(store_uri)


@pytest.fixture
def jobs(task: FitTask, store: ObjectStore) -> list[TrainJob]:
    """The same target of three runs."""
    slow = changed(task, epochs=EPOCHS, save_every=1)

    def job() -> TrainJob:
        return TrainJob(
            name="t", stage=ADAPT, key="key", task=slow, store=store.uri,
            trunk=("beside", str(Path(str(task.expert)).with_name(TRUNK_FILE))), resources=AdaptResources(),
            attempts=Attempts(worker=0), record={},
        )  # fmt: skip

    return [job() for _ in range(3)]


def begin(job: TrainJob, store: ObjectStore) -> Any:
    """The run of a job, once it has left a checkpoint."""
    before, ref = len(_states(store)), train.remote(job)
    deadline = time.monotonic() + 240
    while len(_states(store)) <= before:
        assert time.monotonic() < deadline, "no checkpoint was written"
        ready, _ = ray.wait([ref], timeout=0.05)
        assert not ready, ray.get(ready)
    return ref


def _states(store: ObjectStore) -> set[str]:
    """Folders of runs with a checkpoint that is on their list."""
    keys = [key for key in store.list("train/") if key.endswith(".json") and "/checkpoint_manager" in key]
    return {key.split("/")[1] for key in keys if b"checkpoint_2" in store.get(key)}


@pytest.mark.ray
def test_a_run_beside_another_of_the_same_name_and_one_after_a_killed_one_end_as_they_should(
    ray_cluster: object, jobs: list[TrainJob], store: ObjectStore, tmp_path: Path
) -> None:
    killed = begin(jobs[0], store)
    ray.cancel(killed, force=True)
    with pytest.raises(ray.exceptions.RayError):
        ray.get(killed)
    left = sorted(key for key in store.list("train/") if "checkpoint_" in key)
    first = begin(jobs[1], store)
    second = train.remote(jobs[2])
    found = ray.get([first, second])
    assert found[0] == found[1] == Artifacts(store).find(ADAPT, "key")
    assert found[0].manifest["steps"] == 3 * EPOCHS
    whole = fit_in_process(jobs[0].task, trunk_of(jobs[0].task), tmp_path / "whole")
    assert 0 < found[0].manifest["positions"] < whole.positions, "the killed run's steps are not taken again"
    expected = load_file(tmp_path / "whole" / EXPERT_FILE)
    for name, value in load_file(Artifacts(store).path(found[0], EXPERT_FILE)).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
    assert sorted(key for key in store.list("train/") if "checkpoint_" in key) == left


def test_a_list_of_checkpoints_that_is_half_written_or_not_there_stops_no_other_run(
    store: ObjectStore,
) -> None:
    """A run that was killed while it wrote the list has left such a one."""
    store.put("train/adapt-t-key@half/checkpoint_manager_snapshot.json", b'{"ray_version": "2.')
    store.put("train/adapt-t-key@half/checkpoint_2026/state.json", b"{}")
    store.put("train/adapt-t-key@none/checkpoint_2026/state.json", b"{}")
    assert take_over(store, "adapt-t-key", "new") is None
    assert not store.list("train/adapt-t-key@new")
