"""Content-addressed outputs of the stages: a folder a key, complete once its manifest.json is there."""

import hashlib
import json
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from farm.checksum import file_sha256
from farm.errors import UserError
from farm.store import S3_SCHEME, CorruptObject, NotFound, ObjectStore

_MANIFEST = "manifest.json"
TRUNK: Final = "trunk"  # the one stage whose output other parts than the fleet look for


@dataclass(frozen=True)
class Artifact:
    stage: str
    key: str
    # What the stage wrote, plus "files": {name: {"bytes", "sha256"}}, and "folder" where they lie in one of their own.
    manifest: dict[str, Any]

    @property
    def place(self) -> str:
        """Where its files are: below this prefix of the store's keys."""
        return _place(self.stage, self.key, self.manifest.get("folder"))


def key_of(stage: str, config: Mapping[str, Any] | BaseModel, inputs: Sequence[str]) -> str:
    """16 hex digits that name the output of `stage`, run with `config` on artifacts or digests `inputs`."""
    tree = config.model_dump(mode="json") if isinstance(config, BaseModel) else dict(config)
    canonical = json.dumps(
        [stage, tree, list(inputs)], sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class Artifacts:
    """The artifacts of a store, under `artifacts/<stage>/<key>/`.

    Several runs may make the same one at once, and end in different bytes. What one process makes, it writes whole;
    what many processes make piece by piece has pieces of names of their own, of which the manifest lists some.
    """

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def find(self, stage: str, key: str) -> Artifact | None:
        """The finished artifact, or None: unfinished ones do not exist."""
        if not self._is_finished(stage, key):
            return None
        return Artifact(stage, key, json.loads(self.store.get(_name(stage, key, _MANIFEST))))

    def put_file(self, stage: str, key: str, name: str, data: bytes) -> None:
        """Write one file of an artifact, atomically. A finished artifact keeps the files that its manifest lists."""
        if not self._is_finished(stage, key):
            self.store.put(_name(stage, key, name), data)

    def put_once(self, stage: str, key: str, name: str, data: bytes) -> bool:
        """`put_file` unless there is such a file already; whether this call wrote it."""
        return not self._is_finished(stage, key) and self.store.put_if_absent(_name(stage, key, name), data)

    def write(
        self, stage: str, key: str, files: Mapping[str, bytes | Path], manifest: Mapping[str, Any]
    ) -> Artifact:
        """Make the artifact exist with these files, given as bytes or read in chunks; who is second gets the first's.

        Files lie in a folder of their own, so that nobody who writes the same artifact mixes others with them.
        """
        if found := self.find(stage, key):
            return found
        folder = secrets.token_hex(4)
        place = _place(stage, key, folder)
        for name, content in files.items():
            if isinstance(content, Path):
                self.store.put_file(f"{place}/{name}", content)
            else:
                self.store.put(f"{place}/{name}", content)
        finished = self._finish(stage, key, {**manifest, "folder": folder}, place, files)
        if finished.place != place:
            for name in files:
                self.store.delete(f"{place}/{name}")
        return finished

    def path(self, artifact: Artifact, name: str) -> Path:
        """A local, read-only copy of one of the artifact's files; UserError if it is not what was written."""
        path = self._uncut(artifact, name)
        expected, found = artifact.manifest["files"][name]["sha256"], file_sha256(path)
        if found != expected:
            raise CorruptObject(str(path), found, expected)
        return path

    def folder(self, artifact: Artifact) -> Path:
        """A local folder with all of the artifact's files, each checked as by `path`."""
        paths = [self.path(artifact, name) for name in artifact.manifest["files"]]
        return paths[0].parent

    def location(self, artifact: Artifact, name: str) -> str:
        """Where any node finds one of the artifact's files: for `farm.store.local_copy`.

        UserError if a file in a folder is gone or was cut; an object of S3 is checked where it is read.
        """
        where = self.store.location(f"{artifact.place}/{name}")
        if not where.startswith(S3_SCHEME):
            self._uncut(artifact, name)
        return where

    def folder_location(self, artifact: Artifact) -> str:
        """Where any node finds the folder of the artifact's files: for `farm.store.local_copy`."""
        for name in artifact.manifest["files"]:
            self.location(artifact, name)
        return self.store.location(artifact.place)

    def _is_finished(self, stage: str, key: str) -> bool:
        return self.store.exists(_name(stage, key, _MANIFEST))

    def _uncut(self, artifact: Artifact, name: str) -> Path:
        key = f"{artifact.place}/{name}"
        try:
            path = self.store.local_path(key)
        except NotFound as error:
            where = self.store.location(_place(artifact.stage, artifact.key))
            raise UserError(
                f"{self.store.uri}/{key}: is gone; delete what is left in {where}, then run again"
            ) from error
        expected, found = artifact.manifest["files"][name]["bytes"], path.stat().st_size
        if found != expected:
            raise UserError(
                f"{path}: has {found} bytes, was written with {expected}; "
                f"delete {self.store.location(_place(artifact.stage, artifact.key))}, then run again"
            )
        return path

    def files(self, stage: str, key: str) -> list[str]:
        """Names of the files that are complete so far, sorted; the manifest is not one of them."""
        prefix = _name(stage, key, "")
        names = (name.removeprefix(prefix) for name in self.store.list(prefix))
        return [name for name in names if name != _MANIFEST]

    def finish(
        self, stage: str, key: str, manifest: Mapping[str, Any], names: Collection[str] | None = None
    ) -> Artifact:
        """Make the artifact exist with the files that were put, or with `names` of them; UserError where one is gone.

        Who finishes second gets the first one's.
        """
        present = self.files(stage, key)
        gone = sorted(set(names or ()) - set(present))
        if gone and not self._is_finished(stage, key):
            place = self.store.location(_place(stage, key))
            raise UserError(f"{place}/{gone[0]}: is gone; delete what is left in {place}, then run again")
        kept = present if names is None else [name for name in present if name in names]
        return self._finish(stage, key, manifest, _place(stage, key), kept)

    def _finish(
        self, stage: str, key: str, manifest: Mapping[str, Any], place: str, names: Iterable[str]
    ) -> Artifact:
        files = {}
        for name in names:
            num_bytes, sha256 = self.store.digest(f"{place}/{name}")
            files[name] = {"bytes": num_bytes, "sha256": sha256}
        whole = {**manifest, "files": files}
        data = json.dumps(whole, indent=1, sort_keys=True).encode()
        self.store.put_if_absent(_name(stage, key, _MANIFEST), data)
        finished = self.find(stage, key)
        assert finished is not None
        return finished


def _place(stage: str, key: str, folder: str | None = None) -> str:
    return f"artifacts/{stage}/{key}/{folder}" if folder else f"artifacts/{stage}/{key}"


def _name(stage: str, key: str, name: str) -> str:
    return f"{_place(stage, key)}/{name}"
