"""Several regeneration actors: their number follows the work between its bounds, and each loads a target once."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from farm.artifacts import Artifacts
from farm.fleet import datasets
from farm.fleet.actors import ActorConfig, RegenerateActor
from farm.fleet.datasets import ShardResult, regenerate
from farm.fleet.plan import make_plan
from farm.resources import RegenerateResources
from farm.store import open_store
from farm.target.load import target_digest
from tests.farm.fleet.family import Family

pytestmark = pytest.mark.ray

LEAST, MOST, PATIENCE_S = 1, 2, 30.0
TARGETS, SHARDS = ("alpha", "beta", "gamma"), 8


def watched(folder: Path) -> type[RegenerateActor]:
    """An actor class that leaves files in `folder`; a class made here travels to the workers by value."""

    def wait_until(met: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + PATIENCE_S
        while not (so_far := met()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return so_far

    class WatchedActor(RegenerateActor):
        """The first shard takes until there are MOST actors, the last one until another actor is gone."""

        def __init__(self, config: ActorConfig) -> None:
            super().__init__(config)
            (folder / f"actor-{os.getpid()}").touch()

        def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
            (shard,) = zip(batch["target"], batch["shard"], strict=True)
            seen: dict[str, Any] = {"actor": os.getpid()}
            if shard == (TARGETS[0], 0):
                wait_until(lambda: len(list(folder.glob("actor-*"))) >= MOST)
            if shard == (TARGETS[-1], SHARDS - 1):
                others = [int(p.name[6:]) for p in folder.glob("actor-*") if p.name[6:] != str(os.getpid())]
                seen["shrank"] = wait_until(lambda: not all(psutil.pid_exists(pid) for pid in others))
            rows = super().__call__(batch)
            (folder / f"shard-{shard[0]}-{shard[1]}").write_text(
                json.dumps(seen | {"loads": rows["loads"][0]})
            )
            return rows

    return WatchedActor


@dataclass(frozen=True)
class Watched:
    """What a regeneration of more shards than actors left behind."""

    results: tuple[ShardResult, ...]
    shards: dict[str, dict[str, Any]]  # what each shard's actor wrote down
    created: int  # actors that Ray was asked for

    @property
    def workers(self) -> set[int]:
        return {shard["actor"] for shard in self.shards.values()}


@pytest.fixture(scope="module")
def run(ray_cluster: object, family: Family, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder, store = tmp_path_factory.mktemp("watched"), tmp_path_factory.mktemp("actors") / "store"
    settings = {"shard_rows": 16 // SHARDS, "memory_bytes": 1}  # one target lives in an actor at a time
    manifest = family.manifest(*TARGETS, store=store, regenerate=settings)
    artifacts = Artifacts(open_store(manifest.store))
    jobs = [target.answers for target in make_plan(manifest, artifacts, target_digest).targets]
    assert {job.num_shards for job in jobs} == {SHARDS}
    results: list[ShardResult] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "RegenerateActor", watched(folder))
        resources = RegenerateResources(min_actors=LEAST, max_actors=MOST)
        assert regenerate(jobs, manifest.store, resources, results.append) == {}
    shards = {path.name: json.loads(path.read_text()) for path in folder.glob("shard-*")}
    created = [
        actor for actor in ray._private.state.actors().values() if "Watched" in actor["ActorClassName"]
    ]
    return Watched(tuple(results), shards, len(created))


def test_the_pool_grows_while_shards_wait_and_never_beyond_its_maximum(run: Watched) -> None:
    assert len(run.results) == len(run.shards) == len(TARGETS) * SHARDS
    assert len(run.workers) > LEAST
    assert run.created <= MOST


def test_the_pool_shrinks_while_its_last_shard_is_at_work(run: Watched) -> None:
    assert run.shards[f"shard-{TARGETS[-1]}-{SHARDS - 1}"]["shrank"]


def test_several_actors_load_a_target_at_most_once_each(run: Watched) -> None:
    """In the order of the targets: taken in turn, each shard would need a load, since one target lives at a time."""
    loads = sum(result.loads for result in run.results)
    assert len(TARGETS) < loads <= len(TARGETS) * len(run.workers) < len(run.shards)
