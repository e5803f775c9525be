"""The registry as a replica follows it: real store, real engines, no Ray; every poll is made by the test."""

import logging
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from farm.decode.engine import Engine, Request, Route
from farm.decode.sampling import SamplingParams
from farm.draft.lean import LeanExpert
from farm.draft.routed import FlatExpert
from farm.errors import Denied, StoreUnusable
from farm.registry import Pointer, Registry
from farm.store import FileStore, open_store
from serve.canary import WorseTest
from serve.family import Family
from serve.lanes import Lane, Progress
from serve.loop import EngineLoop
from serve.replica import _describe
from serve.rollout import Rollout
from tests.serve.family import TRUNK_KEY, build_family, loud_expert, publish, silent_expert

K = 3


@dataclass
class Replica:
    """What a replica is made of, without Serve."""

    root: Path
    store: str
    rollout: Rollout
    loop: EngineLoop
    ended: list[tuple[str, str]]  # targets of canaries that it rolled back, each with the metric's reason

    @property
    def registry(self) -> Registry:
        return Registry(open_store(self.store))

    def ask(self, target: str, name: str, version: str | None = None, tokens: int = 12) -> list[Progress]:
        box: queue.Queue[Progress] = queue.Queue()
        request = Request(name, (10, 20, 30), SamplingParams(max_new_tokens=tokens))
        self.loop.submit(target, request, box.put, version)
        found = [box.get(timeout=20)]
        while not (found[-1].finish_reason or found[-1].unhosted or found[-1].failed):
            found.append(box.get(timeout=20))
        return found

    def version_of(self, target: str, name: str = "x", version: str | None = None) -> str:
        last = self.ask(target, name, version)[-1]
        return last.unhosted or last.version

    def lanes(self) -> dict[str, Lane]:
        return self.loop.inspect(lambda lanes, current: {lane.route: lane for lane in lanes}).result(20)

    def try_canary(self, expert: bytes, share: float, target: str = "a") -> str:
        version = self.registry.publish(target, {"expert.safetensors": expert}, {"trunk_key": TRUNK_KEY})
        assert self.registry.start_canary(target, version.version, share)
        self.rollout.poll()
        return version.version


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Replica]:
    store = build_family(tmp_path, ("a", "b"), predictable=True)
    publish(store, "a", silent_expert())
    made = open_replica(tmp_path, store)
    yield made
    made.loop.stop(wait_s=10)


def open_replica(root: Path, store: str) -> Replica:
    def engine(route: Route) -> Engine:
        return Engine([route], num_slots=2, max_length=64, k=K)

    family, loop = Family(store), EngineLoop(engine)
    ended: list[tuple[str, str]] = []
    rollout = Rollout(
        family, loop, lambda share: WorseTest(share, K, margin=0.05, alpha=0.01),
        rolled_back=lambda target, why: ended.append((target, why)),
    )  # fmt: skip
    for target in family.targets():
        rollout.add(target)
    loop.start()
    return Replica(root, store, rollout, loop, ended)


def test_a_pointer_that_moves_gives_new_requests_the_new_version_and_back(replica):
    assert (replica.version_of("a"), replica.version_of("b")) == ("v1", "base")
    assert (replica.rollout.reason("a"), replica.rollout.reason("b")) == ("", "base")
    publish(replica.store, "a", silent_expert())
    replica.rollout.poll()
    assert replica.version_of("a") == "v2"
    replica.registry.rollback("a")
    replica.rollout.poll()
    assert replica.version_of("a") == "v1"
    assert replica.version_of("b") == "base"


def test_a_store_that_is_away_changes_nothing_and_is_mentioned_once(replica, caplog):
    publish(replica.store, "b", silent_expert())
    replica.rollout.poll()
    folder = FileStore(replica.root / "store").root
    folder.rename(replica.root / "elsewhere")
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        for _ in range(5):
            replica.rollout.poll()
        assert (replica.version_of("a"), replica.version_of("b")) == ("v1", "v1")
        assert sum("cannot be read" in record.message for record in caplog.records) == 1
        (replica.root / "elsewhere").rename(folder)
        publish(replica.store, "a", silent_expert())
        replica.rollout.poll()
    assert replica.version_of("a") == "v2"
    assert sum("well again" in record.message for record in caplog.records) == 1


