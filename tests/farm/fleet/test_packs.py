"""Targets that share a run end as alone; one that fails, or takes the run with it, is left out."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from pyarrow.fs import LocalFileSystem
from ray.train import WorkerGroupError
from safetensors.torch import load_file

from farm.artifacts import Artifacts
from farm.draft.checkpoint import EXPERT_FILE, TRUNK_FILE
from farm.fleet.packs import SMALL_BYTES, divide, drive, in_runs, jobs_of
from farm.fleet.pool import TargetFailed, describe
from farm.fleet.stage_keys import ADAPT
from farm.fleet.trainers import Attempts, PackJob, TrainJob, train, trainer
from farm.resources import AdaptResources
from farm.store import open_store
from farm.train.loop import FitTask
from farm.train.process import fit_in_process
from tests.farm.train.test_loop import task, trunk_of
from tests.farm.train.test_packed import called

__all__ = ["task"]  # the fixture


def sizes(jobs: int, at_once: int, most: int | None, expert_bytes: int = 1) -> list[int]:
    named: Any = [SimpleNamespace(name=str(number)) for number in range(jobs)]
    runs = divide(named, at_once, most, expert_bytes)
    names = [one.name for run in runs for one in (run.jobs if isinstance(run, PackJob) else (run,))]
    assert sorted(names) == sorted(job.name for job in named)
    return [len(run.jobs) if isinstance(run, PackJob) else 1 for run in runs]


def test_small_targets_share_as_many_runs_as_there_are_side_by_side() -> None:
    assert sizes(16, 2, None) == [8, 8]
    assert sizes(5, 2, None) == [3, 2]
    assert sizes(2, 2, None) == [1, 1]
    assert sizes(16, 2, None, SMALL_BYTES + 1) == [1] * 16
    assert sizes(7, 2, 3) == [3, 2, 2]
    assert sizes(4, 1, 1) == [1] * 4


@pytest.mark.parametrize(
    ("pack", "parallel", "num_runs", "at_once"), [(4, 2, 1, 1), (1, 2, 4, 2), (None, 2, 2, 2), (2, 4, 2, 2)]
)
def test_only_runs_that_are_side_by_side_share_the_cores(
    monkeypatch: pytest.MonkeyPatch,
    task: FitTask,
    pack: int | None,
    parallel: int,
    num_runs: int,
    at_once: int,
) -> None:
    monkeypatch.setattr("farm.fleet.packs.runs_at_once", lambda resources: resources.parallel)
    resources = AdaptResources(pack=pack, parallel=parallel)
    like: Any = {
        "stage": ADAPT,
        "task": task,
        "store": "",
        "trunk": None,
        "attempts": Attempts(),
        "record": {},
    }
    jobs = [TrainJob(name=name, key=name, resources=resources, **like) for name in "abcd"]
    runs = in_runs(jobs)
    assert len(runs) == num_runs
    assert sorted(job.name for run in runs for job in jobs_of(run)) == list("abcd")
    assert {job.at_once for run in runs for job in jobs_of(run)} == {at_once}


class Trained:
    """Stands for Ray Train in `drive`: a run does to the store what `ends` says of its targets, in turn."""

    def __init__(self, folder: Path, *ends: str) -> None:
        self.store, self._folder = open_store(folder.as_uri()), folder / "run"
        self.names: list[str] = []
        self._ends, self._failed = dict(zip("abc", ends, strict=True)), {}

    def pack(self) -> PackJob:
        like: Any = {
            "stage": ADAPT, "task": None, "store": self.store.uri, "trunk": None,
            "resources": AdaptResources(), "attempts": Attempts(), "record": {},
        }  # fmt: skip
        return PackJob(tuple(TrainJob(name=name, key=name, **like) for name in self._ends))

    def trainer(self, _like: TrainJob, _worker: object, config: dict[str, Any], run_name: str) -> Any:
        self.names.append(run_name)
        return SimpleNamespace(fit=lambda: self._fit(config["pack"], config["at"]))

    def _fit(self, pack: PackJob, at: str) -> Any:
        artifacts = Artifacts(self.store)
        for job in (job for job in pack.jobs if artifacts.find(ADAPT, job.key) is None):
            self.store.put(at, job.name.encode())
            how = self._ends[job.name]
            if how == "raises":
                raise WorkerGroupError(
                    f"[Rank 0 Error Snippet]:\nTraceback\nOSError: {job.name} is full\n", {}
                )
            self._ends[job.name] = "well"
            if how == "dies":
                raise KeyboardInterrupt
            artifacts.finish(ADAPT, job.key, {})
        self._folder.mkdir()
        return SimpleNamespace(return_value={}, filesystem=LocalFileSystem(), path=str(self._folder))


def test_a_run_that_a_target_takes_with_it_goes_on_without_it_and_keeps_the_whole_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained = Trained(tmp_path, "well", "raises", "well")
    monkeypatch.setattr("farm.fleet.packs.trainer", trained.trainer)
    reasons = drive(trained.pack())
    assert set(reasons) == {"b"}
    assert "Training failed due to worker errors:\n[Rank 0" in reasons["b"]
    assert describe(TargetFailed(reasons["b"])) == "OSError: b is full"
    assert len(set(trained.names)) == 2
    assert all(Artifacts(trained.store).find(ADAPT, name) for name in "ac")


def test_a_driver_that_is_started_again_finds_its_run_by_the_same_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained = Trained(tmp_path, "well", "dies", "well")
    monkeypatch.setattr("farm.fleet.packs.trainer", trained.trainer)
    pack = trained.pack()
    with pytest.raises(KeyboardInterrupt):
        drive(pack)
    assert drive(pack) == {}
    assert trained.names == [pack.run_name] * 2


@pytest.mark.ray
def test_packed_targets_equal_their_solo_runs_and_bad_ones_stop_no_other(
    ray_cluster: object, task: FitTask, tmp_path: Path
) -> None:
    """`far` diverges, `gone` has no answers; `odd` has a draft of another size, which no rank expects."""
    good = {name: called(task, name, seed=seed, epochs=4) for seed, name in enumerate(("one", "two"))}
    assert task.expert is not None
    odd = replace(called(task, "odd"), draft=replace(task.draft, num_heads=1, num_kv_heads=1, head_dim=5))
    bad = {
        "far": called(task, "far", lr=1e30, clip=1e30, epochs=20),
        "gone": replace(called(task, "gone"), shards=(str(tmp_path / "features-00000.safetensors"),)),
        "odd": replace(odd, expert=None),
    }
    tasks = [good["one"], bad["far"], bad["gone"], bad["odd"], good["two"]]
    store = open_store((tmp_path / "store").as_uri())

    def job(of: FitTask) -> TrainJob:
        return TrainJob(
            name=of.target.name, stage=ADAPT, key=f"key-{of.target.name}", task=of, store=store.uri,
            trunk=("packed", str(Path(str(task.expert)).with_name(TRUNK_FILE))), resources=AdaptResources(),
            attempts=Attempts(worker=0), record={"target": of.target.name},
        )  # fmt: skip

    reasons = ray.get(train.remote(PackJob(tuple(map(job, tasks)))))
    assert set(reasons) == {"far", "gone", "odd"}
    assert "not finite" in reasons["far"]
    assert "features-00000" in reasons["gone"]
    artifacts = Artifacts(store)
    for name, alone in good.items():
        found = artifacts.find(ADAPT, f"key-{name}")
        assert found is not None
        assert found.manifest["target"] == name
        assert 0 < sum(found.manifest["loop_seconds"].values()) < found.manifest["seconds"]
        fit_in_process(alone, trunk_of(alone), tmp_path / name)
        expected = load_file(tmp_path / name / EXPERT_FILE)
        for key, value in load_file(artifacts.path(found, EXPERT_FILE)).items():
            torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-5)
    assert not list((tmp_path / "store" / "train").glob("pack-*"))


@pytest.mark.ray
def test_workers_keep_step_where_another_run_publishes_a_target_between_their_looks(
    ray_cluster: object, task: FitTask, tmp_path: Path
) -> None:
    def worker(config: dict[str, Any]) -> dict[str, str]:
        from ray.train import get_context

        from farm.fleet import packs

        packs._is_done = lambda _job: get_context().get_world_rank() == 1  # whose look is the later one
        return packs.pack_worker(config)

    job = TrainJob(
        name="t", stage=ADAPT, key="key", task=task, store=(tmp_path / "store").as_uri(),
        trunk=("in step", str(Path(str(task.expert)).with_name(TRUNK_FILE))), resources=AdaptResources(workers=2),
        attempts=Attempts(worker=0), record={},
    )  # fmt: skip

    @ray.remote(num_cpus=0, max_calls=1)
    def drive_it() -> Any:
        config = {"pack": PackJob((job,)), "at": "train/in-step.at"}
        return trainer(job, worker, config, "in-step").fit().return_value

    assert ray.get(drive_it.remote()) == {}
    assert Artifacts(open_store(job.store)).find(ADAPT, "key") is not None
