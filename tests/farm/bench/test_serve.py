"""What the endpoint is compared with: the engine under the threads that a replica has."""

import pytest

from farm.bench import serve
from farm.bench.serve import Load, replica_threads, with_engine
from farm.bench.serve_engine import EngineSpeed
from farm.bench.serve_subjects import Subjects
from farm.config import Manifest


@pytest.mark.parametrize(
    ("given", "num_cpus", "expected"),
    [(None, 4, 4), (None, 2.9, 2), (None, 0.5, 1), ("3", 4, 3), ("0", 4, 4), ("", 4, 4), ("many", 4, 4)],
)
def test_a_replica_has_its_cpus_as_threads_unless_the_environment_says_how_many(
    monkeypatch, given, num_cpus, expected
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert replica_threads(num_cpus) == expected


def test_the_engine_alone_gets_the_threads_of_the_manifests_replica(monkeypatch, tmp_path):
    threads = []

    def engine_speed(*_, **options):
        threads.append(options["threads"])
        return EngineSpeed(tokens_per_s=50.0, tau=2.0)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(serve, "engine_speed", engine_speed)
    monkeypatch.setattr(Subjects, "of", lambda _: Subjects((), ()))
    manifest = Manifest.model_validate(
        {"base": "base", "store": str(tmp_path), "resources": {"serve": {"num_cpus": 4}}}
        | {"targets": [{"name": "a", "model": "a", "prompts": "a.jsonl"}]}
    )
    record = with_engine(manifest, Load(), {"tokens_per_s": 25.0}, say=lambda _: None)
    assert threads == [record["threads"]] == [4]
    assert record["over_engine"] == 0.5
