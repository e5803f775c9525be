"""Artifacts of one target that cannot be read decide that target; the others go on, and nothing is left running."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from farm.artifacts import Artifact, Artifacts
from farm.config import Manifest, Refused
from farm.data.shards import shard_names
from farm.fleet import onboard, pack_cost, selection, stages
from farm.fleet.answers import ANSWERS, AnswersJob, card_name
from farm.fleet.chosen import SCORES_FILE, SELECT
from farm.fleet.footprint import Held
from farm.fleet.pack_cost import onboarded_jobs
from farm.fleet.packs import Ended
from farm.fleet.plan import make_plan
from farm.fleet.pool import Outcome
from farm.fleet.prepare import prepare_trunk
from farm.fleet.run import Run
from farm.fleet.selection import select_answers, select_prompts
from farm.fleet.stage_keys import ADAPT, EXPERT_FILE
from farm.fleet.stages import adapt, evaluate, regenerate_answers
from farm.fleet.trainers import CURVE_FILE, Attempts, TrainJob
from farm.store import open_store
from farm.target.load import target_digest
from tests.farm.fleet.family import Family

_, FEATURES = shard_names(0)
DAMAGES = [Path.unlink, lambda path: path.write_bytes(b"cut")]
damaged = pytest.mark.parametrize("damage", DAMAGES, ids=["gone", "cut"])


def run_of(manifest: Manifest) -> Run:
    artifacts = Artifacts(open_store(manifest.store))
    plan = make_plan(manifest, artifacts, target_digest)
    return Run("r1", plan, artifacts.store, lambda _line: None, Attempts(0, 0))


def put(run: Run, stage: str, key: str, *files: str, **manifest: Any) -> tuple[Artifact, Path]:
    """A finished artifact of some files, and its folder."""
    for name in files:
        run.artifacts.put_file(stage, key, name, b"[]     ")
    artifact = run.artifacts.finish(stage, key, manifest)
    return artifact, Path(run.artifacts.location(artifact, files[0])).parent


def answered(run: Run) -> list[Path]:
    """The folders of finished answers of all targets."""
    folders = []
    for target in run.remaining:
        files = (FEATURES, FEATURES.replace("features", "tokens"))
        run.answers[target.name], folder = put(run, ANSWERS, target.answers.key, *files, answer_tokens=9)
        folders.append(folder)
    return folders


def none_is_trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the targets that would have been."""
    asked: list[str] = []

    def in_runs(jobs: Sequence[TrainJob]) -> list[TrainJob]:
        asked.extend(job.name for job in jobs)
        return []

    monkeypatch.setattr(stages, "in_runs", in_runs)
    return asked


@pytest.mark.parametrize("cut_before", [True, False])
def test_a_target_whose_shards_card_is_cut_is_not_answered(
    family: Family, store: Path, monkeypatch: pytest.MonkeyPatch, cut_before: bool
) -> None:
    """By a run before, or while this one has the answers made."""
    run, asked = run_of(family.manifest("alpha", "beta", store=store)), list[str]()
    key = run.remaining[0].answers.key

    def cut() -> None:
        run.artifacts.put_file(ANSWERS, key, card_name(0), b'{"rows": ')

    def regenerate(jobs: Sequence[AnswersJob], *_: object) -> dict[str, Exception]:
        asked.extend(job.name for job in jobs)
        cut()
        return {"beta": RuntimeError("the test answers none")}

    if cut_before:
        cut()
    monkeypatch.setattr(stages, "regenerate", regenerate)
    monkeypatch.setattr(stages.Footprint, "of", lambda *_: SimpleNamespace(peak=Held()))
    regenerate_answers(run, prepare_trunk(run))
    assert asked == (["beta"] if cut_before else ["alpha", "beta"])
    assert run.ended["alpha"].decision == "failed"
    assert f"{card_name(0)}: is no whole card of a shard; delete it" in run.ended["alpha"].reason
    assert run.ended["beta"].reason == "RuntimeError: the test answers none"