def test_a_version_that_cannot_be_loaded_is_named_and_what_serves_stays(replica, caplog):
    publish(replica.store, "a", b"no safetensors")
    for _ in range(3):
        replica.rollout.poll()
    assert replica.version_of("a") == "v1"
    assert replica.rollout.reason("a").startswith("kept: v2 cannot be loaded")
    assert sum("keeps what it has" in record.message for record in caplog.records) == 1
    publish(replica.store, "a", silent_expert())
    replica.rollout.poll()
    assert (replica.version_of("a"), replica.rollout.reason("a")) == ("v3", "")


def test_a_version_whose_file_is_late_is_tried_again_and_stops_no_other_target(replica):
    version = replica.registry.publish("a", {}, {"trunk_key": TRUNK_KEY})
    assert replica.registry.promote("a", version.version, "v1")
    publish(replica.store, "b", silent_expert())
    replica.rollout.poll()
    assert (replica.version_of("a"), replica.version_of("b")) == ("v1", "v1")
    replica.registry.store.put("registry/a/v2/expert.safetensors", silent_expert())
    replica.rollout.poll()
    assert replica.version_of("a") == "v2"


def fail_once(monkeypatch: pytest.MonkeyPatch, method: str, key: str) -> None:
    """The store's method fails the first time that it is asked for this key."""
    works, failures = getattr(FileStore, method), [StoreUnusable("the server answered 503")]

    def fails(store: FileStore, asked: str) -> object:
        if asked == key and failures:
            raise failures.pop()
        return works(store, asked)

    monkeypatch.setattr(FileStore, method, fails)


@pytest.mark.parametrize(
    ("method", "key"), [("local_path", "v2/expert.safetensors"), ("get_with_etag", "v2/card.json")]
)
def test_a_store_that_fails_while_a_version_is_loaded_is_asked_again(replica, monkeypatch, method, key):
    publish(replica.store, "a", silent_expert())
    fail_once(monkeypatch, method, f"registry/a/{key}")
    replica.rollout.poll()
    assert (replica.version_of("a"), replica.rollout.reason("a")) == ("v1", "")
    replica.rollout.poll()
    assert replica.version_of("a") == "v2"


def test_a_canary_survives_a_store_that_fails_while_it_is_loaded(replica, monkeypatch):
    fail_once(monkeypatch, "local_path", "registry/a/v2/expert.safetensors")
    version = replica.try_canary(silent_expert(), 0.5)
    assert replica.registry.canary("a") is not None
    assert replica.ended == []
    replica.rollout.poll()
    assert version in {replica.version_of("a", f"r{n}") for n in range(20)}


def test_an_outage_is_noticed_once_a_round_and_not_taken_for_a_broken_pointer(replica, monkeypatch, caplog):
    asked: list[str] = []

    def pointer(target: str) -> Pointer:
        asked.append(target)
        raise StoreUnusable("cannot be reached")

    monkeypatch.setattr(replica.rollout._family, "pointer", pointer)
    replica.rollout.poll()
    assert asked == ["a"]
    assert not any("makes no sense" in record.message for record in caplog.records)


@pytest.mark.parametrize("what", ["gone", "denied"])
def test_a_pointer_that_one_target_alone_lacks_keeps_no_other_from_being_followed(
    replica, monkeypatch, caplog, what
):
    works = FileStore.get_with_etag

    def denies(store: FileStore, key: str) -> object:
        if key == "registry/a/live.json":
            raise Denied("not allowed")
        return works(store, key)

    if what == "gone":
        (FileStore(replica.root / "store").root / "registry" / "a" / "live.json").unlink()
    else:
        monkeypatch.setattr(FileStore, "get_with_etag", denies)
    publish(replica.store, "b", silent_expert())
    for _ in range(3):
        replica.rollout.poll()
    assert (replica.version_of("a"), replica.version_of("b")) == ("v1", "v1")
    told = [record.message for record in caplog.records if "cannot be read" in record.message]
    assert [line.partition(":")[0] for line in told] == ["a"]


