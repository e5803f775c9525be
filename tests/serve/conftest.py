"""One Serve application for all tests of the endpoint: starting one takes longer than most of them."""

from collections.abc import Iterator

import httpx
import pytest

from tests.serve.family import build_family, publish, tiny_expert
from tests.serve.served import HOSTED, MAX_LENGTH, Served, free_port


@pytest.fixture(scope="session")
def kept(ray_cluster) -> Iterator[list[Served]]:
    """The application that runs, if one does."""
    from ray import serve

    started: list[Served] = []
    yield started
    if started:
        serve.shutdown()


@pytest.fixture(scope="module")
def served(kept: list[Served], tmp_path_factory) -> Served:
    """The one that an earlier module has started, or another where a module between them has ended Serve."""
    if not kept or not answers(kept[0]):
        kept[:] = [start(tmp_path_factory)]
    return kept[0]


def answers(served: Served) -> bool:
    try:
        return httpx.get(f"{served.url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def start(tmp_path_factory) -> Served:
    from ray import serve

    from serve.app import BuildArgs, build

    root = tmp_path_factory.mktemp("family")
    store = build_family(root, (*HOSTED, "broken"))
    publish(store, "adapted", tiny_expert(1))
    publish(store, "misfit", b"no safetensors")
    (root / "broken" / "model.safetensors").write_bytes(b"no weights")
    port = free_port()
    args = BuildArgs(
        store=store,
        port=port,
        num_slots=2,
        max_length=MAX_LENGTH,
        k=3,
        control="fixed-3",  # so that a seed repeats its sample: the other controls follow the load
        max_ongoing_requests=4,
        max_queued_requests=4,  # all of HOSTED may wait at once while the router looks for room
    )
    serve.shutdown()  # a Serve that runs keeps its port
    serve.run(build(args), name="farm", route_prefix="/")
    return Served(root, store, f"http://127.0.0.1:{port}")
