"""Bearer keys of the endpoint: a file of their hashes, a line of JSON each, with what each key may do.

A key is 256 random bits, so its plain SHA-256 tells nobody what it is; the key itself is shown once and kept nowhere.
"""

import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from farm.errors import UserError
from farm.sections import NAME_PATTERN, Positive, Strict

LOOK_S = 1.0  # how often a served file is looked at
log = logging.getLogger("ray.serve")


class Key(Strict):
    """A line of the file: whom the key was given to, what it may ask, its limits (None: the endpoint's own)."""

    name: str = Field(pattern=NAME_PATTERN)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    targets: tuple[Annotated[str, Field(pattern=NAME_PATTERN)], ...] | Literal["*"] = "*"
    max_prompt_tokens: Positive | None = None
    max_new_tokens: Positive | None = None  # of one answer
    max_concurrent: Positive | None = None  # requests at the same time


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file. UserError names the line that is wrong, never what stands in it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: the keys cannot be read ({type(error).__name__}); make one with `farm key new`"
        ) from None
    keys = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                keys.append(Key.model_validate_json(line))
            except ValidationError as error:
                field = ".".join(map(str, error.errors()[0]["loc"])) or "the line"
                raise UserError(
                    f"{path}, line {number}: {field} is not valid; correct or remove it"
                ) from None
    names = [key.name for key in keys]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: {twice[0]!r} is there twice; rename or remove one")
    return tuple(keys)


def find(keys: Sequence[Key], presented: str) -> Key | None:
    """The key that was presented. All are compared, each in constant time: how long it takes says nothing."""
    wanted, found = digest(presented), None
    for key in keys:
        if hmac.compare_digest(key.sha256, wanted):
            found = key
    return found


def add_key(path: Path, name: str, targets: Sequence[str] = (), **limits: int | None) -> str:
    """A new key, its hash appended to the file (which only its owner may read); UserError if the name is taken.

    One write appends a whole line: whoever reads or appends at the same time sees all of it or nothing.
    """
    if path.exists() and name in {key.name for key in read_keys(path)}:
        raise UserError(f"{path}: has a key {name!r} already; choose another name, or remove its line")
    secret = f"farm-{secrets.token_urlsafe(32)}"
    given = {field: value for field, value in limits.items() if value is not None}
    try:
        key = Key.model_validate(
            {"name": name, "sha256": digest(secret), "targets": tuple(targets) or "*", **given}
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(key.model_dump(exclude_none=True)).encode() + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, b"\n" * _ends_within_a_line(handle) + line)
        os.fsync(handle)
    finally:
        os.close(handle)
    return secret


def _ends_within_a_line(handle: int) -> bool:
    """As many editors leave a file; an empty line, which is skipped, does no harm."""
    size = os.fstat(handle).st_size
    return size > 0 and os.pread(handle, 1, size - 1) != b"\n"


class KeyRing:
    """The keys of a file as they are now: a line added or removed counts within a second or so."""

    def __init__(self, path: Path) -> None:
        """UserError when the file cannot be read; later on the keys that were read last stay."""
        self._path = path
        self._stamp = self._look()
        self._keys = read_keys(path)
        self._looked_at = time.monotonic()

    def find(self, presented: str) -> Key | None:
        """The key that was presented, None if there is no such key."""
        if time.monotonic() - self._looked_at >= LOOK_S:
            self._looked_at = time.monotonic()
            self._reread()
        return find(self._keys, presented)

    def _reread(self) -> None:
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._path)
        except UserError as error:
            log.error("the keys stay as they were: %s", error)

    def _look(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size