def test_a_target_whose_pointer_could_not_be_read_at_first_gets_the_base_draft_where_it_is_due(
    replica, monkeypatch
):
    card = {"trunk_key": "f" * 16}
    version = replica.registry.publish("b", {"expert.safetensors": silent_expert()}, card)
    assert replica.registry.promote("b", version.version, None)
    fail_once(monkeypatch, "get_with_etag", "registry/b/live.json")
    other = open_replica(replica.root, replica.store)
    try:
        assert other.version_of("b") == "plain"
        other.rollout.poll()
        assert other.version_of("b") == "base"
        assert other.rollout.reason("b") == "base: v1 was adapted on another trunk"
    finally:
        other.loop.stop(wait_s=10)


def rolled_back_to(replica: Replica, card: dict[str, str], expert: bytes | None) -> None:
    """b: v1 was live before the replica saw it, v2 serves; then v2 is rolled back."""
    files = {} if expert is None else {"expert.safetensors": expert}
    first = replica.registry.publish("b", files, card)
    assert replica.registry.promote("b", first.version, None)
    assert publish(replica.store, "b", silent_expert()) == "v2"
    replica.rollout.poll()
    assert replica.version_of("b") == "v2"
    assert replica.registry.rollback("b").version == "v1"


@pytest.mark.parametrize(
    ("trunk_key", "expert"),
    [("f" * 16, silent_expert()), (TRUNK_KEY, b"no safetensors"), (TRUNK_KEY, None)],
    ids=["of another trunk", "broken", "late"],
)
def test_a_version_that_was_rolled_back_is_given_up_also_where_the_one_before_cannot_be_loaded(
    replica, caplog, trunk_key, expert
):
    caplog.set_level(logging.INFO, logger="ray.serve")
    rolled_back_to(replica, {"trunk_key": trunk_key}, expert)
    expected = [progress.tokens for progress in replica.ask("b", "before")]
    for _ in range(3):
        replica.rollout.poll()
    found = replica.ask("b", "after")
    assert found[-1].version == "base"
    assert sum((progress.tokens for progress in found), ()) == sum(expected, ())
    assert replica.rollout.reason("b").startswith("base: v1 ")
    assert "b@v2" not in replica.lanes()
    assert sum("b@base takes the requests" in record.message for record in caplog.records) == 1
    assert replica.registry.promote("b", "v2", "v1")  # who insists is heard
    replica.rollout.poll()
    assert (replica.version_of("b"), replica.rollout.reason("b")) == ("v2", "")


def test_a_version_that_was_rolled_back_gives_way_also_where_a_broken_one_was_promoted_since(replica):
    """Two moves between two looks: what is live now is broken, what served is what was rolled back."""
    rolled_back_to(replica, {"trunk_key": TRUNK_KEY}, silent_expert())
    publish(replica.store, "b", b"no safetensors")
    replica.rollout.poll()
    assert replica.version_of("b") == "base"
    assert replica.rollout.reason("b").startswith("base: v3 cannot be loaded")


def test_a_rollback_that_a_failing_store_delays_ends_at_the_version_before(replica, monkeypatch):
    rolled_back_to(replica, {"trunk_key": TRUNK_KEY}, silent_expert())
    fail_once(monkeypatch, "local_path", "registry/b/v1/expert.safetensors")
    replica.rollout.poll()
    assert replica.version_of("b") == "base"
    replica.rollout.poll()
    assert (replica.version_of("b"), replica.rollout.reason("b")) == ("v1", "")


