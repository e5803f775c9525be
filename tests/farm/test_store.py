import errno
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from farm.config import UserError
from farm.store import FileStore, NotFound, open_store

SPAWN = multiprocessing.get_context("spawn")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def everything_on_disk(store: FileStore) -> list[str]:
    return sorted(path.name for path in store.root.rglob("*") if path.is_file())


def test_put_replaces_whole_and_its_etag_is_what_a_reader_gets(store):
    first = store.put("a/b", b"one")
    assert store.get_with_etag("a/b") == (b"one", first)
    second = store.put("a/b", b"two")
    assert store.get_with_etag("a/b") == (b"two", second)
    assert first != second
    assert everything_on_disk(store) == ["b"]


def test_put_file_gives_the_same_object_as_put(store, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"x" * (2**20 + 1))
    assert store.put_file("a", source) == store.put("b", source.read_bytes())
    assert store.get("a") == store.get("b") == store.local_path("a").read_bytes()


def test_other_users_of_a_shared_folder_can_read_an_object(store):
    store.put("a", b"")
    old = os.umask(0o022)
    os.umask(old)
    assert stat.S_IMODE(store.local_path("a").stat().st_mode) == 0o666 & ~old


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x", "", ".", "a/.tmp-x", "a.lock", "a\0b"])
def test_a_key_cannot_leave_the_store_or_look_like_its_own_files(store, key):
    for action in (store.get, store.exists, store.delete, store.local_path, lambda key: store.put(key, b"")):
        with pytest.raises(ValueError, match="store key"):
            action(key)


def test_what_is_absent_is_not_found(store):
    store.put("a/b", b"")
    for key in ("x", "a", "a/b/c"):
        with pytest.raises(NotFound):
            store.get(key)
        with pytest.raises(NotFound):
            store.local_path(key)
        assert not store.exists(key)
    store.delete("x")


def test_list_takes_a_prefix_of_the_key_not_only_a_folder(store):
    for key in ("r/a/v1/card", "r/a/v10/card", "r/ab/v1", "z"):
        store.put(key, b"")
    assert store.list("r/a/v1") == ["r/a/v1/card", "r/a/v10/card"]
    assert store.list("r/a") == ["r/a/v1/card", "r/a/v10/card", "r/ab/v1"]
    assert store.list("r/a/") == ["r/a/v1/card", "r/a/v10/card"]
    assert store.list("") == ["r/a/v1/card", "r/a/v10/card", "r/ab/v1", "z"]
    assert store.list("nothing/") == []


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


def increment(root: Path, times: int) -> None:
    store = FileStore(root)
    for _ in range(times):
        while True:
            data, etag = store.get_with_etag("counter")
            if store.compare_and_swap("counter", str(int(data) + 1).encode(), etag):
                break


def test_processes_that_race_to_swap_lose_no_update(store):
    store.put("counter", b"0")
    racers = [SPAWN.Process(target=increment, args=(store.root, 25)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0] * 4
    assert store.get("counter") == b"100"


def claim(root: Path, own: bytes, start: float) -> None:
    time.sleep(max(0.0, start - time.time()))
    sys.exit(0 if FileStore(root).put_if_absent("claim", own * 100_000) else 3)


def test_of_processes_that_race_for_one_key_exactly_one_wins(store):
    start = time.time() + 2
    racers = [SPAWN.Process(target=claim, args=(store.root, str(n).encode(), start)) for n in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    codes = [racer.exitcode for racer in racers]
    assert sorted(codes) == [0, 3, 3, 3]
    assert store.get("claim") == str(codes.index(0)).encode() * 100_000


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
def test_a_write_that_the_disk_refuses_half_way_leaves_nothing(store, tmp_path, action):
    source = tmp_path / "source"
    source.write_bytes(b"x" * 200_000)
    command = [sys.executable, "-c", WRITE_PAST_LIMIT, str(store.root), action, str(source)]
    assert subprocess.run(command, cwd=ROOT).returncode == 7
    assert everything_on_disk(store) == []


def test_a_disk_that_is_full_at_the_sync_keeps_the_old_object(store, monkeypatch):
    store.put("a", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.put("a", b"new")
    assert store.get("a") == b"old"
    assert everything_on_disk(store) == ["a"]


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
def test_a_writer_killed_before_the_end_leaves_nothing_visible_and_a_second_one_succeeds(store, action):
    writer = subprocess.Popen(
        [sys.executable, "-c", STOP_BEFORE_RENAME, str(store.root), action],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert store.list("") == []
    assert not store.exists("shard")
    assert store.put_if_absent("shard", b"whole")
    assert store.get("shard") == b"whole"


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


def test_a_swapper_killed_while_it_holds_the_lock_blocks_nobody(store):
    etag = store.put("pointer", b"old")
    command = [sys.executable, "-c", HOLD_LOCK, str(store.root)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert store.compare_and_swap("pointer", b"new", etag)


def test_a_store_opens_by_uri_or_path_and_refuses_other_schemes(tmp_path):
    folder = tmp_path / "my store"
    open_store(folder.as_uri()).put("a", b"1")
    assert open_store(str(folder)).get("a") == b"1"
    assert open_store(str(folder)).uri == folder.as_uri()
    with pytest.raises(UserError, match="s3:// is not supported"):
        open_store("s3://bucket/x")
