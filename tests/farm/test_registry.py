import hashlib
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest

from farm.config import UserError
from farm.registry import Registry
from farm.store import CorruptObject, open_store

ROOT = Path(__file__).parents[2]
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
    command = [sys.executable, "-c", STOPS, registry.store.uri, before]
    publisher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert publisher.stdout is not None
    assert publisher.stdout.readline() == "here\n"
    publisher.kill()
    publisher.wait()
    publisher.stdout.close()
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
