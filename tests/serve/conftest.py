"""One Serve application for all tests of the endpoint: starting one takes longer than most of them."""

from collections.abc import Iterator

import pytest

from tests.serve.family import build_family, publish, tiny_expert
from tests.serve.served import HOSTED, MAX_LENGTH, Served, free_port


@pytest.fixture(scope="package")
def served(ray_cluster, tmp_path_factory) -> Iterator[Served]:
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
    serve.run(build(args), name="farm", route_prefix="/")
    yield Served(root, store, f"http://127.0.0.1:{port}")
    serve.shutdown()
