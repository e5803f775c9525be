import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farm.config import UserError
from farm.registry import Canary, Registry, RolledBack
from farm.store import CorruptObject, FileStore, open_store
from tests.farm.killed import run_until

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def registry(store_uri: str) -> Registry:
    return Registry(open_store(store_uri))


def publish_at(uri: str, own: int, start: float) -> None:
    registry = Registry(open_store(uri))
    time.sleep(max(0.0, start - time.time()))
    version = registry.publish("legal", {"expert.safetensors": bytes([own])}, {"own": own})
    sys.exit(0 if registry.promote("legal", version.version, None) else 3)


def test_publishers_that_race_get_their_own_versions_and_one_goes_live(registry):
    start = time.time() + 3
    racers = [SPAWN.Process(target=publish_at, args=(registry.store.uri, n, start)) for n in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert sorted(racer.exitcode or 0 for racer in racers) == [0, 3, 3]
    versions = registry.versions("legal")
    assert [version.version for version in versions] == ["v1", "v2", "v3"]
    for version in versions:
        assert registry.path(version, "expert.safetensors").read_bytes() == bytes([version.card["own"]])
    live = registry.live("legal")
    assert live is not None
    assert racers[live.card["own"]].exitcode == 0


def test_versions_are_numbered_as_numbers_beyond_nine(registry):
    for _ in range(11):
        registry.publish("legal", {}, {})
    assert [version.version for version in registry.versions("legal")] == [f"v{n}" for n in range(1, 12)]


def test_a_publisher_that_died_half_way_left_no_version_and_its_number_is_not_reused(registry):
    registry.publish("legal", {}, {})
    registry.store.put_if_absent("registry/legal/v2/claim", b"")
    registry.store.put("registry/legal/v2/expert.safetensors", b"half")
    assert [version.version for version in registry.versions("legal")] == ["v1"]
    with pytest.raises(UserError, match="no version v2"):
        registry.promote("legal", "v2", None)
    assert registry.publish("legal", {}, {}).version == "v3"


def test_targets_whose_names_share_a_beginning_do_not_mix(registry):
    registry.publish("a", {}, {})
    registry.publish("a.v1", {}, {})
    registry.publish("ab", {}, {})
    assert [version.target for version in registry.versions("a")] == ["a"]
    assert registry.live("a") is None


@pytest.mark.parametrize("name", ["v1/", "./v1", "../x", "", "v01", "v1\n", "claim"])
def test_only_a_versions_own_name_finds_it(registry, name):
    registry.publish("legal", {}, {})
    for use in (
        lambda: registry.promote("legal", name, None),
        lambda: registry.start_canary("legal", name, 0.5),
        lambda: registry.version("legal", name),
    ):
        with pytest.raises(UserError, match="has no version"):
            use()
    assert registry.pointer("legal").etag is None


def test_promotion_needs_to_know_what_is_live(registry):
    for _ in range(2):
        registry.publish("legal", {}, {})
    assert not registry.promote("legal", "v1", "v2")
    assert registry.promote("legal", "v1", None)
    assert not registry.promote("legal", "v2", None)
    assert registry.promote("legal", "v2", "v1")
    live = registry.live("legal")
    assert live is not None
    assert live.version == "v2"


def test_rollback_returns_to_what_was_live_before_not_to_the_number_below(registry):
    for _ in range(3):
        registry.publish("legal", {}, {"note": "x"})
    assert registry.promote("legal", "v1", None)
    assert registry.promote("legal", "v3", "v1")
    assert registry.rollback("legal").version == "v1"
    assert registry.live("legal") == registry.versions("legal")[0]
    with pytest.raises(UserError, match="no earlier live version"):
        registry.rollback("legal")


def test_promoting_what_is_live_keeps_what_is_rolled_back_to(registry):
    for _ in range(2):
        registry.publish("legal", {}, {})
    assert registry.promote("legal", "v1", None)
    assert registry.promote("legal", "v2", "v1")
    assert registry.promote("legal", "v2", "v2")  # a script that is run twice
    assert not registry.retire("legal", "v1")
    assert registry.rollback("legal").version == "v1"


def test_what_was_rolled_back_is_marked_until_somebody_promotes_it(registry):
    for _ in range(3):
        registry.publish("legal", {}, {})
    assert registry.promote("legal", "v1", None)
    assert registry.promote("legal", "v2", "v1")
    registry.rollback("legal")
    assert registry.pointer("legal").rolled_back == RolledBack("v2", "by hand")
    assert registry.promote("legal", "v3", "v1")
    assert registry.pointer("legal").rolled_back == RolledBack("v2", "by hand")
    assert registry.promote("legal", "v2", "v3")
    assert registry.pointer("legal").rolled_back is None


def test_every_version_that_was_rolled_back_stays_marked_whatever_is_tried_or_rolled_back_after_it(registry):
    """Two bad versions in a row, then a bad canary: the next onboarding may bring none of them back."""
    for _ in range(5):
        registry.publish("legal", {}, {})
    for version, before in (("v1", None), ("v2", "v1"), ("v3", "v2")):
        assert registry.promote("legal", version, before)
    registry.rollback("legal")
    registry.rollback("legal")
    assert registry.start_canary("legal", "v4", 0.5)
    assert registry.end_canary("legal", "v4", "worse")
    assert registry.start_canary("legal", "v5", 0.5)
    assert registry.end_canary("legal", "v5")
    marked = registry.pointer("legal").withdrawn
    assert marked == (RolledBack("v3", "by hand"), RolledBack("v2", "by hand"), RolledBack("v4", "worse"))
    assert registry.start_canary("legal", "v4", 0.5)
    assert registry.promote("legal", "v3", "v1")
    assert registry.pointer("legal").withdrawn == (RolledBack("v2", "by hand"),)
    assert registry.retire("legal", "v2")
    assert registry.pointer("legal").withdrawn == (RolledBack("v2", "by hand"),)


def test_an_adapter_that_was_rolled_back_is_known_by_its_key_until_a_version_of_it_is_promoted(registry):
    for adapter in ("good", "bad", "bad"):
        registry.publish("legal", {}, {"adapt_key": adapter})
    assert registry.promote("legal", "v1", None)
    assert registry.promote("legal", "v2", "v1")
    registry.rollback("legal")
    assert registry.pointer("legal").withdrawn == (RolledBack("v2", "by hand", "bad"),)
    assert registry.retire("legal", "v2")
    assert registry.promote("legal", "v3", "v1")
    assert registry.pointer("legal").withdrawn == ()


def test_a_version_that_a_rollback_makes_live_again_is_not_marked(registry):
    for _ in range(2):
        registry.publish("legal", {}, {})
    for version, before in (("v1", None), ("v2", "v1"), ("v1", "v2")):
        assert registry.promote("legal", version, before)
    for live, marked in (("v2", "v1"), ("v1", "v2")):
        assert registry.rollback("legal").version == live
        assert registry.pointer("legal").withdrawn == (RolledBack(marked, "by hand"),)


def test_a_pointer_that_knows_only_the_last_that_was_rolled_back_is_read(registry):
    pointer = {"version": "v1", "history": ["v1"], "rolled_back": {"version": "v2", "reason": "worse"}}
    registry.store.put("registry/legal/live.json", json.dumps(pointer).encode())
    assert registry.pointer("legal").withdrawn == (RolledBack("v2", "worse"),)


def test_a_retired_version_is_not_rolled_back_to(registry):
    for _ in range(2):
        registry.publish("legal", {}, {})
    pointer = {"version": "v2", "history": ["v1", "v2"], "retired": ["v1"]}
    registry.store.put("registry/legal/live.json", json.dumps(pointer).encode())
    with pytest.raises(UserError, match="no earlier live version"):
        registry.rollback("legal")


@pytest.mark.parametrize("target", ["../x", "a/b", ""])
def test_a_target_name_cannot_leave_the_registry(registry, target):
    with pytest.raises(UserError, match="no target name"):
        registry.publish(target, {}, {})


def test_the_family_is_asked_for_before_anything_was_onboarded(registry):
    with pytest.raises(UserError, match="farm onboard"):
        registry.family()
    registry.put_family({"base": "/b", "targets": {}})
    assert registry.family() == {"base": "/b", "targets": {}}


# Stops itself at the worst moments: once the files are there, and once the card is.
STOPS = """
import signal, sys
from farm.registry import Registry
from farm.store import open_store
registry = Registry(open_store(sys.argv[1]))
def stop(*_):
    print("here", flush=True)
    signal.pause()
put = registry.store.put
if sys.argv[2] == "card":
    registry.store.put = lambda key, data: stop() if key.endswith("card.json") else put(key, data)
registry._move = stop
version = registry.publish("legal", {"expert": b"new"}, {})
registry.promote("legal", version.version, "v1")
"""


@pytest.mark.parametrize(("before", "left"), [("card", ["v1"]), ("pointer", ["v1", "v2"])])
def test_a_publisher_killed_before_the_pointer_moved_leaves_the_old_version_live(registry, before, left):
    registry.publish("legal", {"expert": b"old"}, {})
    assert registry.promote("legal", "v1", None)
    run_until("here", STOPS, registry.store.uri, before)
    live = registry.live("legal")
    assert live is not None
    assert registry.path(live, "expert").read_bytes() == b"old"
    assert [version.version for version in registry.versions("legal")] == left
    assert registry.publish("legal", {"expert": b"again"}, {}).version == "v3"


def test_an_adapter_that_is_not_what_was_published_is_refused_with_both_digests(registry):
    version = registry.publish("legal", {"expert": b"published"}, {})
    registry.store.put("registry/legal/v1/expert", b"something")
    with pytest.raises(CorruptObject) as caught:
        registry.path(version, "expert")
    for data in (b"published", b"something"):
        assert hashlib.sha256(data).hexdigest() in str(caught.value)


def test_a_canary_is_kept_beside_the_live_version_until_it_ends_or_is_promoted(registry):
    for _ in range(3):
        registry.publish("legal", {}, {})
    assert registry.promote("legal", "v1", None)
    assert registry.start_canary("legal", "v2", 0.1)
    assert registry.start_canary("legal", "v2", 0.25)
    assert not registry.start_canary("legal", "v3", 0.1)
    assert registry.canary("legal") == Canary("v2", 0.25)
    assert registry.pointer("legal").live == "v1"
    assert not registry.end_canary("legal", "v3")
    assert registry.end_canary("legal", "v2")
    assert not registry.end_canary("legal", "v2")
    assert registry.start_canary("legal", "v3", 0.5)
    assert registry.promote("legal", "v2", "v1")
    assert registry.canary("legal") == Canary("v3", 0.5)
    assert registry.promote("legal", "v3", "v2")
    assert registry.canary("legal") is None


def test_a_canary_may_be_tried_beside_the_base_draft(registry):
    registry.publish("legal", {}, {})
    assert registry.start_canary("legal", "v1", 0.5)
    assert registry.live("legal") is None
    assert registry.promote("legal", "v1", None)
    assert registry.pointer("legal").canary is None


def test_rolling_back_to_the_version_that_is_tried_ends_the_trial(registry):
    for _ in range(2):
        registry.publish("legal", {}, {})
    assert registry.promote("legal", "v1", None)
    assert registry.promote("legal", "v2", "v1")
    assert registry.start_canary("legal", "v1", 0.5)
    assert registry.rollback("legal").version == "v1"
    assert registry.canary("legal") is None


def test_a_canary_that_makes_no_sense_is_refused_with_the_remedy(registry):
    for _ in range(2):
        registry.publish("legal", {}, {})
    assert registry.promote("legal", "v1", None)
    for share in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match="share"):
            registry.start_canary("legal", "v2", share)
    with pytest.raises(UserError, match="live already"):
        registry.start_canary("legal", "v1", 0.1)
    with pytest.raises(UserError, match="no version v9"):
        registry.start_canary("legal", "v9", 0.1)


