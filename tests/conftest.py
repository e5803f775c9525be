"""One local Ray for the whole run: starting one takes longer than most tests."""

import os

# read when ray is imported: without it a local cluster asks every later CLI client for a token
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from collections.abc import Iterator
from typing import Any

import pytest

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
