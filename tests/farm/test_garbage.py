"""What is deleted is nothing that anybody could still need. On both stores; time is the caller's."""

import json
import os
import time

import pytest

from farm.artifacts import TRUNK, Artifacts
from farm.errors import UserError
from farm.garbage import delete_garbage, find_garbage
from farm.registry import Registry
from farm.status import StatusBoard
from farm.store import FileStore, ObjectStore, open_store
from tests.farm.killed import run_until

DAY = 86400.0
LATER = 30 * DAY  # after everything was written


@pytest.fixture
def store(store_uri: str) -> ObjectStore:
    return open_store(store_uri)


def publish(store: ObjectStore, promoted: bool, **card: str) -> str:
    registry = Registry(store)
    live = registry.live("math")
    version = registry.publish("math", {"expert": b"x" * 100}, {"trunk_key": "trunk1", **card})
    if promoted:
        assert registry.promote("math", version.version, live.version if live else None)
    return version.version


def finish(store: ObjectStore, stage: str, key: str, **manifest: str) -> None:
    artifacts = Artifacts(store)
    artifacts.put_file(stage, key, "data", b"y" * 1000)
    artifacts.finish(stage, key, manifest)


def found(store: ObjectStore, after: float = LATER, grace: float = 7 * DAY) -> list[str]:
    return [garbage.what for garbage in find_garbage(store, grace, time.time() + after)]


def collect(store: ObjectStore) -> None:
    for garbage in find_garbage(store, 7 * DAY, time.time() + LATER):
        assert delete_garbage(store, garbage)


def test_versions_that_are_live_next_to_roll_back_to_or_a_canary_stay(store):
    for promoted in (True, False, True, True, False, False):
        publish(store, promoted)
    pointer, etag = store.get_with_etag("registry/math/live.json")
    canary = json.loads(pointer) | {"canary": {"version": "v5", "share": 0.1}}
    assert store.compare_and_swap("registry/math/live.json", json.dumps(canary).encode(), etag)
    assert found(store) == ["version math@v1", "version math@v2", "version math@v6"]
    collect(store)
    registry = Registry(store)
    assert [version.version for version in registry.versions("math")] == ["v3", "v4", "v5"]
    assert registry.rollback("math").version == "v3"
    assert registry.publish("math", {}, {}).version == "v7"  # the number of a deleted one is not given again


def test_the_version_that_the_live_one_was_compared_with_stays(store):
    publish(store, promoted=True)
    publish(store, promoted=True)
    publish(store, promoted=True)
    publish(store, promoted=True, opponent="v1")
    assert found(store) == ["version math@v2"]


def test_outputs_that_a_kept_card_the_family_or_a_kept_output_names_stay(store):
    for stage, key, named in (
        (TRUNK, "trunk1", {"answers_key": "base-answers"}),
        ("answers", "base-answers", {}),
        ("answers", "answers1", {}),
        ("adapt", "adapt1", {"answers_key": "answers1"}),
        ("answers", "answers2", {}),
        ("adapt", "adapt2", {"answers_key": "answers2"}),
        (TRUNK, "trunk0", {}),
    ):
        finish(store, stage, key, **named)
    Artifacts(store).finish("probe", "probe1", {"tau": 2.0})  # a figure: nothing to gain by deleting it
    Artifacts(store).put_file("answers", "half", "shard", b"of a run that was killed")
    store.put("train/adapt-math-half/checkpoint_1/state", b"z")
    publish(store, promoted=False, adapt_key="adapt2")
    publish(store, promoted=True, adapt_key="adapt1")
    Registry(store).put_family({"trunk_key": "trunk1", "targets": {"math": {}}})
    expected = {
        "version math@v1", "adapt adapt2", "answers answers2", "answers half", "trunk trunk0",
        "checkpoints of adapt-math-half",
    }  # fmt: skip
    assert set(found(store)) == expected
    assert found(store, after=0.0) == []  # younger than the grace time
    collect(store)
    assert found(store) == []
    artifacts = Artifacts(store)
    for stage, key in (
        (TRUNK, "trunk1"),
        ("answers", "base-answers"),
        ("answers", "answers1"),
        ("adapt", "adapt1"),
    ):
        kept = artifacts.find(stage, key)
        assert kept is not None
        assert artifacts.path(kept, "data").read_bytes() == b"y" * 1000
    assert artifacts.find("probe", "probe1") is not None
    assert not store.list("artifacts/answers/half/")


