"""Training runs under Ray Train: a trunk, then a private expert over that trunk from the object store."""

from pathlib import Path

import pytest
import ray

from farm.artifacts import Artifacts
from farm.config import AdaptResources, RegenerateResources
from farm.draft.checkpoint import load_expert, read_config, read_tensors, trunk_digest
from farm.fleet.answers import feature_shards, finish_answers
from farm.fleet.datasets import regenerate
from farm.fleet.plan import make_plan
from farm.fleet.trainers import Attempts, TrainJob, train
from farm.fleet.trunk import close_trunk
from farm.store import open_store
from farm.target.load import target_digest
from farm.train.loop import FitTask
from tests.farm.fleet.family import Family


@pytest.mark.ray
def test_a_private_expert_is_fitted_over_the_shared_trunk_and_leaves_it_as_it_was(
    ray_cluster: object, family: Family, store: Path
) -> None:
    manifest = family.manifest("alpha", store=store)
    artifacts = Artifacts(open_store(manifest.store))
    target = make_plan(manifest, artifacts, target_digest).targets[0]
    assert regenerate([target.answers], manifest.store, RegenerateResources(), lambda result: None) == {}
    answers = finish_answers(artifacts, target.answers)
    trunk_file = family.trunk / "trunk.safetensors"
    before = trunk_digest(read_tensors(trunk_file))
    job = TrainJob(
        name="alpha",
        stage="adapt",
        key=target.adapt_key,
        task=FitTask(
            kind="expert",
            settings=manifest.adapt,
            draft=read_config(family.trunk),
            target=target.spec,
            shards=feature_shards(answers, artifacts),
            expert=str(family.trunk / "expert.safetensors"),
            vocabulary=None,
        ),
        store=manifest.store,
        trunk=("test-adapt", str(trunk_file)),
        resources=AdaptResources(),
        attempts=Attempts(worker=0, driver=0),
        record={},
    )

    finished = ray.get(train.remote(job))

    assert finished.manifest["trunk_digest_before"] == finished.manifest["trunk_digest_after"] == before
    assert finished.manifest["steps"] == 2  # 16 rows in batches of 8
    fitted = load_expert(job.task.draft, artifacts.path(finished, "expert.safetensors"))
    start = load_expert(job.task.draft, family.trunk / "expert.safetensors")
    assert not all(a.equal(b) for a, b in zip(fitted.parameters(), start.parameters(), strict=True))
    assert not list((store / "train").glob("*/checkpoint*"))  # optimizer states do not stay
    again = ray.get(train.remote(job))
    assert again == finished
    close_trunk("test-adapt")