def test_a_pointer_from_before_there_were_canaries_is_read(registry):
    registry.publish("legal", {}, {})
    registry.store.put("registry/legal/live.json", b'{"version": "v1", "history": ["v1"]}')
    assert registry.pointer("legal").live == "v1"
    assert registry.canary("legal") is None


class Interleaved(FileStore):
    """Runs `meanwhile` between an operation's read and its swap."""

    meanwhile: Callable[[], None] | None = None
    blind = False  # a store that forgets to compare

    def compare_and_swap(self, key: str, data: bytes, expected_etag: str | None) -> bool:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        if self.blind:
            self.put(key, data)
        elif not super().compare_and_swap(key, data, expected_etag):
            return False
        return True


VERSIONS = ("v1", "v2", "v3")
Operation = tuple[str, str, str | None]
OPERATIONS = st.one_of(
    st.tuples(st.just("promote"), st.sampled_from(VERSIONS), st.sampled_from((None, *VERSIONS))),
    st.tuples(st.sampled_from(("start", "end", "delete")), st.sampled_from(VERSIONS), st.none()),
    st.just(("rollback", "", None)),
)


class Model:
    """What the pointer must be after operations that each happened at one moment."""

    def __init__(self) -> None:
        self.history: tuple[str, ...] = ()
        self.canary: str | None = None
        self.deleted: set[str] = set()

    def apply(self, operation: Operation) -> str:
        """What its own moment does not allow about a success; empty where it does."""
        name, version, expected = operation
        live = self.history[-1] if self.history else None
        broken = ""
        if name == "promote":
            broken = f"promoted over {live}, expected {expected}" if live != expected else ""
            if live != version:
                self.history = (*self.history, version)
        elif name == "start":
            if live == version:
                broken = f"live {version} became its own canary"
            elif self.canary not in (None, version):
                broken = f"canary {version} replaced {self.canary}"
            self.canary = version
        elif name == "end":
            broken = f"canary {version} ended, there was {self.canary}" if self.canary != version else ""
            self.canary = None
        elif name == "delete":
            self.deleted.add(version)
        else:
            broken = "rolled back to nothing" if len(self.history) < 2 else ""
            self.history = self.history[:-1]
        if self.history and self.history[-1] == self.canary:
            self.canary = None
        lost = self.deleted & {*self.history[-2:], self.canary}
        return broken or (f"{name} {version}: {lost} is deleted and needed" if lost else "")


