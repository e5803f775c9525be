"""One object store: atomic put, put-if-absent, compare-and-swap, get, list. A folder here; `s3://` in `farm.s3`."""

import fcntl
import hashlib
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final
from urllib.parse import unquote, urlparse

from farm.checksum import bytes_sha256, file_sha256
from farm.errors import UserError

S3_SCHEME: Final = "s3://"

_CHUNK_BYTES = 2**20
_TEMPORARY = ".tmp-"
_LOCK = ".lock"


class NotFound(KeyError):
    """No object has this key."""


class CorruptObject(UserError):
    """The content of an object is not what was written."""

    def __init__(self, what: str, found: str, expected: str) -> None:
        super().__init__(
            f"{what}: is corrupt: its content has sha256 {found}, it was written with {expected}; "
            "delete it, then run again"
        )
        self._told = what, found, expected

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        """Of what it was made of: it is raised in one process and told in another."""
        return type(self), self._told


@dataclass(frozen=True)
class Entry:
    """What a listing says of one object."""

    key: str
    num_bytes: int
    modified: float  # seconds since the epoch


class ObjectStore(ABC):
    """Keys are relative posix paths without `..`; a reader sees a whole object or none.

    A store that cannot be used raises UserError: StoreUnusable where it may pass (not reached, broken off, no right).
    """

    uri: str

    @abstractmethod
    def put(self, key: str, data: bytes) -> str:
        """Write or replace an object atomically; its etag."""

    @abstractmethod
    def put_file(self, key: str, path: Path) -> str:
        """`put` with the content of a file, read in chunks; its etag."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write an object only if the key is free; whether this call wrote it."""

    @abstractmethod
    def compare_and_swap(self, key: str, data: bytes, expected_etag: str | None) -> bool:
        """Replace an object only if its etag is still `expected_etag` (None: only if absent).

        Holds among callers of this method: a key that is swapped may not also be `put`.
        """

    @abstractmethod
    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        """The content and its etag; NotFound if absent."""

    @abstractmethod
    def exists(self, key: str) -> bool: ...

    @abstractmethod
    def entries(self, prefix: str) -> list[Entry]:
        """The objects whose keys start with `prefix`, sorted by key; an empty prefix means every object."""

    def unfinished(self) -> list[Entry]:
        """What writers have not finished, those that were killed among them: `delete` takes its keys, nothing else."""
        return []

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object, or what is `unfinished`; nothing happens if it is absent."""

    @abstractmethod
    def local_path(self, key: str) -> Path:
        """A local file with the object's content, to be read only; NotFound if absent."""

    @abstractmethod
    def location(self, key: str) -> str:
        """Where any node of a cluster finds an object, or the folder of several: for `local_copy`."""

    @abstractmethod
    def digest(self, key: str) -> tuple[int, str]:
        """Number of bytes and sha256 of an object, as it was written; NotFound if absent."""

    def list(self, prefix: str) -> list[str]:
        """The keys that start with `prefix`, sorted; empty for every key."""
        return [entry.key for entry in self.entries(prefix)]

    def get(self, key: str) -> bytes:
        """The content; NotFound if absent."""
        return self.get_with_etag(key)[0]


