"""Prompts that are chosen before generation: only they are answered, as they always would be, and no work is redone."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from farm.artifacts import Artifacts
from farm.config import Manifest
from farm.decode.regenerate import regenerate_rows
from farm.fleet import selection
from farm.fleet.answers import ANSWERS, feature_shards, missing_shards
from farm.fleet.chosen import SELECT, chosen_rows
from farm.fleet.onboard import onboard
from farm.fleet.plan import make_plan
from farm.fleet.records import Plan
from farm.fleet.run import Run
from farm.fleet.selection import select_prompts
from farm.fleet.stage_keys import ADAPT
from farm.fleet.trainers import Attempts
from farm.sections import SelectSettings
from farm.store import open_store
from farm.target.load import load_target, target_digest
from tests.farm.fleet.family import NUM_ROWS, Family

pytestmark = pytest.mark.ray

BEFORE = {"strategy": "shift", "before": True, "fraction": 0.25}


def planned(manifest: Manifest) -> tuple[Plan, Artifacts]:
    artifacts = Artifacts(open_store(manifest.store))
    return make_plan(manifest, artifacts, target_digest), artifacts


def run_of(manifest: Manifest) -> tuple[Run, list[str]]:
    said: list[str] = []
    plan, artifacts = planned(manifest)
    return Run("r1", plan, artifacts.store, said.append, Attempts(0, 0)), said


@pytest.mark.slow
def test_only_chosen_prompts_are_answered_and_all_of_those_answers_are_adapted_on(
    ray_cluster: object, family: Family, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, said = family.manifest("alpha", store=store, select=BEFORE), []
    (row,) = onboard(manifest, said.append)[0].targets
    assert (row.rows, row.selected) == (4, 0.25)
    assert list(row.stage_seconds) == ["select", "regenerate", "adapt", "evaluate"]
    assert any("4 of 16 prompts kept (25.0%" in line for line in said)
    assert "alpha: regenerating 4 answers" in said

    plan, artifacts = planned(manifest)
    (target,) = plan.targets
    assert target.reused == (SELECT, ANSWERS, ADAPT)
    assert target.select_key is not None
    chosen, answers = artifacts.find(SELECT, target.select_key), artifacts.find(ANSWERS, target.answers.key)
    adapted = artifacts.find(ADAPT, target.adapt_key)
    assert chosen is not None
    assert answers is not None
    assert adapted is not None
    rows = chosen_rows(artifacts, chosen)
    assert {prompt.row for prompt in target.answers.prompts} == rows
    assert adapted.manifest["trained_tokens"] == answers.manifest["answer_tokens"] > 0
    assert answers.manifest["feature_bytes"] > 0
    written = [
        one
        for path in feature_shards(answers, artifacts)
        for one in pq.read_table(
            path.replace("features", "tokens").replace(".safetensors", ".parquet")
        ).to_pylist()
    ]
    whole, _ = planned(manifest.model_copy(update={"select": SelectSettings()}))
    assert len(whole.targets[0].answers.prompts) == 16
    asked = [prompt for prompt in whole.targets[0].answers.prompts if prompt.row in rows]
    expected = regenerate_rows(load_target(target.spec), asked, manifest.regenerate)
    assert {one["row"]: tuple(one["answer_ids"]) for one in written} == {
        one.row: one.answer_ids for one in expected
    }

    def no_work(specs: dict[str, object], *_: object, **__: object) -> list[object]:
        assert specs == {}
        return []

    monkeypatch.setattr(selection, "run_bounded", no_work)
    (again,) = onboard(manifest, said.append)[0].targets
    assert (again.rows, again.selected, again.stage_seconds) == (row.rows, row.selected, row.stage_seconds)


def test_a_target_whose_prompts_cannot_be_chosen_fails_alone_and_a_finished_choice_is_kept(
    ray_cluster: object, family: Family, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = family.manifest("alpha", "beta", store=store, select=BEFORE)
    long = tmp_path / "long.jsonl"
    long.write_text(
        "".join(json.dumps({"prompt": f"{row} " + "fox " * 4000}) + "\n" for row in range(NUM_ROWS))
    )
    mute = manifest.targets[1].model_copy(update={"prompts": str(long)})
    manifest = manifest.model_copy(update={"targets": (manifest.targets[0], mute)})
    run, said = run_of(manifest)
    select_prompts(run)
    assert [target.name for target in run.remaining] == ["alpha"]
    assert "none of its 16 prompts can be answered" in run.ended["beta"].reason
    (alpha,) = run.remaining
    assert len(alpha.answers.prompts) == 4
    assert "alpha: selecting prompts by shift" in said
    assert len(missing_shards(run.artifacts, alpha.answers)) == alpha.answers.num_shards == 1

    later, said = run_of(first_targets(manifest, 1))
    assert later.remaining[0].answers == alpha.answers
    select_prompts(later)
    assert later.remaining[0].answers == alpha.answers
    assert said == []


def first_targets(manifest: Manifest, number: int) -> Manifest:
    return manifest.model_copy(update={"targets": manifest.targets[:number]})
