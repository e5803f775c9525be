"""What becomes of an adapter that was evaluated: who it was compared with decides, and what people decided stays."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from farm.artifacts import Artifact, Artifacts
from farm.fleet import onboard
from farm.fleet.plan import make_plan
from farm.fleet.prepare import prepare_trunk
from farm.fleet.publish import Verdict, publish
from farm.fleet.records import Plan, TargetPlan
from farm.registry import Registry
from farm.store import open_store
from tests.farm.fleet.family import Family
from tests.farm.fleet.planned import digest_of, manifest_of
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


@dataclass(frozen=True)
class Evaluated:
    """A target whose adapter is published and better than `opponent`."""

    registry: Registry
    plan: Plan
    target: TargetPlan

    def publish(self, opponent: str | None) -> Verdict:
        row = {"gain_interval": [0.5, 1.0]}
        evaluation = Artifact("evaluate", "key", {"row": row, "opponent": opponent})
        fit: Any = None  # of a version that is not there yet
        artifacts = Artifacts(self.registry.store)
        return publish(self.registry, artifacts, self.plan, self.target, evaluation, fit)

    def add(self, adapt_key: str, opponent: str | None) -> str:
        card = {"adapt_key": adapt_key, "trunk_key": self.plan.trunk.key, "opponent": opponent}
        return self.registry.publish("a", {}, card).version


@pytest.fixture
def evaluated(tmp_path: Path) -> Evaluated:
    manifest = manifest_of(tmp_path, "a")
    store = open_store(manifest.store)
    plan = make_plan(manifest, Artifacts(store), digest_of)
    found = Evaluated(Registry(store), plan, plan.targets[0])
    assert found.registry.promote("a", found.add("older", None), None)
    assert found.add(found.target.adapt_key, "v1") == "v2"
    return found


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


def test_what_was_rolled_back_is_not_promoted_by_the_next_onboarding(evaluated: Evaluated) -> None:
    evaluated.publish("v1")
    evaluated.registry.rollback("a")
    verdict = evaluated.publish("v1")
    assert verdict.decision == "kept"
    assert "v2 was rolled back (by hand); `farm registry promote a v2`" in verdict.reason
    assert evaluated.registry.pointer("a").live == "v1"
    assert evaluated.registry.promote("a", "v2", "v1")
    assert evaluated.publish("v1").decision == "promoted"
