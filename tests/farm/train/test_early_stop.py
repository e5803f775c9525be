"""Under an early stop the weights of the best measurement are published, whatever came after it.

What is measured is scripted: a tau a measurement, so that the step of the best one is known.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, multiprocessing

from farm.draft.checkpoint import EXPERT_FILE, TRUNK_FILE
from farm.train import training
from farm.train.loop import FitResult, FitTask, Save
from farm.train.packed import fit_packed
from farm.train.process import fit_in_process
from tests.farm.train.test_loop import Killed, assert_same_expert, changed, task, trunk_of

__all__ = ["task"]  # the fixture

STOP = {"held_out": 0.25, "every": 1, "patience": 2, "min_gain": 0.0}
NEVER = STOP | {"patience": 99}
FALLING = (1.1, 1.5, 1.2, 1.3, 1.2, 1.1)  # the second is the best


def scripted(patch: pytest.MonkeyPatch, taus: Iterator[float]) -> None:
    patch.setattr(training, "expected_tau", lambda *_: next(taus))


def stepwise(task: FitTask, folder: Path, until: int = 1000, resume: Path | None = None) -> FitResult:
    """Fits with a checkpoint a step, each in a folder of its number, the last one in `end`; dies at step `until`."""
    task = changed(task, save_every=1)

    def keep(metrics: dict[str, float], save: Save | None) -> None:
        assert save is not None
        step = int(metrics["step"])
        place = folder / (f"{step}" if not (folder / f"{step}").exists() else "end")
        place.mkdir(parents=True)
        save(place)
        if step == until:
            raise Killed

    return fit_in_process(task, trunk_of(task), folder, resume=resume, report=keep)


def weights_at(folder: Path, name: str = EXPERT_FILE) -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 0},
        {"zero_stage": 1, "tier": "expert-lora", "rank": 2},
        {"zero_stage": 2, "tier": "full"},
        {"form": "cached", "cached_tokens": 48},
        {"tier": "low-rank", "rank": 2},
    ],
    ids=str,
)
def test_a_run_that_gets_worse_publishes_what_it_was_at_its_best(
    task: FitTask, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, iter(FALLING))
    result = stepwise(changed(task, early_stop=STOP, epochs=5, **settings), tmp_path)
    assert (result.steps, result.best_step) == (4, 2)
    for name in (EXPERT_FILE, TRUNK_FILE) if settings.get("tier") == "full" else (EXPERT_FILE,):
        end = weights_at(tmp_path / "end", name)
        assert equal(end, weights_at(tmp_path / "2", name))
        assert not equal(end, weights_at(tmp_path / "4", name))


def test_a_run_that_takes_all_its_steps_publishes_its_best_too(
    task: FitTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, iter(FALLING))
    result = stepwise(changed(task, early_stop=NEVER, epochs=3), tmp_path)
    assert (result.steps, result.best_step) == (6, 2)
    assert equal(
        weights_at(tmp_path / "6"), weights_at(tmp_path / "2")
    )  # its only report at step 6 is the last


@pytest.mark.parametrize("taus", [(1.1, 1.2, 1.3), (1.3, 1.1, 1.3)], ids=["rising", "as good as the best"])
def test_nothing_is_put_back_where_the_last_measurement_is_the_best(
    task: FitTask, taus: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put_back(*_: object) -> None:
        raise AssertionError("the last weights were the best")

    scripted(monkeypatch, iter(taus))
    monkeypatch.setattr(training, "set_weights", put_back)
    result = fit_in_process(
        changed(task, early_stop=NEVER | {"every": 2}, epochs=3), trunk_of(task), tmp_path
    )
    assert (result.steps, result.best_step) == (6, 6)


@pytest.mark.parametrize(("every", "measured"), [(4, [4, 6]), (50, [6])])
def test_the_last_step_is_measured_whatever_divides_it(
    task: FitTask, every: int, measured: list[int], tmp_path: Path
) -> None:
    settings = {"early_stop": NEVER | {"every": every}, "epochs": 3}
    result = fit_in_process(changed(task, **settings), trunk_of(task), tmp_path)
    assert [step for step, _ in result.held_out] == measured
    best = max(tau for _, tau in result.held_out)
    assert (result.best_step, best) in result.held_out


def test_a_run_without_a_row_to_spare_publishes_its_last_weights(task: FitTask, tmp_path: Path) -> None:
    one = replace(changed(task, early_stop=STOP, epochs=3), rows=frozenset((3,)))
    result = fit_in_process(one, trunk_of(task), tmp_path / "stop")
    fit_in_process(changed(one, early_stop=None), trunk_of(task), tmp_path / "plain")
    assert (result.held_out, result.best_step) == ((), None)
    assert equal(weights_at(tmp_path / "stop"), weights_at(tmp_path / "plain"))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("killed_at", [2, 4], ids=["at its best", "after it"])
def test_a_resumed_run_keeps_the_best_of_before(
    task: FitTask, stage: int, killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = changed(task, early_stop=NEVER, epochs=3, zero_stage=stage)
    scripted(monkeypatch, iter(FALLING))
    with pytest.raises(Killed):
        stepwise(task, tmp_path / "killed", until=killed_at)
    scripted(monkeypatch, iter(FALLING[killed_at:]))
    place = tmp_path / "killed" / f"{killed_at}"
    result = fit_in_process(task, trunk_of(task), tmp_path / "resumed", resume=place)
    assert (result.steps, result.best_step) == (6, 2)
    assert result.held_out == tuple(enumerate(FALLING, start=1))
    assert equal(weights_at(tmp_path / "resumed"), weights_at(tmp_path / "killed" / "2"))


def test_a_resumed_run_forgets_a_best_that_it_beats(
    task: FitTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = changed(task, early_stop=NEVER, epochs=3)
    scripted(monkeypatch, iter(FALLING))
    with pytest.raises(Killed):
        stepwise(task, tmp_path / "killed", until=3)
    scripted(monkeypatch, iter((1.4, 1.6, 1.5)))
    result = stepwise(task, tmp_path / "resumed", resume=tmp_path / "killed" / "3")
    assert result.best_step == 5
    assert equal(weights_at(tmp_path / "resumed" / "6"), weights_at(tmp_path / "resumed" / "5"))


def test_resuming_a_run_that_had_ended_returns_its_best(
    task: FitTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = changed(task, early_stop=STOP, epochs=5)
    scripted(monkeypatch, iter(FALLING))
    whole = fit_in_process(task, trunk_of(task), tmp_path / "whole")
    again = fit_in_process(task, trunk_of(task), tmp_path / "again", resume=tmp_path / "whole")
    assert (again.steps, again.best_step, again.held_out) == (4, 2, whole.held_out)
    assert equal(weights_at(tmp_path / "again"), weights_at(tmp_path / "whole"))


def _worker(rank: int, world: int, task: FitTask, folder: str, resume: str | None) -> None:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(rank))
        group = f"file://{folder}/group"
        distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=world)
        scripted(patch, iter(FALLING if resume is None else FALLING[4:]))
        result = fit_in_process(
            task, trunk_of(task), Path(folder), resume=None if resume is None else Path(resume)
        )
        assert (result.steps, result.best_step) == (6, 2)
        distributed.destroy_process_group()


@pytest.mark.parametrize(("world", "stage", "resumed"), [(2, 0, False), (3, 2, False), (2, 1, True)])
def test_workers_publish_the_best_that_one_finds_and_that_a_checkpoint_of_one_has(
    task: FitTask, world: int, stage: int, resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are enough for every worker, and steps as many as of one."""
    task = changed(task, early_stop=NEVER, epochs=3, batch_rows=4, zero_stage=stage)
    scripted(monkeypatch, iter(FALLING))
    with pytest.raises(Killed):
        stepwise(task, tmp_path / "one", until=4)
    (tmp_path / "more").mkdir()
    resume = str(tmp_path / "one" / "4") if resumed else None
    multiprocessing.spawn(_worker, args=(world, task, str(tmp_path / "more"), resume), nprocs=world)
    assert_same_expert(tmp_path / "one" / "2", tmp_path / "more")
    assert not equal(weights_at(tmp_path / "one" / "4"), weights_at(tmp_path / "more"))


def test_targets_of_one_run_have_a_best_each(
    task: FitTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = []
    for name, seed in (("a", 1), ("b", 2)):
        named = replace(task, target=task.target.model_copy(update={"name": name}))
        tasks.append(changed(named, early_stop=STOP, epochs=5, seed=seed))
    scripts = {"a": FALLING, "b": (1.05, 1.1, 1.4, 1.2, 1.3)}
    for one in tasks:
        scripted(monkeypatch, iter(scripts[one.target.name]))
        fit_in_process(one, trunk_of(one), tmp_path / "alone" / one.target.name)
    scripted(monkeypatch, iter((*scripts["a"][:4], *scripts["b"])))

    def finished(name: str, _result: FitResult, save: Save) -> None:
        (tmp_path / name).mkdir()
        save(tmp_path / name)

    ended = fit_packed(tasks, trunk_of(task), done=lambda _: False, report=lambda *_: None, finished=finished)
    assert not ended.failures
    found = {name: (result.steps, result.best_step) for name, result in ended.results.items()}
    assert found == {"a": (4, 2), "b": (5, 3)}
    for name in scripts:
        assert equal(weights_at(tmp_path / name), weights_at(tmp_path / "alone" / name))
