"""What becomes of an adapter that was evaluated: who it was compared with decides, and what people decided stays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from farm.artifacts import Artifact, Artifacts
from farm.card import Fit
from farm.fleet import onboard
from farm.fleet.plan import make_plan
from farm.fleet.prepare import prepare_trunk
from farm.fleet.publish import Verdict, evaluation_key, family_record, publish
from farm.fleet.records import Plan, TargetPlan
from farm.fleet.stage_keys import ADAPT, EXPERT_FILE
from farm.registry import Registry, Version
from farm.store import open_store
from tests.farm.fleet.family import Family
from tests.farm.fleet.planned import digest_of, manifest_of, plan_of
from tests.farm.fleet.test_damaged import run_of


def test_a_target_that_is_refused_for_its_prompts_is_served_on(family: Family, store: Path) -> None:
    """Its live version has nothing to do with the prompts of this run; one that never had any is left out."""
    manifest = family.manifest("alpha", "beta", "gamma", store=store)
    moved = tuple(
        spec if spec.name == "alpha" else spec.model_copy(update={"prompts": str(store / "moved.jsonl")})
        for spec in manifest.targets
    )
    run = run_of(manifest.model_copy(update={"targets": moved}))
    for name, reason in run.plan.refused.items():
        run.end(name, "refused", reason)
    assert run.registry.promote("beta", run.registry.publish("beta", {}, {}).version, None)
    onboard._put_family(run, prepare_trunk(run))
    assert list(run.registry.family()["targets"]) == ["alpha", "beta"]


def test_what_is_served_has_the_template_itself_not_the_path_of_its_file(tmp_path: Path) -> None:
    """In a job that file lies in a copy of the working directory, which is deleted with the job."""
    text, file = "{{ messages[0]['content'] }}", tmp_path / "chat.jinja"
    file.write_text(text)
    manifest = manifest_of(tmp_path, "a", "b")
    first, second = manifest.targets
    first = first.model_copy(update={"chat_template": str(file)})
    plan = plan_of(manifest.model_copy(update={"targets": (first, second)}))
    targets = family_record(plan, {}, ())["targets"]
    assert targets["a"] == {"model": "a", "lora": None, "revision": None, "chat_template": text}
    assert targets["b"]["chat_template"] is None


@dataclass(frozen=True)
class Evaluated:
    """A target whose adapter is published and better than `opponent`."""

    registry: Registry
    plan: Plan
    target: TargetPlan

    def publish(self, opponent: str | None, recorded: str | None = None) -> Verdict:
        """After an evaluation against `opponent`; `recorded` is the number that it had where it was measured."""
        against = None if opponent is None else self.registry.version("a", opponent)
        key = evaluation_key(self.plan.manifest, self.target, against)
        row = {"gain_interval": [0.5, 1.0]}
        evaluation = Artifact("evaluate", key, {"row": row, "opponent": recorded or opponent})
        artifacts, fit = Artifacts(self.registry.store), Fit(trunk_key=self.plan.trunk.key)
        return publish(self.registry, artifacts, self.plan, self.target, evaluation, fit)

    def add(self, adapt_key: str, opponent: str | None) -> str:
        card = {"adapt_key": adapt_key, "trunk_key": self.plan.trunk.key, "opponent": opponent}
        return self.registry.publish("a", {}, card).version


@pytest.fixture
def fresh(tmp_path: Path) -> Evaluated:
    """Adapted, and not published yet."""
    manifest = manifest_of(tmp_path, "a")
    store = open_store(manifest.store)
    plan = make_plan(manifest, Artifacts(store), digest_of)
    found = Evaluated(Registry(store), plan, plan.targets[0])
    assert found.registry.promote("a", found.add("older", None), None)
    artifacts = Artifacts(store)
    artifacts.put_file(ADAPT, found.target.adapt_key, EXPERT_FILE, b"expert")
    artifacts.finish(ADAPT, found.target.adapt_key, {})
    return found


@pytest.fixture
def evaluated(fresh: Evaluated) -> Evaluated:
    assert fresh.add(fresh.target.adapt_key, "v1") == "v2"
    return fresh


def test_an_adapter_that_beats_the_live_one_is_promoted(evaluated: Evaluated) -> None:
    assert evaluated.publish("v1").decision == "promoted"
    assert evaluated.registry.pointer("a").live == "v2"
    assert evaluated.publish("v1").decision == "promoted"


def test_a_version_that_went_live_meanwhile_is_not_replaced_unmeasured(evaluated: Evaluated) -> None:
    """The evaluation took an hour and compared with v1; v3 went live in it."""
    assert evaluated.registry.promote("a", evaluated.add("another", "v1"), "v1")
    verdict = evaluated.publish("v1")
    assert verdict.decision == "kept"
    assert "moved meanwhile" in verdict.reason
    assert evaluated.registry.pointer("a").live == "v3"


def test_an_opponent_that_has_another_number_here_is_the_one_that_was_measured(evaluated: Evaluated) -> None:
    """The target has another name now, and its evaluations are found again: they are keyed by adapters."""
    assert evaluated.publish("v1", recorded="v7").decision == "promoted"
    assert evaluated.registry.pointer("a").live == "v2"


def test_a_card_names_the_opponent_by_its_number_here(fresh: Evaluated) -> None:
    assert fresh.publish("v1", recorded="v7").version == "v2"
    assert fresh.registry.version("a", "v2").card["opponent"] == "v1"
    assert fresh.publish("v1", recorded="v7").decision == "promoted"


class PublishedMeanwhile(Registry):
    """Another run of the same manifest publishes and promotes while this one is about to publish."""

    meanwhile: Callable[[], Verdict] | None = None

    def publish(self, target: str, files: Mapping[str, bytes], card: Mapping[str, Any]) -> Version:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            assert meanwhile().decision == "promoted"
        return super().publish(target, files, card)


def test_of_two_runs_that_publish_the_same_adapter_one_promotes_it(fresh: Evaluated) -> None:
    """Else it would be live twice in a row, and a rollback would go from it to itself."""
    slow = replace(fresh, registry=PublishedMeanwhile(fresh.registry.store))
    slow.registry.meanwhile = lambda: fresh.publish("v1")  # type: ignore[attr-defined]
    assert "moved meanwhile" in slow.publish("v1").reason
    assert fresh.registry.pointer("a").history == ("v1", "v2")
    again = fresh.publish("v1")
    assert (again.decision, again.version) == ("promoted", "v2")
    assert fresh.registry.rollback("a").version == "v1"
    verdict = fresh.publish("v1")
    assert verdict.decision == "kept", "v3 is what was rolled back, too"
    assert "v2 was rolled back" in verdict.reason


def test_what_was_rolled_back_twice_is_not_promoted_by_the_next_onboarding(evaluated: Evaluated) -> None:
    """The version before it was bad, too, and has been rolled back after it."""
    registry = evaluated.registry
    assert registry.promote("a", evaluated.add("another", "v1"), "v1")
    assert registry.promote("a", "v2", "v3")
    assert registry.rollback("a").version == "v3"
    assert registry.rollback("a").version == "v1"
    assert "v2 was rolled back (by hand)" in evaluated.publish("v1").reason
    assert registry.pointer("a").live == "v1"


def test_what_was_rolled_back_is_not_promoted_once_it_was_deleted_and_is_published_again(
    fresh: Evaluated,
) -> None:
    """By an onboarding of every night, after `farm registry gc` has deleted what nobody needed."""
    fresh.publish("v1")
    fresh.registry.rollback("a")
    assert fresh.registry.retire("a", "v2")
    verdict = fresh.publish("v1")
    assert (verdict.decision, verdict.version) == ("kept", "v3")
    assert "v2 was rolled back (by hand); `farm registry promote a v3`" in verdict.reason
    assert fresh.registry.promote("a", "v3", "v1")
    assert fresh.publish("v1").decision == "promoted"


def test_what_was_rolled_back_is_not_promoted_by_the_next_onboarding(evaluated: Evaluated) -> None:
    evaluated.publish("v1")
    evaluated.registry.rollback("a")
    verdict = evaluated.publish("v1")
    assert verdict.decision == "kept"
    assert "v2 was rolled back (by hand); `farm registry promote a v2`" in verdict.reason
    assert evaluated.registry.pointer("a").live == "v1"
    assert evaluated.registry.promote("a", "v2", "v1")
    assert evaluated.publish("v1").decision == "promoted"