def test_a_target_that_an_actor_refuses_is_refused(
    family: Family, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its endpoint serves another model, say, which shows only once it has answered."""
    run = run_of(family.manifest("alpha", store=store))
    failure = Refused("alpha: serves another model; correct served_as")
    monkeypatch.setattr(stages, "regenerate", lambda *_: {"alpha": failure})
    monkeypatch.setattr(stages.Footprint, "of", lambda *_: SimpleNamespace(peak=Held()))
    regenerate_answers(run, prepare_trunk(run))
    ended = run.ended["alpha"]
    assert (ended.decision, ended.reason) == ("refused", str(failure))


@damaged
def test_a_target_whose_answers_are_damaged_is_not_adapted(
    family: Family, store: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    run, asked = run_of(family.manifest("alpha", "beta", store=store)), none_is_trained(monkeypatch)
    folder, _ = answered(run)
    damage(folder / FEATURES)
    adapt(run, prepare_trunk(run))
    assert asked == ["beta"]
    assert run.ended["alpha"].decision == "failed"
    assert str(folder) in run.ended["alpha"].reason
    assert [target.name for target in run.remaining] == ["beta"]


@damaged
def test_a_target_whose_expert_or_curve_is_damaged_is_neither_evaluated_nor_published(
    family: Family, store: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    run, _ = run_of(family.manifest("alpha", "beta", "gamma", store=store)), none_is_trained(monkeypatch)
    curve, expert, _ = (
        put(run, ADAPT, target.adapt_key, CURVE_FILE, EXPERT_FILE, coverage=1.0)[1]
        for target in run.remaining
    )
    damage(curve / CURVE_FILE)
    trunk = prepare_trunk(run)
    adapt(run, trunk)
    assert list(run.ended) == ["alpha"]
    assert list(run.curves) == ["beta", "gamma"]

    measured: list[str] = []

    def run_bounded(specs: dict[str, Any], *_: object, **__: object) -> Iterator[Outcome]:
        measured.extend(specs)
        return (Outcome(name) for name in specs)

    monkeypatch.setattr(stages, "run_bounded", run_bounded)
    monkeypatch.setattr(stages, "cpus_of_largest_node", lambda _: 1.0)
    monkeypatch.setattr(stages, "_conclude", lambda *_: None)
    damage(expert / EXPERT_FILE)
    evaluate(run, trunk)
    assert measured == ["gamma"]
    assert list(run.ended) == ["alpha", "beta"]


@damaged
@pytest.mark.parametrize("before", [True, False])
def test_a_target_that_cannot_be_selected_for_what_is_damaged_fails_alone(
    family: Family,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], object],
    before: bool,
) -> None:
    """Before generation it is a finished selection that is read again, after it the features that are scored."""
    select = {"strategy": "random", "before": before}
    run = run_of(family.manifest("alpha", "beta", store=store, select=select))
    asked: list[str] = []

    def run_bounded(specs: dict[str, Any], *_: object, **__: object) -> Iterator[Any]:
        asked.extend(specs)
        return iter(())

    monkeypatch.setattr(selection, "run_bounded", run_bounded)
    if before:
        alpha, beta = run.remaining
        chosen = {"chosen": 8, "realised_fraction": 0.5}
        folder = put(run, SELECT, str(alpha.select_key), SCORES_FILE, **chosen)[1]
        put(run, SELECT, str(beta.select_key), SCORES_FILE, **chosen)
        damage(folder / SCORES_FILE)
        monkeypatch.setattr(selection, "only_chosen", kept_whole(selection.only_chosen, run, "beta"))
        select_prompts(run)
    else:
        folder, _ = answered(run)
        damage(folder / FEATURES)
        select_answers(run, prepare_trunk(run))
        assert asked == ["beta"]
    assert list(run.ended) == ["alpha"]
    assert str(folder) in run.ended["alpha"].reason


def kept_whole(only_chosen: Any, run: Run, name: str) -> Any:
    """`only_chosen`, but for one target, whose scores are no table here."""
    job = next(target.answers for target in run.remaining if target.name == name)
    return lambda answers, *rest: job if answers == job else only_chosen(answers, *rest)


def test_the_shared_trunk_is_put_away_when_a_stage_breaks(
    family: Family, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, closed = run_of(family.manifest("alpha", store=store)), []

    def breaks(*_: object) -> None:
        raise OSError("no space")

    for name in ("measure_base", "skip_good_enough", "select_prompts"):
        monkeypatch.setattr(onboard, name, lambda *_: None)
    monkeypatch.setattr(onboard, "regenerate_answers", breaks)
    monkeypatch.setattr(onboard, "close_trunk", closed.append)
    with pytest.raises(OSError, match="no space"):
        onboard._run_stages(run)
    assert closed == [run.trunk.key]


def test_the_shared_trunk_is_put_away_when_a_benchmark_breaks(
    family: Family, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = family.manifest("alpha", store=store)
    run, closed = run_of(manifest), []
    prepare_trunk(run)
    answered(run)
    jobs = onboarded_jobs(manifest, lambda _line: None)
    monkeypatch.setattr(pack_cost, "in_runs", list)
    monkeypatch.setattr(pack_cost, "fit_runs", lambda *_: [Ended("alpha", None, OSError("no space"))])
    monkeypatch.setattr(pack_cost, "close_trunk", closed.append)
    with pytest.raises(RuntimeError, match="alpha: OSError: no space"):
        pack_cost._side("runs", jobs, print)
    assert closed == [run.trunk.key]
