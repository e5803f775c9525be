"""What a task asks for to have a node to itself: made-up nodes stand for a cluster."""

from typing import Any

import pytest

from farm.fleet.session import cpus_of_largest_node

# Of each node: all CPUs, free CPUs, GPUs, whether it is alive.
Node = tuple[float, float, float, bool]


@pytest.mark.parametrize(
    ("nodes", "num_gpus", "cpus"),
    [
        ([(64, 64, 0, True), (16, 16, 1, True), (16, 16, 1, True)], 1, 16),  # no node has 64 CPUs and a GPU
        ([(64, 64, 0, True), (16, 16, 1, True)], 0, 64),
        ([(8, 2.5, 0, True), (4, 4, 0, True)], 0, 4),  # what is free of one node is free on no other
        ([(8, 2.5, 0, True)], 0, 2),
        ([(8, 0, 1, True)], 0.5, 1),
        ([(8, 8, 0, True), (32, 32, 0, False)], 0, 8),
        ([(8, 8, 0, True)], 1, 1),  # the node with a GPU is yet to be started
    ],
)
def test_a_node_to_itself_is_one_that_has_the_gpus_too(
    monkeypatch: pytest.MonkeyPatch, nodes: list[Node], num_gpus: float, cpus: float
) -> None:
    known: list[dict[str, Any]] = [
        {
            "NodeID": str(number),
            "Alive": alive,
            "Resources": {"CPU": total, **({"GPU": gpus} if gpus else {})},
        }
        for number, (total, _, gpus, alive) in enumerate(nodes)
    ]
    free = {str(number): {"CPU": unused} for number, (_, unused, _, alive) in enumerate(nodes) if alive}
    monkeypatch.setattr("farm.fleet.session.SETTLE_S", 0.0)
    monkeypatch.setattr("ray.nodes", lambda: known)
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: free)
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": sum(one["CPU"] for one in free.values())})
    assert cpus_of_largest_node(num_gpus) == cpus
