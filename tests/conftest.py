"""One local Ray for the whole run: starting one takes longer than most tests."""

import os

# read when ray is imported: without it a local cluster asks every later CLI client for a token
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Ray's processes would give way to all others, and they are what a whole run waits for; to the demo, which is one long
# test beside them, they give way a little.
os.environ.setdefault("RAY_worker_niceness", "5")

import atexit
import functools
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.s3_server import BUCKET, S3Server

# On a shared machine a pause is not a fault of the code.
settings.register_profile("farm", deadline=None)
settings.load_profile("farm")

S3 = S3Server()
# Ray's workers get the environment of the process that starts the cluster, which may be before the server runs.
os.environ.update(S3.environment)
os.environ["FARM_CACHE"] = tempfile.mkdtemp(prefix="farm-cache-")
atexit.register(shutil.rmtree, os.environ["FARM_CACHE"], ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files go to one of several processes: Ray's to the one that has the cluster, the demo to another."""
    from xdist.scheduler import LoadScopeScheduling

    class ByPlace(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return place_of(nodeid)

    return ByPlace(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first."""
    items.sort(key=lambda item: {"ray": 0, "demo": 1}.get(place_of(item.nodeid), 2))


def place_of(nodeid: str) -> str:
    """What runs in one process beside each other."""
    file = nodeid.partition("::")[0]
    if file == "tests/test_demo.py":
        return "demo"
    return "ray" if _needs_ray(file) else file


@functools.cache
def _needs_ray(file: str) -> bool:
    return "pytest.mark.ray" in (Path(__file__).parents[1] / file).read_text()


WORKER_VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[dict[str, Any]]:
    """Eight logical CPUs, whatever the machine has; yields the cluster's resources."""
    import ray

    ray.init(
        address="local",  # never a cluster that happens to run on this machine
        num_cpus=8,
        include_dashboard=False,
        namespace="farm-tests",
        log_to_driver=False,
        runtime_env={"env_vars": WORKER_VARIABLES},
    )
    yield ray.cluster_resources()
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server that the environment names."""
    S3.start(tmp_path_factory.mktemp("weed"))
    yield S3
    S3.kill()


@pytest.fixture
def s3_uri(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty prefix of the server's bucket, and a cache of its own."""
    monkeypatch.setenv("FARM_CACHE", str(tmp_path / "cache"))
    return f"s3://{BUCKET}/{secrets.token_hex(4)}"


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_uri"))
    return (tmp_path / "store").as_uri()
