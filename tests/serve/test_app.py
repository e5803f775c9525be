"""Placement, roll-out and canary through the real Serve application: two groups of a small budget, one app.

Every answer is compared with what its target says alone: a wrong model would show.
"""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from farm.registry import Registry
from farm.store import open_store
from serve.records import Hosted
from tests.serve.family import TRUNK_KEY, build_family, loud_expert, publish, silent_expert
from tests.serve.served import HELLO, free_port, wait_until

pytestmark = pytest.mark.ray

TARGETS = ("a", "b", "c")
SWAP_S = 5  # within which a moved pointer is followed


@dataclass(frozen=True)
class Served:
    root: Path
    store: str
    url: str
    groups: tuple[tuple[str, ...], ...]
    solo: dict[str, str]  # each target's greedy answer, from before anything moved

    @property
    def registry(self) -> Registry:
        return Registry(open_store(self.store))

    def ask(self, target: str, max_tokens: int = 24, client: httpx.Client | None = None) -> httpx.Response:
        fields = {"model": target, "messages": HELLO, "temperature": 0, "max_tokens": max_tokens}
        post = (client or httpx).post
        return post(f"{self.url}/v1/chat/completions", json=fields, timeout=60)

    def version(self, target: str) -> str:
        return self.ask(target, 1).json()["system_fingerprint"].removeprefix(f"{target}@")

    def running(self, target: str) -> int:
        """Requests for it that are in a slot."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        of_target = (s for s in samples if s.name == "farm_requests_running" and s.labels["target"] == target)
        return int(sum(sample.value for sample in of_target))

    def hosted(self, group: int) -> list[Hosted]:
        from ray import serve

        handle = serve.get_deployment_handle(f"EngineHost-{group}", "farm")
        return handle.hosted.remote().result(timeout_s=30)


@pytest.fixture(scope="module")
def served(ray_cluster, tmp_path_factory) -> Iterator[Served]:
    from ray import serve

    from serve.app import build
    from serve.plan import BuildArgs, groups, plan

    root = tmp_path_factory.mktemp("app")
    store = build_family(root, TARGETS, predictable=True)
    publish(store, "a", silent_expert())
    args = BuildArgs(
        store=store, port=free_port(), num_slots=4, max_length=2000, k=3, control="fixed-3",
        max_ongoing_requests=8, max_queued_requests=64,
    )  # fmt: skip
    (whole,) = plan(args).groups
    args = args.model_copy(update={"memory_gib": (whole.num_bytes - 1) / 2**30})
    serve.run(build(args), name="farm", route_prefix="/")
    served = Served(root, store, f"http://127.0.0.1:{args.port}", groups(args), {})
    served.solo.update({name: content(served.ask(name)) for name in TARGETS})
    yield served
    serve.shutdown()


def content(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


class Load:
    """Clients that ask all targets in turn until the block ends; what they got is checked then."""

    def __init__(self, served: Served, num_clients: int = 4) -> None:
        self._served, self._num_clients = served, num_clients
        self.responses: list[tuple[str, httpx.Response]] = []
        self._ends = False

    def __enter__(self) -> "Load":
        self._pool = ThreadPoolExecutor(self._num_clients)
        self._clients = [self._pool.submit(self._ask, number) for number in range(self._num_clients)]
        return self

    def _ask(self, number: int) -> None:
        with httpx.Client() as client:
            while not self._ends:
                target = TARGETS[number % len(TARGETS)]
                self.responses.append((target, self._served.ask(target, client=client)))
                number += 1

    def __exit__(self, *_: object) -> None:
        self._ends = True
        self._pool.shutdown()
        for client in self._clients:
            client.result()

    def check(self, but: tuple[str, ...] = ()) -> None:
        """Nothing failed, except requests for the targets in `but`; nothing was answered by a wrong model."""
        for target, response in self.responses:
            if response.status_code != 200 and target in but:
                assert response.status_code == 503
                assert int(response.headers["Retry-After"]) >= 1
            else:
                assert content(response) == self._served.solo[target]


def test_a_deployment_that_is_taken_down_lets_answers_go_on_for_as_long_as_the_settings_say(tmp_path):
    from serve.app import BuildArgs, _host, build

    args = BuildArgs(store=build_family(tmp_path, ("a",)), drain_s=90)
    for deployment in (build(args)._bound_deployment, _host(args, 0, ("a",))._bound_deployment):
        assert deployment._deployment_config.graceful_shutdown_timeout_s == 90


def test_a_small_budget_makes_two_deployments_and_each_hosts_its_own_targets(served):
    assert sorted(name for group in served.groups for name in group) == list(TARGETS)
    assert len(served.groups) == 2
    for index, group in enumerate(served.groups):
        assert {one.target for one in served.hosted(index)} == set(group)
    assert len({served.hosted(index)[0].pid for index in (0, 1)}) == 2
    assert len(set(served.solo.values())) == len(TARGETS)
    listed = httpx.get(f"{served.url}/v1/models").json()["data"]
    assert [model["id"] for model in listed] == list(TARGETS)
    reasons = {one.target: one.reason for index in (0, 1) for one in served.hosted(index)}
    assert reasons == {"a": "", "b": "base", "c": "base"}


def test_under_load_versions_come_and_go_and_the_store_does_too_without_a_wrong_answer(served):
    with Load(served) as load:
        publish(served.store, "b", silent_expert())
        published = wait_until(lambda: served.version("b") == "v1", SWAP_S)
        folder = served.root / "store"
        folder.rename(served.root / "away")
        time.sleep(4.5)  # longer than two looks at it
        assert (served.version("a"), served.version("b"), served.version("c")) == ("v1", "v1", "base")
        (served.root / "away").rename(folder)
        publish(served.store, "c", b"no safetensors")
        publish(served.store, "b", silent_expert())
        wait_until(lambda: served.version("b") == "v2", SWAP_S)
        served.registry.rollback("b")
        rolled_back = wait_until(lambda: served.version("b") == "v1", SWAP_S)
    load.check()
    print(f"{len(load.responses)} answers; seconds to swap {published:.1f}, {rolled_back:.1f}")
    group = next(index for index, names in enumerate(served.groups) if "c" in names)

    def kept() -> bool:
        (current,) = [one for one in served.hosted(group) if one.target == "c"]
        return current.version == "base" and current.reason.startswith("kept: v1 cannot be loaded")

    wait_until(kept, SWAP_S)


def test_a_bad_canary_is_rolled_back_by_itself_under_load_and_a_good_one_is_promoted(served):
    def start(expert: bytes) -> str:
        version = served.registry.publish("a", {"expert.safetensors": expert}, {"trunk_key": TRUNK_KEY})
        assert served.registry.start_canary("a", version.version, 0.5)
        return version.version

    with Load(served) as load:
        bad = start(loud_expert(1))
        group = next(index for index, names in enumerate(served.groups) if "a" in names)
        wait_until(lambda: {one.share for one in served.hosted(group) if one.target == "a"} == {0.5}, SWAP_S)
        wait_until(lambda: served.registry.canary("a") is None, 40)
        wait_until(lambda: bad not in {one.version for one in served.hosted(group)}, SWAP_S)
        assert {served.version("a") for _ in range(8)} == {"v1"}
        good = start(silent_expert())
        wait_until(lambda: served.version("a") == good, SWAP_S)
        assert served.registry.promote("a", good, "v1")
        wait_until(lambda: {one.share for one in served.hosted(group) if one.target == "a"} == {1.0}, SWAP_S)
    load.check()
    versions = {response.json()["system_fingerprint"] for name, response in load.responses if name == "a"}
    assert versions == {"a@v1", f"a@{bad}", f"a@{good}"}


def test_a_replica_that_is_killed_takes_only_its_own_requests_with_it(served):
    async def kill_in_the_middle() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            fields = {"model": lost[0], "messages": HELLO, "temperature": 0, "max_tokens": 1900}
            asked = [
                asyncio.create_task(client.post(f"{served.url}/v1/chat/completions", json=fields))
                for _ in range(4)
            ]
            await asyncio.to_thread(wait_until, lambda: served.running(lost[0]) == len(asked), 10)
            during.enter_context(load)
            os.kill(pid, signal.SIGKILL)
            return await asyncio.gather(*asked)

    lost, pid = served.groups[1], served.hosted(1)[0].pid
    load = Load(served)
    with ExitStack() as during:
        responses = asyncio.run(kill_in_the_middle())
        wait_until(lambda: served.ask(lost[0], 1).status_code == 200, 60)
    assert {response.status_code for response in responses} == {503}
    assert all(int(response.headers["Retry-After"]) >= 1 for response in responses)
    assert all(response.json()["error"]["type"] == "server_error" for response in responses)
    load.check(but=lost)
    assert served.hosted(1)[0].pid != pid
    assert content(served.ask(lost[0])) == served.solo[lost[0]]
