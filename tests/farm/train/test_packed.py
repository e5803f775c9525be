"""Targets in one run end as they would alone; one that fails, or a run that is killed, costs the others nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from farm.draft.checkpoint import EXPERT_FILE
from farm.train import packed
from farm.train.loop import FitResult, FitTask, Save
from farm.train.packed import Packed, fit_packed
from farm.train.process import fit_in_process
from tests.farm.train.test_loop import Killed, changed, task, trunk_of

__all__ = ["task"]  # the fixture


class Store:
    """Keeps finished experts by target, and the last checkpoint; dies at the `fatal`-th report."""

    def __init__(self, root: Path, fatal: int | None = None) -> None:
        self.root, self.reports, self.fatal = root, 0, fatal

    def done(self, name: str) -> bool:
        return (self.root / name).exists()

    def report(self, name: str, metrics: dict[str, float], save: Save) -> None:
        self.reports += 1
        checkpoint = self.root / "checkpoint"
        checkpoint.mkdir(parents=True, exist_ok=True)
        save(checkpoint)
        if self.reports == self.fatal:
            raise Killed

    def finished(self, name: str, result: FitResult, save: Save) -> None:
        (self.root / name).mkdir()
        save(self.root / name)

    def expert(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.root / name / EXPERT_FILE)

    def run(self, tasks: list[FitTask], resume: Path | None = None) -> Packed:
        options = {"done": self.done, "report": self.report, "finished": self.finished}
        return fit_packed(tasks, trunk_of(tasks[0]), resume=resume, **options)


def called(task: FitTask, name: str, **settings: object) -> FitTask:
    return changed(replace(task, target=task.target.model_copy(update={"name": name})), **settings)


@pytest.fixture
def tasks(task: FitTask, tmp_path: Path) -> list[FitTask]:
    fit_in_process(task, trunk_of(task), tmp_path / "group")  # makes the group of one
    return [
        called(task, "a", seed=1),
        called(task, "b", lr=1e30, clip=1e30, epochs=20),
        called(task, "c", seed=3, form="cached"),
    ]


def test_a_target_that_diverges_fails_alone_and_the_others_end_as_in_runs_of_their_own(
    tasks: list[FitTask], tmp_path: Path
) -> None:
    store = Store(tmp_path / "packed")
    ended = store.run(tasks)
    assert set(ended.results) == {"a", "c"}
    assert "not finite" in ended.failures["b"]
    for one in (tasks[0], tasks[2]):
        fit_in_process(one, trunk_of(one), tmp_path / one.target.name)
        alone = load_file(tmp_path / one.target.name / EXPERT_FILE)
        for name, value in store.expert(one.target.name).items():
            torch.testing.assert_close(value, alone[name])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("error", [OSError("no space"), FloatingPointError("not finite")])
def test_of_several_ranks_none_goes_on_alone_after_what_the_others_may_not_have_met(
    task: FitTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, error: Exception
) -> None:
    """A loss that is not finite is not so on all ranks."""

    def fit(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(packed, "fit", fit)
    monkeypatch.setattr(packed.distributed, "get_world_size", lambda: world)
    todo = [called(task, "a"), called(task, "b")]
    if world > 1 and isinstance(error, OSError):
        with pytest.raises(OSError, match="no space"):
            Store(tmp_path).run(todo)
        return
    failures = Store(tmp_path).run(todo).failures
    assert set(failures) == {"a", "b"}
    assert failures["a"].startswith("Traceback")
    assert failures["a"].endswith(f"{type(error).__name__}: {error}\n")


def test_an_early_stop_ends_its_own_target_and_the_others_go_on_to_their_end(
    tasks: list[FitTask], tmp_path: Path
) -> None:
    """The rule is the same for all: `b` learns too slowly to gain anything, before and after targets that do gain."""
    stop = {"held_out": 0.25, "every": 1, "patience": 2, "min_gain": 1e-6}
    rates = {"a": 3e-3, "b": 1e-12, "c": 3e-3}
    todo = [called(tasks[0], name, lr=lr, epochs=3, early_stop=stop) for name, lr in rates.items()]
    ended = Store(tmp_path / "packed").run(todo)
    assert not ended.failures
    assert {name: result.steps for name, result in ended.results.items()} == {"a": 6, "b": 3, "c": 6}
    measured = {name: [step for step, _ in result.held_out] for name, result in ended.results.items()}
    assert measured == {"a": [1, 2, 3, 4, 5, 6], "b": [1, 2, 3], "c": [1, 2, 3, 4, 5, 6]}


def test_a_killed_run_goes_on_with_the_target_it_was_at(tasks: list[FitTask], tmp_path: Path) -> None:
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken", fatal=3)
    todo = [tasks[0], called(tasks[0], "d", seed=4)]  # two reports each
    whole.run(todo)
    with pytest.raises(Killed):
        broken.run(todo)
    assert broken.done("a")
    assert not broken.done("d")
    broken.fatal = None
    resumed = broken.run(todo, resume=tmp_path / "broken" / "checkpoint")
    assert set(resumed.results) == {"d"}
    assert resumed.results["d"].positions < whole.run([called(tasks[0], "e", seed=4)]).results["e"].positions
    for name in ("a", "d"):
        for key, value in whole.expert(name).items():
            torch.testing.assert_close(value, broken.expert(name)[key], atol=1e-6, rtol=1e-5)