def attempt(registry: Registry, operation: Operation) -> bool:
    name, version, expected = operation
    try:
        if name == "promote":
            return registry.promote("legal", version, expected)
        if name == "start":
            return registry.start_canary("legal", version, 0.5)
        if name == "end":
            return registry.end_canary("legal", version)
        if name == "delete":
            retired = registry.retire("legal", version)
            if retired:
                registry.store.delete(f"registry/legal/{version}/card.json")
            return retired
        return bool(registry.rollback("legal"))
    except UserError:
        return False


def interleave(root: Path, operations: list[tuple[Operation, Operation]], *, blind: bool) -> list[str]:
    """One actor's operations, each with one of the other's between its read and its swap; the promises they broke."""
    store, model = Interleaved(root), Model()
    registry, other = Registry(store), Registry(FileStore(root))
    broken = []
    for _ in VERSIONS:
        registry.publish("legal", {}, {})
    store.blind = blind
    for mine, theirs in operations:

        def meanwhile(theirs: Operation = theirs) -> None:
            if attempt(other, theirs):
                broken.append(model.apply(theirs))

        store.meanwhile = meanwhile
        if attempt(registry, mine):
            broken.append(model.apply(mine))
        store.meanwhile = None  # still set where `mine` came to no swap
        pointer = registry.pointer("legal")
        seen = (pointer.history, pointer.canary and pointer.canary.version)
        if seen != (model.history, model.canary):
            broken.append(f"the pointer is {seen}, it must be {(model.history, model.canary)}")
    return [promise for promise in broken if promise]


@settings(max_examples=60)
@given(operations=st.lists(st.tuples(OPERATIONS, OPERATIONS), min_size=1, max_size=6))
def test_two_actors_that_interleave_are_as_if_one_came_after_the_other(tmp_path_factory, operations):
    assert interleave(tmp_path_factory.mktemp("registry"), operations, blind=False) == []


@pytest.mark.parametrize(
    ("mine", "theirs", "seen"),
    [
        (("start", "v2", None), ("promote", "v3", "v1"), "the pointer is (('v1',), 'v2'), it must be"),
        (("promote", "v2", "v1"), ("delete", "v2", None), "promote v2: {'v2'} is deleted and needed"),
        (("delete", "v2", None), ("promote", "v2", "v1"), "delete v2: {'v2'} is deleted and needed"),
    ],
)
def test_a_store_that_does_not_compare_breaks_a_promise(tmp_path, mine, theirs, seen):
    first = (("promote", "v1", None), ("end", "v1", None))
    broken = interleave(tmp_path, [first, (mine, theirs)], blind=True)
    assert broken[0].startswith(seen)
    assert interleave(tmp_path / "compares", [first, (mine, theirs)], blind=False) == []
