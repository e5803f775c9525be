"""sha256 of bytes and files: what a stored object is checked against."""

import functools
import hashlib
from pathlib import Path


def bytes_sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Of the file's content; read again only when its inode, size or time of change differ from the last look."""
    stat = path.stat()
    return _file_sha256(str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _file_sha256(path: str, _inode: int, _num_bytes: int, _mtime_ns: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
