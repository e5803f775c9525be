"""What the connected cluster has, and what it may grow to: nodes are started only once something waits for them."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from farm.errors import UserError

# Where `ray up` leaves its configuration on the head, and the variable that names another file of that kind.
BOOTSTRAP_FILE = "~/ray_bootstrap_config.yaml"
CONFIG_VARIABLE = "FARM_AUTOSCALING_CONFIG"


@dataclass(frozen=True)
class Capacity:
    """Nodes and their resources, summed."""

    num_nodes: int
    resources: Mapping[str, float]
    kinds: tuple[Mapping[str, float], ...] = ()  # the resources of one node, of every kind that there is

    def fit(self, amounts: Mapping[str, float]) -> float:
        """How often `amounts` fit into all nodes together, by their sum; infinite where nothing is asked for."""
        # Counted in Ray's units: in floating point a tenth of a GPU fits into a whole one nine times.
        return min(
            (
                _units(self.resources.get(name, 0.0)) // _units(amount)
                for name, amount in amounts.items()
                if _units(amount) > 0
            ),
            default=float("inf"),
        )


def _units(amount: float) -> int:
    return round(amount * 10_000)


def in_cluster() -> bool:
    """Whether this process belongs to a cluster already: a job's entrypoint, or RAY_ADDRESS is set."""
    return bool(os.environ.get("RAY_ADDRESS"))


def largest_cluster() -> Capacity:
    """The connected cluster at its largest: the nodes that live, or those that its autoscaler may start.

    Raises UserError when the variable names no file.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    now = Capacity(len(alive), ray.cluster_resources(), tuple(node["Resources"] for node in alive))
    named = os.environ.get(CONFIG_VARIABLE)
    file = Path(named or BOOTSTRAP_FILE).expanduser()
    if not in_cluster() or not (named or file.is_file()):
        return now
    if not file.is_file():
        raise UserError(
            f"{CONFIG_VARIABLE}: {file} is no file; name the autoscaler's configuration, or unset it"
        )
    return larger(now, allowed_by(yaml.safe_load(file.read_text())))


def larger(now: Capacity, grown: Capacity) -> Capacity:
    """The most of both, resource by resource, and the kinds of both."""
    most = Counter(now.resources) | Counter(grown.resources)
    return Capacity(max(now.num_nodes, grown.num_nodes), dict(most), (*now.kinds, *grown.kinds))


def allowed_by(config: Mapping[str, Any]) -> Capacity:
    """What a configuration of Ray's cluster launcher allows: its head and as many workers as it may have.

    Of each resource by itself, the types of nodes that have most of it first: an upper bound.
    """
    types, most = dict(config.get("available_node_types", {})), config.get("max_workers", 0)
    head = types.pop(config.get("head_node_type"), {}).get("resources", {})
    # A type without a bound of its own has that of all workers.
    workers = [(kind.get("resources", {}), kind.get("max_workers", most)) for kind in types.values()]
    names = {*head, *(name for resources, _ in workers for name in resources)}
    total = {name: float(head.get(name, 0) + _most_of(name, workers, most)) for name in names}
    kinds = (head, *(resources for resources, count in workers if min(count, most)))
    return Capacity(1 + min(most, sum(count for _, count in workers)), total, kinds)


def _most_of(name: str, workers: Sequence[tuple[Mapping[str, float], int]], most: int) -> float:
    each = (resources.get(name, 0) for resources, count in workers for _ in range(count))
    return sum(sorted(each, reverse=True)[:most])