def test_an_adapter_that_is_broken_from_the_start_is_decoded_plainly_to_the_same_answer(replica, tmp_path):
    expected = [progress.tokens for progress in replica.ask("b", "good")]
    publish(replica.store, "b", b"no safetensors")
    other = open_replica(replica.root, replica.store)
    try:
        found = [progress.tokens for progress in other.ask("b", "plain")]
        assert sum(found, ()) == sum(expected, ())
        assert len(found) > len(expected)  # a token a round
        assert other.rollout.reason("b").startswith("plain: v1 cannot be loaded")
        assert other.lanes()["b@plain"].engine.stats_of["b@plain"].tau == 1
    finally:
        other.loop.stop(wait_s=10)


def test_a_canary_gets_its_share_and_a_named_version_is_what_was_named(replica):
    assert replica.try_canary(silent_expert(), 0.3) == "v2"
    versions = [replica.version_of("a", f"r{number}") for number in range(100)]
    assert 0.15 < versions.count("v2") / 100 < 0.45
    assert versions == [replica.version_of("a", f"r{number}") for number in range(100)]
    assert {replica.version_of("a", f"p{n}", "v2") for n in range(8)} == {"v2"}
    assert {replica.version_of("a", f"p{n}", "v1") for n in range(8)} == {"v1"}
    assert replica.version_of("a", "nobody", "v9") == "a@v9"
    test = replica.lanes()["a@v2"].test
    assert test is not None
    assert test.live.requests + test.canary.requests == 200  # those with a name were not given out by chance
    replica.registry.promote("a", "v2", "v1")
    replica.rollout.poll()
    assert {replica.version_of("a", f"r{n}") for n in range(20)} == {"v2"}
    assert replica.version_of("a", "old", "v1") == "a@v1"
    assert replica.lanes()["a@v2"].test is None


def test_all_choices_of_a_request_come_from_one_version_and_the_current_one_names_its_canary(replica):
    publish(replica.store, "a", silent_expert())
    assert replica.registry.rollback("a")
    assert replica.registry.start_canary("a", "v2", 0.5)
    replica.rollout.poll()
    served = [{replica.version_of("a", f"{name}/{index}") for index in range(3)} for name in range(12)]
    assert {len(versions) for versions in served} == {1}
    assert set.union(*served) == {"v1", "v2"}
    hosted = replica.loop.inspect(partial(_describe, replica.rollout.reason)).result(timeout=10)
    assert {(one.version, one.canary, one.share) for one in hosted if one.target == "a"} == {
        ("v1", "v2", 0.5),
        ("v2", None, 0.5),
    }


def test_a_bad_canary_is_rolled_back_by_what_its_requests_show(replica, caplog):
    solo = [progress.tokens for progress in replica.ask("a", "solo")]
    assert replica.try_canary(loud_expert(1), 0.5) == "v2"
    needed = None
    for number in range(200):
        answer = replica.ask("a", f"r{number}")
        assert sum((progress.tokens for progress in answer), ()) == sum(solo, ())
        if number % 10 == 9:
            replica.rollout.poll()
            if replica.registry.canary("a") is None:
                needed = number + 1
                break
    assert needed is not None
    (record,) = [record for record in caplog.records if "is rolled back" in record.message]
    assert "a@v2" in record.message
    told = replica.registry.pointer("a").rolled_back
    assert told is not None
    assert (told.version, told.reason in record.message) == ("v2", True)
    assert replica.ended == [("a", "worse")]
    replica.rollout.poll()
    assert {replica.version_of("a", f"after{n}") for n in range(20)} == {"v1"}