def test_what_a_killed_writer_left_in_a_folder_goes_once_nobody_can_be_writing_it(tmp_path):
    store = FileStore(tmp_path)
    finish(store, TRUNK, "trunk1")
    Registry(store).put_family({"trunk_key": "trunk1"})
    run_until("written", KILLED_WRITER, str(tmp_path))
    (left,) = tmp_path.rglob(".tmp-*")
    StatusBoard(store, "run1").update("math", stage="adapt")  # which is none of its business
    assert found(store, after=3600.0, grace=0.0) == []
    assert found(store, after=2 * DAY) == []
    assert found(store, after=LATER) == ["unfinished file in artifacts/trunk/trunk1"]
    collect(store)
    assert not left.exists()
    assert Artifacts(store).find(TRUNK, "trunk1") is not None


@pytest.mark.parametrize(
    "key", ["registry/family.json", "registry/math/live.json", "registry/math/v1/card.json", "train/x"]
)
def test_what_a_killed_writer_left_anywhere_goes_and_no_version_with_it(tmp_path, key):
    """Its name was taken for a version's: gc ended with an error, or wrote it into the pointer for ever."""
    store = FileStore(tmp_path)
    publish(store, True)
    left = (tmp_path / key).with_name(".tmp-0123456789abcdef")
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(b"half")
    before = Registry(store).pointer("math")
    collect(store)
    assert not left.exists()
    assert Registry(store).pointer("math") == before
    assert Registry(store).live("math") is not None


def test_lists_go_before_what_they_name(store):
    """What is half deleted must not pass for whole: a checkpoint without its weights, a card without its shard."""
    for name in ("checkpoint_1/weights", "checkpoint_manager_snapshot.json", "a.json"):
        store.put(f"train/adapt-math@one/{name}", b"x")
    for name in ("features-00000.safetensors", "shard-00000.json", "tokens-00000.parquet"):
        store.put(f"artifacts/answers/half/{name}", b"x")
    keys = [garbage.keys for garbage in find_garbage(store, 0.0, time.time() + LATER)]
    assert [key.rpartition("/")[2] for of in sorted(keys) for key in of] == [
        "shard-00000.json", "features-00000.safetensors", "tokens-00000.parquet",
        "checkpoint_manager_snapshot.json", "a.json", "weights",
    ]  # fmt: skip


# Ends between the two steps of a write: all bytes are on disk, under a name that is not theirs.
KILLED_WRITER = """
import sys, time
from pathlib import Path
from farm.store import FileStore
Path.replace = lambda *_: (print("written", flush=True), time.sleep(60))
FileStore(Path(sys.argv[1])).put("artifacts/trunk/trunk1/weights", b"w" * 1000)
"""


def test_files_of_a_run_that_was_killed_beside_another_that_made_the_same_output_go(store):
    artifacts = Artifacts(store)
    artifacts.write(TRUNK, "trunk1", {"weights": b"w" * 100}, {"answers_key": "answers1"})
    store.put("artifacts/trunk/trunk1/0123abcd/weights", b"x" * 200)
    artifacts.put_file("answers", "answers1", "tokens-00000-one.parquet", b"of whose card was first")
    artifacts.put_file("answers", "answers1", "tokens-00000-two.parquet", b"of whose was not")
    artifacts.finish("answers", "answers1", {}, ["tokens-00000-one.parquet"])
    Registry(store).put_family({"trunk_key": "trunk1"})
    assert found(store, after=3600.0) == []
    assert sorted(found(store)) == ["strays of answers answers1", "strays of trunk trunk1"]
    collect(store)
    assert found(store) == []
    for stage, key in ((TRUNK, "trunk1"), ("answers", "answers1")):
        kept = artifacts.find(stage, key)
        assert kept is not None
        assert len(store.list(f"artifacts/{stage}/{key}/")) == 2
        assert list(artifacts.folder(kept).iterdir())


