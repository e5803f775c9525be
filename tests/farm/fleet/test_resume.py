"""A regeneration that loses its driver goes on: no row is lost, none is answered twice, features stay in budget."""

import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from safetensors.torch import load_file

from farm.artifacts import Artifacts
from farm.data.features import read_shards
from farm.decode.regenerate import Recapture
from farm.fleet.answers import AnswersJob, feature_shards, finish_answers, kept_bytes, missing_shards
from farm.fleet.datasets import ShardResult, regenerate
from farm.fleet.footprint import Footprint
from farm.fleet.plan import make_plan
from farm.sections import RegenerateResources
from farm.store import open_store
from farm.target.load import target_digest
from tests.farm.fleet.family import Family

NUM_ROWS = 16
DRIVER = """
import pickle, sys
from pathlib import Path
import ray
from farm.fleet.datasets import regenerate
jobs, store, resources = pickle.loads(Path(sys.argv[1]).read_bytes())
ray.init(address=sys.argv[2], log_to_driver=False)
print(regenerate(jobs, store, resources), flush=True)
"""


def driver(folder: Path, arguments: bytes, address: str) -> "subprocess.Popen[str]":
    """A process that regenerates in the cluster at `address`."""
    (folder / "arguments").write_bytes(arguments)
    command = [sys.executable, "-c", DRIVER, str(folder / "arguments"), address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ids_of(artifacts: Artifacts, job: AnswersJob) -> Counter[str]:
    """How often each row's id is in the tokens of a job."""
    folder = Path(artifacts.location(finish_answers(artifacts, job), "tokens-00000.parquet")).parent
    return Counter(name for path in folder.glob("tokens-*") for name in pq.read_table(path)["id"].to_pylist())


def wait_for_shards(
    artifacts: Artifacts, job: AnswersJob, number: int, process: "subprocess.Popen[str]"
) -> None:
    deadline = time.monotonic() + 120
    while len(missing_shards(artifacts, job)) > job.num_shards - number:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no shard was finished in time"
        time.sleep(0.005)


@pytest.mark.ray
def test_after_kill_9_of_the_driver_the_rest_is_answered_once_within_the_byte_budget(
    ray_cluster: object, family: Family, store: Path, tmp_path: Path
) -> None:
    half = 2 * 64 * NUM_ROWS * 40 // 2  # bytes of features, so that a shard keeps one row of two
    settings = {"shard_rows": 2, "max_new_tokens": 24, "byte_budget": half}
    manifest = family.manifest("alpha", store=store, regenerate=settings)
    artifacts = Artifacts(open_store(manifest.store))
    job = make_plan(manifest, artifacts, target_digest).targets[0].answers
    resources = RegenerateResources()
    child = driver(tmp_path, pickled([job], manifest.store, resources), ray.get_runtime_context().gcs_address)
    wait_for_shards(artifacts, job, 1, child)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    done = set(range(job.num_shards)) - set(missing_shards(artifacts, job))
    assert 0 < len(done) < job.num_shards
    footprint = Footprint.of([job], kept_bytes(artifacts, job))
    results: list[ShardResult] = []

    def on_shard(result: ShardResult) -> None:
        results.append(result)
        footprint.add(result.feature_bytes)

    assert regenerate([job], manifest.store, resources, on_shard) == {}

    # What a dying actor still finished is not asked for again either.
    assert {result.shard for result in results}.isdisjoint(done)
    assert ids_of(artifacts, job) == {prompt.id: 1 for prompt in job.prompts}
    assert len(job.prompts) == NUM_ROWS
    assert 0 < footprint.peak.store <= settings["byte_budget"]
    assert footprint.peak.store == kept_bytes(artifacts, job) == job_bytes(artifacts, job)
    assert footprint.peak.objects < 2**20  # prompts, no features
    assert "MiB held, of 0.0 allowed" in footprint.line()
    shards = [Path(path) for path in feature_shards(finish_answers(artifacts, job), artifacts)]
    assert len(read_shards(shards, capture=Recapture.of(job.spec, "auto"))) == NUM_ROWS


def pickled(jobs: list[AnswersJob], store: str, resources: RegenerateResources) -> bytes:
    return pickle.dumps((jobs, store, resources))


def job_bytes(artifacts: Artifacts, job: AnswersJob) -> int:
    """Bytes of the tensors in a job's features files."""
    shards = feature_shards(finish_answers(artifacts, job), artifacts)
    return sum(tensor.nbytes for path in shards for tensor in load_file(path).values())


def test_answers_that_a_selection_may_drop_leave_no_features_in_the_store(
    family: Family, store: Path
) -> None:
    for select, kept in (({"strategy": "all"}, 2**20 // 4), ({"strategy": "random"}, 0)):
        manifest = family.manifest("alpha", store=store, regenerate={"byte_budget": 2**20}, select=select)
        plan = make_plan(manifest, Artifacts(open_store(manifest.store)), target_digest)
        assert plan.targets[0].answers.feature_bytes == kept
    manifest = family.manifest("alpha", store=store, regenerate={"features": "stream"})
    assert (
        make_plan(manifest, Artifacts(open_store(manifest.store)), target_digest)
        .targets[0]
        .answers.feature_bytes
        == 0
    )
