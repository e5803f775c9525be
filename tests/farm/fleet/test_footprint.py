"""What an onboarding's features take at their peak: store, object store and spill together stay within the budget."""

from pathlib import Path

import pytest

from farm.artifacts import Artifact, Artifacts
from farm.fleet.answers import kept_bytes
from farm.fleet.footprint import Footprint
from farm.fleet.plan import make_plan
from farm.fleet.run import Run
from farm.fleet.stages import regenerate_answers
from farm.fleet.trainers import Attempts
from farm.store import open_store
from farm.target.load import target_digest
from tests.farm.fleet.family import Family

FEATURE_BYTES = 2 * 64  # of a token
BUDGET = 300_000  # of a target; its features take about 700,000


@pytest.mark.slow
@pytest.mark.ray
def test_features_beyond_the_budget_are_held_nowhere(
    ray_cluster: object, family: Family, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_new_tokens": 400, "byte_budget": BUDGET}
    manifest = family.manifest("alpha", "beta", store=store, regenerate=settings)
    opened, said = open_store(manifest.store), list[str]()
    run = Run("r1", make_plan(manifest, Artifacts(opened), target_digest), opened, said.append, Attempts())
    made: list[Footprint] = []
    of = Footprint.of
    monkeypatch.setattr(Footprint, "of", lambda *args: made.append(of(*args)) or made[-1])

    regenerate_answers(run, Artifact("trunk", "none drafts", {}))

    tokens = sum(answers.manifest["answer_tokens"] for answers in run.answers.values())
    (footprint,) = made
    assert footprint.budget == 2 * BUDGET
    assert FEATURE_BYTES * tokens > 1.5 * footprint.budget, "they would fit without a budget"
    assert 0.5 * footprint.budget < footprint.peak.store
    assert footprint.peak.total <= footprint.budget
    assert footprint.peak.store == sum(kept_bytes(run.artifacts, one.answers) for one in run.remaining)
    assert footprint.line() in said