def test_a_publisher_that_has_not_written_its_card_yet_loses_nothing(store):
    store.put_if_absent("registry/math/v1/claim", b"")
    store.put("registry/math/v1/expert", b"x")
    assert found(store, after=3600.0) == []
    assert found(store) == ["version math@v1"]


def test_old_outputs_stay_while_a_run_that_may_read_them_is_under_way(tmp_path):
    """Nothing names the answers of a target that is being adapted. A folder, whose times can be set."""
    store = FileStore(tmp_path)
    finish(store, "answers", "old-answers")
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    board = StatusBoard(store, "run1")
    board.update("math", stage="adapt")
    assert found(store, after=0.0) == []
    assert found(store, after=3600.0, grace=0.0) == [], (
        "an hour of one stage, and somebody who keeps nothing else"
    )
    assert found(store, after=LATER) == ["answers old-answers"]  # the run was killed long ago
    board.update("math", decision="kept")
    assert found(store, after=0.0) == ["answers old-answers"]


def test_a_version_that_went_live_after_it_was_found_stays(store):
    publish(store, promoted=False)
    (garbage,) = find_garbage(store, 7 * DAY, time.time() + LATER)
    assert Registry(store).promote("math", "v1", None)
    assert not delete_garbage(store, garbage)
    assert Registry(store).live("math") is not None


class PromotedMeanwhile(FileStore):
    """Somebody promotes the version at the worst moment: the first deletion is decided and not yet done."""

    promoted: bool | None = None
    retires = True  # a store whose garbage is deleted after a look at the pointer, without more

    def compare_and_swap(self, key: str, data: bytes, expected_etag: str | None) -> bool:
        return not self.retires or super().compare_and_swap(key, data, expected_etag)

    def delete(self, key: str) -> None:
        if self.promoted is None:
            try:
                self.promoted = Registry(FileStore(self.root)).promote("math", "v2", "v1")
            except UserError:
                self.promoted = False
        super().delete(key)


@pytest.mark.parametrize("retires", [True, False])
def test_a_version_that_is_being_deleted_cannot_go_live_any_more(tmp_path, retires):
    store = PromotedMeanwhile(tmp_path)
    publish(store, promoted=True)
    publish(store, promoted=False)
    store.retires = retires
    (garbage,) = find_garbage(store, 7 * DAY, time.time() + LATER)
    assert delete_garbage(store, garbage)
    live = Registry(FileStore(tmp_path)).live("math")
    assert store.promoted is not retires
    assert (live is not None) is retires  # where nothing was retired, what is live is gone


def test_a_deletion_that_was_killed_half_way_is_finished_by_the_next(store):
    publish(store, promoted=True)
    publish(store, promoted=False)
    registry = Registry(store)
    assert registry.retire("math", "v2")
    assert [version.version for version in registry.versions("math")] == ["v1"]
    with pytest.raises(UserError, match="no version v2"):
        registry.start_canary("math", "v2", 0.5)
    assert found(store) == ["version math@v2"]
    collect(store)
    assert found(store) == []
    assert not registry.retire("math", "v1")


def test_the_card_goes_first_so_that_a_half_deleted_version_is_none(store):
    publish(store, promoted=False)
    (garbage,) = find_garbage(store, 7 * DAY, time.time() + LATER)
    assert garbage.keys[0] == "registry/math/v1/card.json"
    assert garbage.num_bytes > 100
    store.delete(garbage.keys[0])
    assert Registry(store).versions("math") == []
    collect(store)
    assert store.list("") == ["registry/math/live.json", "registry/math/v1/claim"]