def test_two_replicas_decide_on_their_own_and_the_second_finds_it_done(replica, caplog):
    other = open_replica(replica.root, replica.store)
    try:
        replica.try_canary(loud_expert(1), 0.5)
        other.rollout.poll()
        for number in range(80):
            replica.ask("a", f"r{number}")
            other.ask("a", f"s{number}")
        replica.rollout.poll()
        assert replica.registry.canary("a") is None
        other.rollout._judge()  # before it sees that the canary is gone
        other.rollout.poll()
        for one in (replica, other):
            assert {one.version_of("a", f"after{n}") for n in range(20)} == {"v1"}
    finally:
        other.loop.stop(wait_s=10)
    assert sum("is rolled back" in record.message for record in caplog.records) == 2
    assert not any("cannot be" in record.message for record in caplog.records)


def test_a_roll_back_is_decided_while_the_store_is_away_and_written_later(replica):
    replica.try_canary(loud_expert(1), 0.5)
    folder = FileStore(replica.root / "store").root
    folder.rename(replica.root / "elsewhere")
    for number in range(80):
        replica.ask("a", f"r{number}")
    replica.rollout.poll()
    assert {replica.version_of("a", f"after{n}") for n in range(20)} == {"v1"}
    (replica.root / "elsewhere").rename(folder)
    assert replica.registry.canary("a") is not None
    replica.rollout.poll()
    assert replica.registry.canary("a") is None
    assert replica.registry.start_canary("a", "v2", 0.5)  # who insists is heard
    replica.rollout.poll()
    assert "v2" in {replica.version_of("a", f"again{n}") for n in range(20)}


def test_a_good_canary_stays(replica):
    replica.try_canary(silent_expert(), 0.5)
    for number in range(80):
        replica.ask("a", f"r{number}")
    replica.rollout.poll()
    assert replica.registry.canary("a") is not None


def test_a_canary_that_cannot_be_loaded_is_ended_for_all_with_its_reason_and_may_be_tried_again(
    replica, caplog
):
    version = replica.try_canary(b"no safetensors", 0.5, "b")
    ended = replica.registry.pointer("b")
    assert ended.canary is None
    assert ended.rolled_back is not None
    assert ended.rolled_back.version == version
    assert "cannot be loaded" in ended.rolled_back.reason
    assert replica.ended == [("b", "unreadable")]
    replica.rollout.poll()
    assert sum("is rolled back" in record.message for record in caplog.records) == 1
    assert {replica.version_of("b", f"r{n}") for n in range(20)} == {"base"}
    assert replica.registry.start_canary("b", version, 0.5)
    assert replica.registry.pointer("b").rolled_back is None
    replica.rollout.poll()
    assert replica.ended == [("b", "unreadable")] * 2


def test_the_experts_of_a_new_version_are_fused_where_it_is_loaded_not_between_steps(replica, monkeypatch):
    replica.version_of("a")  # the trunk is fused by the first batch
    threads: list[str] = []
    for form in (LeanExpert, FlatExpert):
        made = form.of

        def noted(*args, made=made):
            threads.append(threading.current_thread().name)
            return made(*args)

        monkeypatch.setattr(form, "of", noted)
    publish(replica.store, "a", silent_expert())
    replica.rollout.poll()
    beside: queue.Queue[Progress] = queue.Queue()
    replica.loop.submit("b", Request("long", (10, 20, 30), SamplingParams(max_new_tokens=60)), beside.put)
    assert replica.version_of("a") == "v2"
    replica.lanes()
    assert threads == [threading.current_thread().name] * 2


def test_a_version_that_takes_long_to_load_holds_up_neither_polls_caller_nor_answers(replica, monkeypatch):
    """The store answers slowly: requests of that time are answered as before, by the version before."""
    slow = FileStore.local_path

    def local_path(store: FileStore, key: str) -> Path:
        if key.endswith("expert.safetensors"):
            time.sleep(1.5)
        return slow(store, key)

    monkeypatch.setattr(FileStore, "local_path", local_path)
    publish(replica.store, "a", silent_expert())
    replica.rollout.start()
    time.sleep(0.2)
    started = time.monotonic()
    assert replica.version_of("a") == "v1"
    assert time.monotonic() - started < 1
    while replica.version_of("a") != "v2":
        assert time.monotonic() - started < 5
    replica.rollout.stop()
