"""Objects of a remote store as local files: bounded, shared by the processes of a node.

FARM_CACHE names the folder (default: ~/.cache/farm), FARM_CACHE_GB its size (default 20).
"""

import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from farm.checksum import file_sha256
from farm.errors import UserError

IN_USE_S: Final = 3600.0  # what was asked for within this time may be open somewhere, or about to be
_DEFAULT_GB: Final = "20"


@dataclass(frozen=True)
class CachedObject:
    """Which object a cached file is a copy of."""

    etag: str
    sha256: str


class ObjectCache:
    """Copies of one bucket's objects, under their keys. What is not used for longest goes first.

    A copy appears by rename, under a lock of its own, and is checked against its digest once in each process. The
    bound is that of the whole folder; files in use within the last hour stay even above it.
    """

    def __init__(self, root: Path, name: str, max_bytes: int) -> None:
        self._root, self._max_bytes = root, max_bytes
        self._objects, self._cards = root / "objects" / name, root / "cards" / name
        self._locks, self._scratch = root / "locks", root / "scratch"

    @classmethod
    def of_environment(cls, name: str) -> "ObjectCache":
        """The cache that the environment names; `name` tells its buckets apart."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        text = os.environ.get("FARM_CACHE_GB", _DEFAULT_GB)
        try:
            max_bytes = int(float(text) * 10**9)
        except (ValueError, OverflowError):
            raise UserError(
                f"FARM_CACHE_GB: {text!r} is no number of gigabytes; write for instance 20"
            ) from None
        return cls(Path(os.environ.get("FARM_CACHE") or home / "farm").expanduser(), name, max_bytes)

    def path_of(self, key: str) -> Path:
        """Where a copy of this key is, or would be."""
        return self._objects / key

    def fetch(self, key: str, etag: str, download: Callable[[Path], CachedObject]) -> Path:
        """The copy of object `key` as it is under `etag`; made by `download` where it is missing, old or damaged."""
        path = self.path_of(key)
        while True:
            _touch(path)  # while it is checked, which may take long, nobody makes room by it
            if not self._is_whole(key, etag):
                with self._locked(key):
                    if not self._is_whole(key, etag):
                        self._download(key, path, download)
            if _touch(path):
                return path

    def _trim(self, keep: Path) -> None:
        """Remove the copies that nobody used for longest until the folder is within its bound."""
        files, now = [], time.time()
        for path in (self._root / "objects").rglob("*"):
            with suppress(FileNotFoundError):
                if path.is_file():
                    stat = path.stat()
                    files.append((stat.st_atime, stat.st_size, path))
        total = sum(num_bytes for _, num_bytes, _ in files)
        for used, num_bytes, path in sorted(files):
            if total <= self._max_bytes or now - used < IN_USE_S:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= num_bytes

    def drop_others(self, folder: Path, keep: Collection[Path]) -> None:
        """Leave only these copies in a folder: an object that is gone from the store is gone from its copy."""
        kept = set(keep)
        for path in folder.rglob("*"):
            if path not in kept and path.is_file():
                path.unlink(missing_ok=True)

    def _download(self, key: str, path: Path, download: Callable[[Path], CachedObject]) -> None:
        self._scratch.mkdir(parents=True, exist_ok=True)
        temporary = self._scratch / secrets.token_hex(8)
        try:
            copied = download(temporary)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(path)
            card = self._card(key)
            card.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(asdict(copied)))
            temporary.replace(card)
            self._trim(keep=path)
        finally:
            temporary.unlink(missing_ok=True)

    def _is_whole(self, key: str, etag: str) -> bool:
        try:
            card = CachedObject(**json.loads(self._card(key).read_text()))
            return card.etag == etag and file_sha256(self.path_of(key)) == card.sha256
        except (OSError, ValueError, TypeError):
            return False

    def _card(self, key: str) -> Path:
        return self._cards / f"{key}.json"

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """The exclusive right to write the copy of a key, released by the kernel if the holder dies."""
        self._locks.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(str(self.path_of(key)).encode()).hexdigest()[:32]
        with (self._locks / name).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _touch(path: Path) -> bool:
    """Note the use, where the file is there; the time of change stays, by which a computed digest is known to hold."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    return True