class FileStore(ObjectStore):
    """A folder. Objects appear by rename or link of a complete, synced temporary file beside them."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self.uri = self.root.as_uri()

    def put(self, key: str, data: bytes) -> str:
        path = self._path(key)
        with self._complete(path, lambda file: _write(file, data)) as temporary:
            temporary.replace(path)
            _sync_folder(path.parent)
        return _etag(data)

    def put_file(self, key: str, path: Path) -> str:
        digest = hashlib.sha256()

        def copy(file: BinaryIO) -> None:
            with path.open("rb") as source:
                while chunk := source.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)

        goal = self._path(key)
        with self._complete(goal, copy) as temporary:
            temporary.replace(goal)
            _sync_folder(goal.parent)
        return digest.hexdigest()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        if path.exists():
            return False
        with self._complete(path, lambda file: _write(file, data)) as temporary:
            try:
                path.hardlink_to(temporary)
            except FileExistsError:
                return False
            _sync_folder(path.parent)
        return True

    def compare_and_swap(self, key: str, data: bytes, expected_etag: str | None) -> bool:
        if expected_etag is None:
            return self.put_if_absent(key, data)
        with self._locked(key):
            try:
                _, etag = self.get_with_etag(key)
            except NotFound:
                return False
            if etag != expected_etag:
                return False
            self.put(key, data)
        return True

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        try:
            data = self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise NotFound(f"{self.uri}/{key}") from None
        return data, _etag(data)

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def entries(self, prefix: str) -> list[Entry]:
        if prefix:
            self._path(prefix)
        folder = self.root.joinpath(*PurePosixPath(prefix).parts[: None if prefix.endswith("/") else -1])
        found = self._entries(path for path in _files_below(folder) if _is_object(path))
        return [entry for entry in found if entry.key.startswith(prefix)]

    def unfinished(self) -> list[Entry]:
        return self._entries(path for path in _files_below(self.root) if path.name.startswith(_TEMPORARY))

    def delete(self, key: str) -> None:
        name = check_key(key)[-1]
        (self.root / key if name.startswith(_TEMPORARY) else self._path(key)).unlink(missing_ok=True)

    def local_path(self, key: str) -> Path:
        path = self._path(key)
        if not path.is_file():
            raise NotFound(f"{self.uri}/{key}")
        return path

    def location(self, key: str) -> str:
        return str(self._path(key))

    def digest(self, key: str) -> tuple[int, str]:
        path = self.local_path(key)
        return path.stat().st_size, file_sha256(path)

    def _entries(self, paths: Iterable[Path]) -> list[Entry]:
        found = []
        for path in sorted(paths, key=self._key):
            with suppress(FileNotFoundError):  # deleted meanwhile
                stat = path.stat()
                found.append(Entry(self._key(path), stat.st_size, stat.st_mtime))
        return found

    def _key(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _path(self, key: str) -> Path:
        parts = check_key(key)
        if _reserved(parts[-1]):
            raise ValueError(f"store key {key!r} has a name that a folder keeps for itself")
        return self.root.joinpath(*parts)

    @contextmanager
    def _complete(self, path: Path, write: Callable[[BinaryIO], None]) -> Iterator[Path]:
        """A temporary file beside `path` with all its bytes on disk; it is gone when the block ends."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(_TEMPORARY + secrets.token_hex(8))
        try:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """The exclusive right to swap `key`, released by the kernel if the holder dies."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(path.name + _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def open_store(uri: str) -> ObjectStore:
    """The store behind a path, a `file://` or an `s3://` URI.

    UserError for another scheme, and for an S3 store that is not there or may not be used.
    """
    if uri.startswith(S3_SCHEME):
        from farm.s3 import open_s3

        return open_s3(uri)
    parsed = urlparse(uri)
    if parsed.scheme == "file":
        return FileStore(Path(unquote(parsed.path)))
    if "://" not in uri:
        return FileStore(Path(uri))
    raise UserError(f"store: {parsed.scheme}:// is not supported; use a folder, a file:// or an s3:// URI")


def local_copy(source: str) -> Path:
    """A local file or folder, to be read only: a path as it is, what an `s3://` URI names from a bounded cache.

    UserError when the URI names neither an object nor a prefix of objects.
    """
    if not source.startswith(S3_SCHEME):
        return Path(source)
    from farm.s3 import fetch

    return fetch(source)


def check_key(key: str) -> tuple[str, ...]:
    """The parts of a key; ValueError for one that could lead out of its store."""
    parts = PurePosixPath(key).parts
    if not parts or key.startswith("/") or ".." in parts or "\0" in key:
        raise ValueError(f"store key {key!r} must be a relative path without '..'")
    return parts


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)


_etag = bytes_sha256


def _reserved(name: str) -> bool:
    return name.startswith(_TEMPORARY) or name.endswith(_LOCK)


def _files_below(folder: Path) -> Iterator[Path]:
    """All of them; unlike `Path.rglob`, it does not mind that others delete folders meanwhile."""
    return (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)


def _is_object(path: Path) -> bool:
    return path.is_file() and not _reserved(path.name)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
