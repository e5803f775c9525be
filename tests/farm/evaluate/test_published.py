"""What a store has published: the trunk of its family, and the live experts that fit this trunk."""

from pathlib import Path

import pytest

from farm.artifacts import TRUNK, Artifacts
from farm.config import UserError
from farm.draft.checkpoint import EXPERT_FILE, TRUNK_FILE
from farm.evaluate.published import Published
from farm.registry import Registry
from farm.store import open_store


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Of a store whose family has the trunk `here`."""
    store = open_store(str(tmp_path))
    artifacts = Artifacts(store)
    artifacts.put_file(TRUNK, "here", EXPERT_FILE, b"of the base")
    artifacts.finish(TRUNK, "here", {})
    registry = Registry(store)
    registry.put_family({"trunk_key": "here"})
    return registry


def publish(registry: Registry, trunk_key: str) -> None:
    live = registry.live("math")
    version = registry.publish("math", {EXPERT_FILE: trunk_key.encode()}, {"trunk_key": trunk_key})
    assert registry.promote("math", version.version, live.version if live else None)


def test_the_live_expert_is_the_newest_one_of_this_trunk_alone(registry: Registry) -> None:
    """An expert over another trunk would draft noise; the base draft is what is left then."""
    published = Published.of(registry.store.uri)
    assert (published.trunk_folder / EXPERT_FILE).read_bytes() == b"of the base"
    assert published.live_expert("math") is None
    publish(registry, "here")
    live = published.live_expert("math")
    assert live is not None
    assert (live.version, live.file.read_bytes()) == ("v1", b"here")
    publish(registry, "another")
    assert published.live_expert("math") is None


def test_a_live_expert_of_other_bytes_of_the_same_trunk_is_refused(registry: Registry) -> None:
    Artifacts(registry.store).put_file(TRUNK, "again", TRUNK_FILE, b"trained again")
    trunk = Artifacts(registry.store).finish(TRUNK, "again", {})
    registry.put_family({"trunk_key": "again"})
    card = {"trunk_key": "again", "trunk_digest": "e" * 64}
    assert registry.promote("math", registry.publish("math", {EXPERT_FILE: b""}, card).version, None)
    with pytest.raises(UserError, match="e" * 64) as caught:
        Published.of(registry.store.uri).live_expert("math")
    assert trunk.manifest["files"][TRUNK_FILE]["sha256"] in str(caught.value)


def test_a_family_without_its_trunk_says_what_to_do(registry: Registry) -> None:
    registry.put_family({"trunk_key": "gone"})
    with pytest.raises(UserError, match="trunk gone is gone; run `farm onboard` again"):
        Published.of(registry.store.uri)
