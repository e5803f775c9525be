"""Onboarding end to end on a tiny family: resume, a target that is added, targets that fail alone."""

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from farm.artifacts import Artifacts
from farm.draft.checkpoint import read_tensors, trunk_digest
from farm.evaluate.report import read_report
from farm.fleet.onboard import exit_code, onboard
from farm.fleet.trainers import RUN_VARIABLE, Attempts
from farm.registry import Registry
from farm.status import read_status
from farm.store import open_store
from tests.farm.fleet.family import Family

pytestmark = pytest.mark.ray


def _silent(line: str) -> None:
    """Progress lines are for people."""


class Farmed:
    """A store with two onboarded targets and a corrupt one, shared by the tests that build on it."""

    def __init__(self, family: Family, store: Path) -> None:
        self.family, self.store = family, store
        manifest = family.manifest("alpha", "torn", store=store)
        weights = Path(manifest.targets[1].model) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        self.report, self.folder = onboard(manifest, _silent)

    def files(self, below: str) -> dict[str, int]:
        """Files of the store with the time each was written."""
        return {
            str(path.relative_to(self.store)): path.stat().st_mtime_ns
            for path in sorted((self.store / below).rglob("*"))
            if path.is_file()
        }


@pytest.fixture(scope="module")
def farmed(ray_cluster: object, family: Family, tmp_path_factory: pytest.TempPathFactory) -> Farmed:
    return Farmed(family, tmp_path_factory.mktemp("farmed") / "store")


def test_a_corrupt_target_is_refused_alone_with_its_reason(farmed: Farmed) -> None:
    rows = {row.name: row for row in farmed.report.targets}
    assert rows["torn"].decision == "refused"
    assert "cannot be loaded" in rows["torn"].reason
    assert rows["alpha"].decision == "promoted"
    assert exit_code(farmed.report) == 1
    live = Registry(open_store(str(farmed.store))).live("alpha")
    assert live is not None
    assert live.version == rows["alpha"].adapter_version == "v1"
    assert live.card["trunk_key"] == farmed.report.trunk_key
    on_disk = read_report(Path(farmed.folder.removeprefix("file://")) / "report.json")
    assert on_disk == farmed.report
    statuses = {
        status.target: status for status in read_status(open_store(str(farmed.store)), on_disk.run_id)
    }
    assert all(status.finished for status in statuses.values())


def test_a_report_has_what_a_reader_decides_by(farmed: Farmed) -> None:
    row = next(row for row in farmed.report.targets if row.name == "alpha")
    assert len(row.survival_adapted) == farmed.report.k == 2
    assert row.gain_interval is not None
    assert row.rows == 16
    assert row.finish_reasons is not None
    assert row.retention is not None
    assert row.coverage == 1.0
    assert list(row.stage_seconds) == ["regenerate", "adapt", "evaluate"]
    assert row.speedup_adapted is not None
    assert farmed.report.curves["alpha"]


