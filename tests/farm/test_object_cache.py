"""The cache of remote objects: bounded, and whole whoever downloads at the same time. Needs no server."""

import os
import threading
import time
from pathlib import Path

import pytest

from farm import object_cache
from farm.checksum import bytes_sha256, file_sha256
from farm.errors import UserError
from farm.object_cache import CachedObject, ObjectCache

HOURS = 3600.0


class Source:
    """Objects of 100 bytes; counts its downloads."""

    def __init__(self, cache: ObjectCache, seconds: float = 0.0) -> None:
        self._cache, self._seconds, self.downloads = cache, seconds, list[str]()

    def fetch(self, key: str, version: int = 1) -> Path:
        data = (f"{key} {version} " * 100)[:100].encode()

        def download(to: Path) -> CachedObject:
            self.downloads.append(key)
            to.write_bytes(data[:50])
            time.sleep(self._seconds)
            to.write_bytes(data)
            return CachedObject(etag=f"{key} {version}", sha256=bytes_sha256(data))

        path = self._cache.fetch(key, f"{key} {version}", download)
        assert path.read_bytes() == data
        return path


def age(path: Path, seconds: float) -> None:
    """As if its last use were so long ago."""
    stat = path.stat()
    os.utime(path, (time.time() - seconds, stat.st_mtime))


def test_two_that_want_one_object_download_it_once_and_both_see_it_whole(tmp_path):
    sources = [Source(ObjectCache(tmp_path, "bucket", 10**6), seconds=0.2) for _ in range(2)]
    threads = [threading.Thread(target=source.fetch, args=("model/weights",)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [key for source in sources for key in source.downloads] == ["model/weights"]


def test_a_download_that_fails_leaves_nothing_and_the_next_one_succeeds(tmp_path):
    cache = ObjectCache(tmp_path, "bucket", 10**6)

    def broken(to: Path) -> CachedObject:
        to.write_bytes(b"half")
        raise OSError("the server is gone")

    with pytest.raises(OSError, match="server is gone"):
        cache.fetch("a", "a 1", broken)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size] == []
    Source(cache).fetch("a")


def test_a_new_version_replaces_the_copy_while_an_open_one_stays_readable(tmp_path):
    source = Source(ObjectCache(tmp_path, "bucket", 10**6))
    with source.fetch("a").open("rb") as old:
        source.fetch("a", version=2)
        assert old.read().startswith(b"a 1 ")


def test_the_least_recently_used_copies_go_first_and_those_in_use_stay(tmp_path):
    source = Source(ObjectCache(tmp_path, "bucket", 250))
    paths = [source.fetch(key) for key in ("a", "b")]
    age(paths[0], 3 * HOURS)
    age(paths[1], 5 * HOURS)
    source.fetch("c")  # 300 bytes: one has to go
    assert [path.exists() for path in paths] == [True, False]
    source.fetch("d")
    assert not paths[0].exists()
    for key in ("e", "f"):
        source.fetch(key)
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["c", "d", "e", "f"]  # all in use


def test_a_copy_that_is_being_checked_is_not_taken_away_by_a_process_that_makes_room(tmp_path, monkeypatch):
    """A large file takes a while to be hashed; it was last used long ago, and is about to be used."""
    source, other = (Source(ObjectCache(tmp_path, "bucket", 150)) for _ in range(2))
    old = source.fetch("a")
    known = file_sha256(old)
    age(old, 2 * HOURS)

    def slow(path: Path) -> str:
        if path != old:
            return file_sha256(path)
        if not other.downloads:
            other.fetch("b")
        return known  # without reading it: most file systems note only the first look after a change

    monkeypatch.setattr(object_cache, "file_sha256", slow)
    assert source.fetch("a") == old
    assert (source.downloads, other.downloads) == (["a"], ["b"])


def test_the_bound_holds_for_all_buckets_together(tmp_path):
    first, second = (Source(ObjectCache(tmp_path, name, 150)) for name in ("one", "two"))
    old = first.fetch("a")
    age(old, 2 * HOURS)
    second.fetch("b")
    assert not old.exists()


@pytest.mark.parametrize("size", ["20GB", "inf", "nan", ""])
def test_a_size_that_is_no_number_is_the_users_mistake(monkeypatch, size):
    monkeypatch.setenv("FARM_CACHE_GB", size)
    with pytest.raises(UserError, match="FARM_CACHE_GB"):
        ObjectCache.of_environment("bucket")
