"""Joining a Ray cluster, or starting a small one for the length of a run."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from farm.config import Manifest, check_placeable
from farm.fleet.capacity import in_cluster, largest_cluster
from farm.resources import AdaptResources

NAMESPACE = "farm"
AUTH_VARIABLE = "RAY_AUTH_MODE"
WORKER_VARIABLES = {
    # Ray starts a process for a service that a farm of short runs has no use for; it costs memory in every run.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Turns of OpenMP's loop in which a thread waits for the others, some ten microseconds; unset, milliseconds. Where
    # another process has one of the cores, they are taken from the thread that is waited for.
    "GOMP_SPINCOUNT": "1000",
}
# A run is a driver task, a controller and workers: fewer logical CPUs would wait for ever.
MIN_LOGICAL_CPUS = 4
# After which what a task gave back is known to be free: nodes tell of it every tenth of a second.
SETTLE_S = 0.5


def set_worker_variables() -> None:
    """In this process, and so in those of a cluster that it starts; before torch is imported, which reads them once."""
    for name, value in WORKER_VARIABLES.items():
        os.environ.setdefault(name, value)


@contextmanager
def connect() -> Iterator[None]:
    """Be connected to Ray inside the block.

    A cluster that is already connected is used and left connected. Inside a job, or with RAY_ADDRESS set,
    that cluster is joined; else a local one with at least four logical CPUs lives as long as the block.
    """
    # Left unset, Ray turns token authentication on in some commands and not in others.
    os.environ.setdefault(AUTH_VARIABLE, "token" if _has_token() and in_cluster() else "disabled")
    set_worker_variables()
    import ray

    if ray.is_initialized():
        yield
        return
    if in_cluster():
        ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
    else:
        cpus = max(MIN_LOGICAL_CPUS, os.cpu_count() or 1)
        ray.init(
            address="local",
            num_cpus=cpus,
            namespace=NAMESPACE,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()


def check_cluster(manifest: Manifest) -> None:
    """Raise UserError when the connected cluster, at its largest, can never place what the manifest asks for."""
    cluster = largest_cluster()
    check_placeable(manifest, cluster.resources, cluster.num_nodes, cluster.kinds)


def cpus_of_largest_node(num_gpus: float = 0.0) -> float:
    """What a task asks for to have a node to itself: the most CPUs free on one with `num_gpus` GPUs, at least 1."""
    import ray
    from ray._private.state import available_resources_per_node  # no public function says it node by node

    time.sleep(SETTLE_S)
    free = available_resources_per_node()
    nodes = (node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0.0) >= num_gpus)
    cpus = [int(free.get(node["NodeID"], {}).get("CPU", 0.0)) for node in nodes]
    return float(max([1, *cpus]))


def runs_at_once(resources: AdaptResources) -> int:
    """Training runs that fit on the cluster together, at most `parallel`: one without room would wait for
    ever.
    """
    run = {"CPU": float(resources.workers), "GPU": resources.gpus_per_worker * resources.workers}
    return max(1, int(min(resources.parallel, largest_cluster().fit(run))))


def _has_token() -> bool:
    return bool(os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"))