@pytest.mark.slow
def test_a_selection_is_kept_and_only_what_it_chose_is_adapted_on(farmed: Farmed, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(farmed.store, copy)
    before, said = set(open_store(str(copy)).list("artifacts/adapt/")), []
    manifest = farmed.family.manifest("alpha", store=copy, select={"strategy": "shift", "fraction": 0.5})
    report, _ = onboard(manifest, said.append)
    (row,) = report.targets
    assert (row.rows, row.selected) == (8, 0.5)
    assert list(row.stage_seconds) == ["regenerate", "select", "adapt", "evaluate"]
    store = open_store(str(copy))
    selected, adapted = (
        Artifacts(store).find(stage, name.split("/")[2])
        for stage in ("select", "adapt")
        for name in store.list(f"artifacts/{stage}/")
        if name.endswith("/manifest.json") and name not in before
    )
    assert selected is not None
    assert adapted is not None
    assert selected.manifest["settings"]["strategy"] == "shift"
    assert adapted.manifest["trained_tokens"] == selected.manifest["answer_tokens"] > 0
    assert any("8 of 16 answers kept" in line and "rank alike" in line for line in said)


def test_adapting_leaves_the_trunk_as_it_was_and_no_optimizer_state_behind(farmed: Farmed) -> None:
    store = open_store(str(farmed.store))
    (key,) = {name.split("/")[2] for name in store.list("artifacts/adapt/")}
    adapted = Artifacts(store).find("adapt", key)
    assert adapted is not None
    given = trunk_digest(read_tensors(farmed.family.trunk / "trunk.safetensors"))
    assert adapted.manifest["trunk_digest_before"] == adapted.manifest["trunk_digest_after"] == given
    assert not list((farmed.store / "train").glob("*/checkpoint*"))


def test_a_rerun_starts_no_work_and_ends_with_the_same_registry(
    farmed: Farmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = farmed.files("artifacts"), farmed.files("registry/alpha")
    started = count_remote_work(monkeypatch)
    manifest = farmed.family.manifest("alpha", store=farmed.store)
    report, _ = onboard(manifest, _silent)
    assert started == []
    assert (farmed.files("artifacts"), farmed.files("registry/alpha")) == before
    assert exit_code(report) == 0
    old = next(row for row in farmed.report.targets if row.name == "alpha")
    assert report.targets[0].model_copy(update={"reason": ""}) == old.model_copy(update={"reason": ""})


def test_an_added_target_runs_alone(farmed: Farmed, monkeypatch: pytest.MonkeyPatch) -> None:
    before = farmed.files("artifacts")
    started = count_remote_work(monkeypatch)
    report, _ = onboard(farmed.family.manifest("alpha", "beta", store=farmed.store), _silent)
    assert [row.decision for row in report.targets] == ["promoted", "promoted"]
    assert started == ["beta", "pipeline of beta", "beta", "beta"]  # check, answers, adapt, evaluate
    after = farmed.files("artifacts")
    assert {name: after[name] for name in before} == before


def count_remote_work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every task and pipeline that the stages really start, in order; they run as always."""
    from farm.fleet import datasets, packs, pool, prepare, stages

    started: list[str] = []

    def run_bounded(specs: Any, task: Any, *args: Any, **options: Any) -> Any:
        started.extend(specs)
        return pool.run_bounded(specs, task, *args, **options)

    real = datasets._run

    def run(jobs: Any, *args: Any) -> Any:
        if jobs:
            started.append("pipeline of " + " ".join(job.name for job in jobs))
        return real(jobs, *args)

    for module in (packs, prepare, stages):
        monkeypatch.setattr(module, "run_bounded", run_bounded)
    monkeypatch.setattr(datasets, "_run", run)
    return started


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_driver_are_failed_rows_and_the_others_go_on(
    farmed: Farmed,
) -> None:
    names = ("dire", "echo", "calm")
    manifest = farmed.family.manifest(
        *names,
        store=farmed.store,
        resources={"adapt": {"parallel": 2, "pack": 1}},
        adapt={"epochs": 10, "save_every": 2},
    )

    def is_training_worker(title: str, run_name: str) -> bool:
        # A worker that dies before training began counts as one that did not start, and is started again.
        begun = any(farmed.store.glob("train/adapt-dire-*/checkpoint_*"))
        return begun and "RayTrainWorker" in title and run_name.startswith("adapt-dire-")

    def is_driver(title: str, run_name: str) -> bool:
        return "train:echo" in title

    killer = Killer({"dire": is_training_worker, "echo": is_driver})
    with killer:
        report, _ = onboard(manifest, _silent, attempts=Attempts(worker=0, driver=0))
    assert killer.killed == {"dire", "echo"}
    rows = {row.name: row for row in report.targets}
    assert rows["calm"].decision == "promoted"
    assert rows["dire"].decision == rows["echo"].decision == "failed"
    assert rows["dire"].error
    assert rows["echo"].error
    assert "WorkerCrashed" in rows["echo"].reason
    assert exit_code(report) == 1


class Killer:
    """Kills the first process that matches, once for each target, while the block runs."""

    def __init__(self, victims: dict[str, Callable[[str, str], bool]]) -> None:
        self._victims, self.killed, self._stop = victims, set[str](), threading.Event()
        self._thread = threading.Thread(target=self._hunt)

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _hunt(self) -> None:
        while not self._stop.is_set() and len(self.killed) < len(self._victims):
            for process in psutil.Process().children(recursive=True):  # of this test's own cluster
                with suppress(psutil.Error):
                    self._consider(process)
            time.sleep(0.05)

    def _consider(self, process: psutil.Process) -> None:
        title, environment = " ".join(process.cmdline()), process.environ()
        for name, matches in self._victims.items():
            if name not in self.killed and matches(title, environment.get(RUN_VARIABLE, "")):
                process.kill()
                self.killed.add(name)
