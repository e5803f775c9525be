"""A regeneration that loses its driver, or a node of its cluster, goes on: no row is lost, none is answered twice."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from safetensors.torch import load_file

from farm.artifacts import Artifacts
from farm.config import Manifest, dump
from farm.data.features import read_shards
from farm.decode.regenerate import Recapture
from farm.fleet.answers import AnswersJob, feature_shards, finish_answers, kept_bytes, missing_shards
from farm.fleet.datasets import ShardResult, regenerate
from farm.fleet.footprint import Footprint
from farm.fleet.plan import make_plan
from farm.store import open_store
from farm.target.load import target_digest
from tests.farm.fleet.family import Family

NUM_ROWS = 16
# Keys that Ray's autoscaler reads whatever the provider does with them.
UNUSED = (
    "cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
    "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip
DRIVER = """
import sys
import ray
from farm.artifacts import Artifacts
from farm.config import load_manifest
from farm.fleet.datasets import regenerate
from farm.fleet.plan import make_plan
from farm.store import open_store
from farm.target.load import target_digest
manifest = load_manifest(sys.argv[1])
ray.init(address=sys.argv[2], log_to_driver=False)
plan = make_plan(manifest, Artifacts(open_store(manifest.store)), target_digest)
jobs = [target.answers for target in plan.targets]
print(regenerate(jobs, manifest.store, manifest.resources.regenerate), flush=True)
"""


def driver(folder: Path, manifest: Manifest, address: str) -> "subprocess.Popen[str]":
    """A process that regenerates in the cluster at `address`."""
    file = folder / "manifest.yaml"
    file.write_text(yaml.safe_dump(dump(manifest)))
    command = [sys.executable, "-c", DRIVER, str(file), address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ids_of(artifacts: Artifacts, job: AnswersJob) -> Counter[str]:
    """How often each row's id is in the tokens of a job."""
    finished = finish_answers(artifacts, job)
    names = [name for name in finished.manifest["files"] if name.startswith("tokens-")]
    tables = [pq.read_table(artifacts.path(finished, name)) for name in names]
    return Counter(name for table in tables for name in table["id"].to_pylist())


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
    child = driver(tmp_path, manifest, ray.get_runtime_context().gcs_address)
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

    assert regenerate([job], manifest.store, manifest.resources.regenerate, on_shard) == {}

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


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_that_grows_from_nothing_and_loses_a_node_answers_every_row(
    family: Family, store: Path, tmp_path: Path
) -> None:
    """Ray's fake autoscaler: GPUs are logical, every worker node is a raylet of its own."""
    settings = {"shard_rows": 1, "max_new_tokens": 400, "batch_rows": 1}
    workers = {"num_gpus": 1, "min_actors": 2, "max_actors": 2}
    manifest = family.manifest(
        "alpha", "beta", "gamma", "delta", store=store, regenerate=settings, resources={"regenerate": workers}
    )
    artifacts = Artifacts(open_store(manifest.store))
    jobs = [one.answers for one in make_plan(manifest, artifacts, target_digest).targets]
    with autoscaling(tmp_path) as (address, head):
        assert raylets(head) == {}
        child = driver(tmp_path, manifest, address)
        most: dict[str, psutil.Process] = {}
        try:
            while len(most) < 2:
                assert child.poll() is None, "it ended before the cluster had grown"
                most |= raylets(head)
                time.sleep(0.05)
            wait_for_shards(artifacts, jobs[0], 3, child)
            next(iter(most.values())).kill()
            open_then = sum(len(missing_shards(artifacts, job)) for job in jobs)
            answered = child.communicate(timeout=240)[0]
        finally:
            child.kill()
        assert answered.strip().splitlines()[-1] == "{}", answered
        assert 0 < open_then < len(jobs) * NUM_ROWS
        for job in jobs:
            assert ids_of(artifacts, job) == {prompt.id: 1 for prompt in job.prompts}


@contextmanager
def autoscaling(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A head without GPUs that may grow by two fake nodes of one each; its address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    types = {
        "ray.head.default": {"resources": {"CPU": 4}, "node_config": {}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 2, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
    }
    config = {
        "cluster_name": "farm-test",
        "max_workers": 3,  # one of them in place of a lost one
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in UNUSED},
        "file_mounts_sync_continuously": False,
    }
    file = folder / "autoscaling.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=4", "--include-dashboard=false", f"--autoscaling-config={file}"]
    variables = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with (folder / "head.log").open("w") as log:
        started = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **variables})
        head = psutil.Process(started.pid)
        try:
            deadline = time.monotonic() + 60
            while "Ray runtime started" not in (folder / "head.log").read_text():
                assert started.poll() is None, (folder / "head.log").read_text()
                assert time.monotonic() < deadline, (folder / "head.log").read_text()
                time.sleep(0.2)
            yield address, head
        finally:
            for process in [*head.children(recursive=True), head]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            started.wait()


def raylets(head: psutil.Process) -> dict[str, psutil.Process]:
    """Raylets of the nodes that the autoscaler has started, by process: it is their parent, not the head's command."""
    found = {}
    for process in head.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name() == "raylet" and process.parent() != head:
                found[str(process.pid)] = process
    return found
