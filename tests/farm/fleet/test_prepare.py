"""The trunk stage: the base answers, a vocabulary is chosen, trunk and base expert are trained and found again."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from farm.artifacts import TRUNK, Artifact, Artifacts
from farm.config import UserError
from farm.draft.checkpoint import load_expert, read_config, read_tensors, split_vocabulary
from farm.fleet import onboard, prepare
from farm.fleet.answers import ANSWERS
from farm.fleet.plan import make_plan
from farm.fleet.pool import Outcome
from farm.fleet.prepare import check_targets, measure_base, prepare_trunk
from farm.fleet.run import Run
from farm.fleet.trainers import Attempts
from farm.status import TargetStatus, read_status, unfinished_runs
from farm.store import open_store
from farm.target.load import target_digest
from tests.farm.fleet.family import Family
from tests.farm.fleet.test_damaged import run_of


def _run(family: Family, store: Path, *names: str) -> Run:
    manifest = family.manifest(*names, store=store, trunk=False, draft={"vocabulary": 30, "shared_width": 32})
    opened = open_store(manifest.store)
    lines: list[str] = []
    return Run(
        "r1", make_plan(manifest, Artifacts(opened), target_digest), opened, lines.append, Attempts(0, 0)
    )


@pytest.mark.slow
@pytest.mark.ray
def test_a_trunk_is_trained_once_and_serves_targets_that_are_added_later(
    ray_cluster: object, family: Family, store: Path
) -> None:
    first = _run(family, store, "alpha")
    trunk = prepare_trunk(first)
    folder = first.artifacts.path(trunk, "draft.json").parent
    config = read_config(folder)
    assert config.shared_width == 32
    vocabulary = split_vocabulary(read_tensors(folder / "trunk.safetensors"))[1]
    assert vocabulary is not None
    assert len(vocabulary) == 30
    load_expert(config, folder / "expert.safetensors")
    assert trunk.manifest["steps"] == 2
    assert not list((store / "train").glob("*/checkpoint*"))  # optimizer states do not stay

    later = _run(family, store, "alpha", "beta")
    assert later.trunk.reused
    assert prepare_trunk(later) == trunk
    assert later.artifacts.find(TRUNK, later.trunk.key) == trunk


@pytest.mark.parametrize("breaks", [False, True])
def test_a_trunk_trained_alone_leaves_no_target_undecided(
    family: Family, store: Path, monkeypatch: pytest.MonkeyPatch, breaks: bool
) -> None:
    """Whoever follows the run or cleans up would wait for the decision of a target that gets none."""
    manifest, seen = family.manifest("alpha", store=store), list[str]()

    def prepare(run: Run) -> Artifact:
        run.board.update("alpha", stage="trunk")
        seen.extend(unfinished_runs(run.store, 0.0))
        if breaks:
            raise OSError("no space")
        return prepare_trunk(run)

    monkeypatch.setattr(onboard, "check_cluster", lambda _: None)
    monkeypatch.setattr(onboard, "measure_base", lambda *_: None)
    monkeypatch.setattr(onboard, "prepare_trunk", prepare)
    with pytest.raises(OSError, match="no space") if breaks else nullcontext():
        onboard.train_trunk(manifest, print)
    assert len(seen) == 1
    assert unfinished_runs(open_store(manifest.store), 0.0) == []


def test_two_trunks_trained_alone_at_the_same_time_leave_each_other_their_records(
    family: Family, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (family.manifest(name, store=store) for name in ("alpha", "beta"))
    left: list[TargetStatus] = []

    def prepare(run: Run) -> Artifact:
        name = run.remaining[0].name
        run.board.update(name, stage="trunk")
        if name == "alpha":
            onboard.train_trunk(second, print)
            left.extend(read_status(run.store, run.run_id))
        return prepare_trunk(run)

    monkeypatch.setattr(onboard, "check_cluster", lambda _: None)
    monkeypatch.setattr(onboard, "measure_base", lambda *_: None)
    monkeypatch.setattr(onboard, "prepare_trunk", prepare)
    onboard.train_trunk(first, print)
    assert [record.target for record in left] == ["alpha"]
    assert unfinished_runs(open_store(first.store), 0.0) == []


def test_a_target_that_a_trunk_trained_alone_goes_without_is_named_with_the_reason(
    family: Family, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, said = family.manifest("alpha", "beta", store=store), list[str]()
    broken = manifest.targets[0].model_copy(update={"model": str(store / "nothing")})
    manifest = manifest.model_copy(update={"targets": (broken, manifest.targets[1])})
    monkeypatch.setattr(onboard, "check_cluster", lambda _: None)
    monkeypatch.setattr(onboard, "measure_base", lambda *_: None)
    onboard.train_trunk(manifest, said.append)
    assert [line.split(": ")[:2] for line in said] == [["alpha", "refused"]]


def _without_ray(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments of the probes that would have been run."""
    asked: list[tuple[Any, ...]] = []

    def run_bounded(specs: dict[str, tuple[Any, ...]], *_: object, **__: object) -> list[Outcome]:
        asked.extend(specs.values())
        return [Outcome(name, value=SimpleNamespace(manifest={"tau": 2.0})) for name in specs]

    monkeypatch.setattr(prepare, "run_bounded", run_bounded)
    return asked


def test_a_base_without_held_out_prompts_is_not_measured(
    family: Family, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of the targets, which are all refused with their own reasons."""
    asked = _without_ray(monkeypatch)
    manifest = family.manifest("alpha", store=store)
    moved = manifest.targets[0].model_copy(update={"prompts": str(store / "moved.jsonl")})
    run = run_of(manifest.model_copy(update={"targets": (moved,)}))
    measure_base(run, prepare_trunk(run))
    assert asked == []


def test_an_endpoint_that_has_answered_everything_is_not_asked_for_its_key(
    family: Family, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _without_ray(monkeypatch)
    regenerate = {"engine": "openai", "url": "http://127.0.0.1:9/v1", "api_key_env": "ENDPOINT_KEY"}
    run = run_of(family.manifest("alpha", store=store, regenerate=regenerate))
    monkeypatch.delenv("ENDPOINT_KEY", raising=False)
    run.artifacts.finish(ANSWERS, run.remaining[0].answers.key, {})
    check_targets(run)
    assert len(asked) == 1, "the check of the family alone"
    assert run.ended == {}


@pytest.mark.ray
def test_an_endpoint_that_does_not_answer_refuses_its_target_before_a_trunk_is_made(
    ray_cluster: object, family: Family, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"engine": "openai", "url": "http://127.0.0.1:9/v1", "api_key_env": "ENDPOINT_KEY"}
    manifest = family.manifest("alpha", store=store, regenerate=asked)
    opened = open_store(manifest.store)
    run = Run("r1", make_plan(manifest, Artifacts(opened), target_digest), opened, print, Attempts(0, 0))
    with pytest.raises(UserError, match="ENDPOINT_KEY"):
        check_targets(run)
    monkeypatch.setenv("ENDPOINT_KEY", "k")
    check_targets(run)
    assert run.ended["alpha"].decision == "refused"
    assert "alpha: http://127.0.0.1:9/v1: no answer after 3 attempts" in run.ended["alpha"].reason
