"""The regeneration pipeline: targets clustered on actors, shards idempotent, a target that fails alone."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from farm.artifacts import Artifacts
from farm.config import Refused
from farm.data.features import read_shards
from farm.fleet.actors import ActorConfig, LiveTargets, RegenerateActor
from farm.fleet.answers import ANSWERS, feature_shards, finish_answers, missing_shards
from farm.fleet.datasets import ShardResult, regenerate
from farm.fleet.plan import make_plan
from farm.resources import RegenerateResources
from farm.sections import TargetSpec
from farm.store import open_store
from farm.target.load import target_digest
from tests.farm.fleet.family import Family


@pytest.mark.ray
def test_two_targets_on_one_actor_load_once_each_and_a_corrupt_one_fails_alone(
    ray_cluster: object, family: Family, store: Path
) -> None:
    manifest = family.manifest("alpha", "beta", "torn", store=store)
    weights = Path(manifest.targets[2].model) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    artifacts = Artifacts(open_store(manifest.store))
    jobs = [target.answers for target in make_plan(manifest, artifacts, target_digest).targets]
    results: list[ShardResult] = []

    failures = regenerate(jobs, manifest.store, RegenerateResources(), results.append)

    assert list(failures) == ["torn"]
    assert isinstance(failures["torn"], Refused), "the report would say that its worker died"
    assert str(failures["torn"]).startswith("torn: ")
    done = [result for result in results if not result.failure]
    assert {result.target for result in done} == {"alpha", "beta"}
    assert sum(result.loads for result in done) == 2
    assert sum(result.loads for result in results) == 3  # the torn one was tried once, not once a shard
    finished = finish_answers(artifacts, jobs[0])
    assert finished.manifest["rows"] == len(jobs[0].prompts) == 16
    assert sum(finished.manifest["finish_reasons"].values()) == 16
    samples = read_shards([Path(path) for path in feature_shards(finished, artifacts)])
    assert len(samples) == 16

    results.clear()
    artifacts.store.delete(f"artifacts/{ANSWERS}/{jobs[1].key}/shard-00002.json")
    assert missing_shards(artifacts, jobs[1]) == [2]
    assert regenerate(jobs[:2], manifest.store, RegenerateResources(), results.append) == {}
    assert [(result.target, result.shard) for result in results] == [("beta", 2)]


def test_an_actor_tells_a_target_that_the_user_can_mend_from_one_that_broke(
    family: Family, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either fails its other shards too, and the actor does not try again."""
    manifest = family.manifest("alpha", "beta", store=store)
    plan = make_plan(manifest, Artifacts(open_store(manifest.store)), target_digest)
    jobs = {target.name: target.answers for target in plan.targets}
    torn = jobs["alpha"].spec.model_copy(update={"model": str(store / "nothing")})
    jobs["alpha"] = replace(jobs["alpha"], spec=torn)
    actor = RegenerateActor(ActorConfig(manifest.store, jobs, 2**30, 1, "float32"))

    def breaks(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(actor._targets, "get", breaks)
    shards = {"target": ["beta"] * 2, "shard": [0, 1], "prompts": ["[]"] * 2, "may_keep": [0, 0]}
    broken = actor(shards)
    monkeypatch.undo()
    refused = actor(shards | {"target": ["alpha"] * 2})
    assert (broken["failure"], broken["refused"]) == (["RuntimeError: out of memory"] * 2, [False] * 2)
    assert refused["refused"] == [True] * 2
    assert all(failure.startswith("alpha: ") for failure in refused["failure"])


@pytest.mark.ray
def test_a_killed_actor_costs_a_shard_and_changes_no_answer(
    ray_cluster: object, family: Family, tmp_path: Path
) -> None:
    tokens = []
    for kill in (False, True):
        manifest = family.manifest("alpha", store=tmp_path / f"store-{kill}")
        artifacts = Artifacts(open_store(manifest.store))
        job = make_plan(manifest, artifacts, target_digest).targets[0].answers
        killed: list[int] = []

        def on_shard(result: ShardResult, kill: bool = kill, killed: list[int] = killed) -> None:
            if kill and not killed:
                killed.extend(_kill_actors())

        assert regenerate([job], manifest.store, RegenerateResources(), on_shard) == {}
        assert len(killed) == int(kill)
        shards = feature_shards(finish_answers(artifacts, job), artifacts)
        tokens.append([s.tokens_T.tolist() for s in read_shards([Path(path) for path in shards])])
    assert tokens[0] == tokens[1]


def _kill_actors() -> list[int]:
    """SIGKILL for every regeneration actor of this process's own cluster."""
    victims = [
        p for p in psutil.Process().children(recursive=True) if "RegenerateActor" in " ".join(p.cmdline())
    ]
    for victim in victims:
        victim.kill()
    return [victim.pid for victim in victims]


def _fake_target(name: str, num_bytes: int) -> Any:
    return SimpleNamespace(name=name, num_bytes=num_bytes)


def test_the_least_recently_used_target_is_freed_before_the_next_one_loads() -> None:
    live_at_load: list[tuple[str, ...]] = []
    targets: LiveTargets

    def load(spec: TargetSpec) -> Any:
        live_at_load.append(targets.names)
        return _fake_target(spec.name, 40)

    targets = LiveTargets(memory_bytes=100, load=load)
    specs = {name: TargetSpec(name=name, model=name, prompts="p") for name in "abc"}
    for name in "abac":
        targets.get(specs[name])
    assert live_at_load == [(), ("a",), ("a",)]  # b went, though c was still to be loaded
    assert targets.names == ("a", "c")
    assert targets.num_loads == 3


def test_a_target_larger_than_the_budget_lives_alone() -> None:
    targets = LiveTargets(memory_bytes=10, load=lambda spec: _fake_target(spec.name, 40))
    for name in "ab":
        targets.get(TargetSpec(name=name, model=name, prompts="p"))
    assert targets.names == ("b",)


def test_loras_of_one_checkpoint_share_it_and_go_before_it() -> None:
    """A checkpoint that went while a LoRA still lies beside it would free nothing."""

    def beside(spec: TargetSpec, checkpoint: Any) -> Any:
        assert checkpoint.num_bytes == 40
        return None if spec.name == "odd" else _fake_target(spec.name, 10)

    targets = LiveTargets(100, lambda spec: _fake_target(spec.name, 40), beside)
    lora = {
        name: TargetSpec(name=name, model="base", lora=name, prompts="p") for name in ("a", "b", "c", "odd")
    }
    for name in "abacab":
        targets.get(lora[name])
    assert targets.num_loads == 4, "the checkpoint once, each LoRA once"
    assert targets.names == ("c", "a", "b", "base")
    targets.get(TargetSpec(name="other", model="other", prompts="p"))
    assert targets.names == ("a", "b", "base", "other"), "one LoRA made the room"
    targets.get(lora["odd"])
    assert targets.names == ("base", "odd"), "one that has to be merged is a checkpoint of its own"
    targets.get(TargetSpec(name="other", model="other", prompts="p"))
    loads = targets.num_loads
    targets.get(lora["odd"])
    assert (targets.num_loads, targets.names) == (loads, ("other", "odd")), (
        "its checkpoint is not needed again"
    )
