"""What every store promises, on a folder and on a real S3 server; then what a folder alone has to get right."""

import errno
import multiprocessing
import os
import secrets
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from farm.config import UserError
from farm.store import CorruptObject, FileStore, NotFound, ObjectStore, local_copy, open_store
from tests.farm.killed import ROOT, run_until

SPAWN = multiprocessing.get_context("spawn")
RACERS = 6


@pytest.fixture
def store(store_uri: str) -> ObjectStore:
    return open_store(store_uri)


@pytest.fixture
def folder(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "folder")


def everything_on_disk(store: FileStore) -> list[str]:
    return sorted(path.name for path in store.root.rglob("*") if path.is_file())


def test_put_replaces_whole_and_its_etag_is_what_a_reader_gets(store):
    first = store.put("a/b", b"one")
    assert store.get_with_etag("a/b") == (b"one", first)
    second = store.put("a/b", b"two")
    assert store.get_with_etag("a/b") == (b"two", second)
    assert first != second
    assert store.list("") == ["a/b"]


@pytest.mark.parametrize("num_bytes", [0, 2**20 + 1, 20 * 2**20])
def test_put_file_gives_the_same_object_as_put(store, tmp_path, num_bytes):
    """The last one is above the size from which S3 is given parts."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(num_bytes))
    assert store.put_file("a", source) == store.put("b", source.read_bytes())
    assert store.get("a") == store.get("b") == store.local_path("a").read_bytes() == source.read_bytes()
    assert store.digest("a") == store.digest("b")
    assert store.digest("a")[0] == num_bytes


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x", "", ".", "a\0b"])
def test_a_key_cannot_leave_the_store(store, key):
    for action in (store.get, store.exists, store.delete, store.local_path, lambda key: store.put(key, b"")):
        with pytest.raises(ValueError, match="store key"):
            action(key)


def test_what_is_absent_is_not_found(store):
    store.put("a/b", b"")
    for key in ("x", "a", "a/b/c"):
        for action in (store.get, store.local_path, store.digest):
            with pytest.raises(NotFound):
                action(key)
        assert not store.exists(key)
    store.delete("x")


def test_list_takes_a_prefix_of_the_key_not_only_a_folder(store, monkeypatch):
    monkeypatch.setattr("farm.s3.PAGE_KEYS", 2)  # a listing is several answers of the server
    for key in ("r/a/v1/card", "r/a/v10/card", "r/ab/v1", "z"):
        store.put(key, b"")
    assert store.list("r/a/v1") == ["r/a/v1/card", "r/a/v10/card"]
    assert store.list("r/a") == ["r/a/v1/card", "r/a/v10/card", "r/ab/v1"]
    assert store.list("r/a/") == ["r/a/v1/card", "r/a/v10/card"]
    assert store.list("") == ["r/a/v1/card", "r/a/v10/card", "r/ab/v1", "z"]
    assert store.list("nothing/") == []


def test_entries_know_size_and_age(store):
    before = time.time()
    store.put("a", b"12345")
    (entry,) = store.entries("")
    assert (entry.key, entry.num_bytes) == ("a", 5)
    assert before - 2 < entry.modified < time.time() + 2


def test_put_if_absent_never_replaces(store):
    assert store.put_if_absent("a", b"one")
    assert not store.put_if_absent("a", b"two")
    assert store.get("a") == b"one"


def test_compare_and_swap_needs_the_etag_that_is_there(store):
    assert not store.compare_and_swap("a", b"x", "some etag")
    assert store.compare_and_swap("a", b"one", None)
    assert not store.compare_and_swap("a", b"two", None)
    _, etag = store.get_with_etag("a")
    assert store.compare_and_swap("a", b"two", etag)
    assert not store.compare_and_swap("a", b"three", etag)
    assert store.get("a") == b"two"
    assert store.list("") == ["a"]


def test_what_a_location_names_is_what_was_put(store):
    store.put("models/m/config.json", b"{}")
    store.put("models/m/weights", b"123")
    store.put("models/mm", b"of another")
    assert local_copy(store.location("models/m/weights")).read_bytes() == b"123"
    found = local_copy(store.location("models/m"))
    assert {path.name: path.read_bytes() for path in found.iterdir()} == {
        "config.json": b"{}",
        "weights": b"123",
    }
    store.delete("models/m/weights")
    store.put("models/m/config.json", b"[]")
    found = local_copy(store.location("models/m"))
    assert {path.name: path.read_bytes() for path in found.iterdir()} == {"config.json": b"[]"}


def increment(uri: str, times: int) -> None:
    store = open_store(uri)
    for _ in range(times):
        while True:
            data, etag = store.get_with_etag("counter")
            if store.compare_and_swap("counter", str(int(data) + 1).encode(), etag):
                break


def test_processes_that_race_to_swap_lose_no_update(store):
    store.put("counter", b"0")
    racers = [SPAWN.Process(target=increment, args=(store.uri, 25)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0] * 4
    assert store.get("counter") == b"100"


def claim(uri: str, own: bytes, start: float) -> None:
    store = open_store(uri)
    time.sleep(max(0.0, start - time.time()))
    sys.exit(0 if store.put_if_absent("claim", own * 100_000) else 3)


def test_of_processes_that_race_for_one_key_exactly_one_wins(store):
    start = time.time() + 3
    racers = [SPAWN.Process(target=claim, args=(store.uri, str(n).encode(), start)) for n in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    codes = [racer.exitcode for racer in racers]
    assert sorted(codes) == [0, 3, 3, 3]
    assert store.get("claim") == str(codes.index(0)).encode() * 100_000


Claim = Callable[[ObjectStore, str, bytes], bool]


def winners(store: ObjectStore, claim: Claim) -> list[int]:
    """Which of the threads that claim one key at the same moment are told that it is theirs."""
    key, together, won = secrets.token_hex(4), threading.Barrier(RACERS), []

    def race(own: int) -> None:
        together.wait()
        if claim(store, key, str(own).encode() * 10_000):
            won.append(own)

    racers = [threading.Thread(target=race, args=(own,)) for own in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert store.get(key)[:1].decode() in map(str, won)
    return won


def check_then_put(store: ObjectStore, key: str, data: bytes) -> bool:
    """The wrong way to put if absent: two may look before either writes."""
    if store.exists(key):
        return False
    store.put(key, data)
    return True


def test_of_threads_that_race_for_one_key_exactly_one_wins_and_looking_first_is_not_enough(store):
    for _ in range(3):
        assert len(winners(store, lambda store, key, data: store.put_if_absent(key, data))) == 1
    assert any(len(winners(store, check_then_put)) > 1 for _ in range(20))


def test_importing_the_store_loads_no_client_of_s3():
    code = "import farm.store, farm.registry, sys; sys.exit('boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_store_opens_by_uri_or_path_and_refuses_other_schemes(tmp_path):
    folder = tmp_path / "my store"
    open_store(folder.as_uri()).put("a", b"1")
    assert open_store(str(folder)).get("a") == b"1"
    assert open_store(str(folder)).uri == folder.as_uri()
    with pytest.raises(UserError, match="gs:// is not supported"):
        open_store("gs://bucket/x")


def test_other_users_of_a_shared_folder_can_read_an_object(folder):
    folder.put("a", b"")
    old = os.umask(0o022)
    os.umask(old)
    assert stat.S_IMODE(folder.local_path("a").stat().st_mode) == 0o666 & ~old


@pytest.mark.parametrize("key", ["a/.tmp-x", "a.lock"])
def test_a_key_cannot_look_like_a_file_that_a_folder_keeps_for_itself(folder, key):
    with pytest.raises(ValueError, match="keeps for itself"):
        folder.put(key, b"")


# A file size limit makes the kernel itself refuse the write half way, as a full disk does.
WRITE_PAST_LIMIT = """
import resource, signal, sys
from pathlib import Path
from farm.store import FileStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store, action, source = FileStore(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    getattr(store, action)("shard", source if action == "put_file" else source.read_bytes())
except OSError as error:
    sys.exit(7 if store.list("") == [] else 8)
"""


@pytest.mark.parametrize("action", ["put", "put_if_absent", "put_file"])
def test_a_write_that_the_disk_refuses_half_way_leaves_nothing(folder, tmp_path, action):
    source = tmp_path / "source"
    source.write_bytes(b"x" * 200_000)
    command = [sys.executable, "-c", WRITE_PAST_LIMIT, str(folder.root), action, str(source)]
    assert subprocess.run(command, cwd=ROOT).returncode == 7
    assert everything_on_disk(folder) == []


def test_a_disk_that_is_full_at_the_sync_keeps_the_old_object(folder, monkeypatch):
    folder.put("a", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.put("a", b"new")
    assert folder.get("a") == b"old"
    assert everything_on_disk(folder) == ["a"]


# Stops itself once the bytes are on disk, before the object appears: the worst moment to be killed.
STOP_BEFORE_RENAME = """
import os, signal, sys
from pathlib import Path
from farm.store import FileStore
def stop(*_):
    print("written", flush=True)
    signal.pause()
os.replace = os.link = stop
getattr(FileStore(Path(sys.argv[1])), sys.argv[2])("shard", b"x" * 100_000)
"""


@pytest.mark.parametrize("action", ["put", "put_if_absent"])
def test_a_writer_killed_before_the_end_leaves_nothing_visible_and_a_second_one_succeeds(folder, action):
    run_until("written", STOP_BEFORE_RENAME, str(folder.root), action)
    assert folder.list("") == []
    assert not folder.exists("shard")
    assert folder.put_if_absent("shard", b"whole")
    assert folder.get("shard") == b"whole"


HOLD_LOCK = """
import sys, time
from pathlib import Path
from farm.store import FileStore
store = FileStore(Path(sys.argv[1]))
def stop(*_):
    print("locked", flush=True)
    time.sleep(600)
store.put = stop
store.compare_and_swap("pointer", b"new", store.get_with_etag("pointer")[1])
"""


def test_a_swapper_killed_while_it_holds_the_lock_blocks_nobody(folder):
    etag = folder.put("pointer", b"old")
    run_until("locked", HOLD_LOCK, str(folder.root))
    assert folder.compare_and_swap("pointer", b"new", etag)


def find_corrupt() -> None:
    raise CorruptObject("store/weights", "0a", "0b")


def test_what_is_corrupt_is_told_where_another_process_has_seen_it() -> None:
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool, pytest.raises(CorruptObject) as told:
        pool.submit(find_corrupt).result()
    assert str(told.value) == str(CorruptObject("store/weights", "0a", "0b"))
