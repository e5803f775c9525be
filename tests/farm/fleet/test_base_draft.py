"""Actors draft with the base's draft out of the object store: the answers in the store are the same as without."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from farm.artifacts import Artifacts
from farm.draft.checkpoint import load_draft
from farm.fleet.answers import AnswersJob, feature_shards, finish_answers
from farm.fleet.base_draft import BaseDraft
from farm.fleet.datasets import regenerate
from farm.fleet.plan import make_plan
from farm.fleet.prepare import prepare_trunk
from farm.fleet.run import Run
from farm.fleet.stages import regenerate_answers
from farm.fleet.trainers import Attempts
from farm.fleet.trunk import close_trunk, open_trunk
from farm.store import open_store
from farm.target.load import load_target, target_digest
from tests.farm.fleet.family import Family

pytestmark = pytest.mark.ray


def run_of(family: Family, store: Path, draft: str) -> Run:
    manifest = family.manifest("alpha", store=store, regenerate={"draft": draft})
    opened = open_store(manifest.store)
    return Run("r1", make_plan(manifest, Artifacts(opened), target_digest), opened, print, Attempts(0, 0))


def tokens_of(artifacts: Artifacts, job: AnswersJob) -> list[dict[str, object]]:
    shards = feature_shards(finish_answers(artifacts, job), artifacts)
    paths = (path.replace("features", "tokens").replace(".safetensors", ".parquet") for path in shards)
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


@pytest.mark.slow
def test_answers_are_the_same_with_the_base_draft_which_comes_from_the_object_store(
    ray_cluster: object, family: Family, tmp_path: Path
) -> None:
    told = []
    for draft in ("off", "base"):
        run = run_of(family, tmp_path / draft, draft)
        trunk = prepare_trunk(run)
        close_trunk(trunk.key)
        regenerate_answers(run, trunk)
        assert run.remaining
        told.append(tokens_of(run.artifacts, run.remaining[0].answers))
        if draft == "off":
            with pytest.raises(ValueError, match="trunk@"):
                open_trunk(trunk.key)  # nobody asked for it
        else:
            state, _ = open_trunk(trunk.key)
            given = load_draft(family.trunk)
            assert torch.equal(state["fc.weight"], given.trunk.fc.weight)
            opened = BaseDraft.of(run.artifacts, trunk).open(load_target(run.remaining[0].spec).forward)
            for name, value in given.state_dict().items():
                assert torch.equal(opened.state_dict()[name], value), name
        close_trunk(trunk.key)
    assert told[0] == told[1]
    assert len(told[0]) == 16


def test_a_draft_that_cannot_be_opened_fails_its_target_with_the_reason(
    ray_cluster: object, family: Family, store: Path
) -> None:
    """It shows that actors do open it: decoding plainly after all would hide that drafts never work."""
    run = run_of(family, store, "base")
    draft = BaseDraft.of(run.artifacts, prepare_trunk(run))
    (target,) = run.remaining
    nowhere = replace(draft, expert=f"{draft.expert}.gone")
    failures = regenerate([target.answers], run.store.uri, run.manifest.resources.regenerate, draft=nowhere)
    assert "expert.safetensors.gone: not readable" in str(failures["alpha"])
    close_trunk(draft.revision)
