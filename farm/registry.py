"""Published adapters: immutable versions of each target, and a live pointer moved by compare-and-swap."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farm.checksum import bytes_sha256, file_sha256
from farm.errors import UserError
from farm.store import CorruptObject, NotFound, ObjectStore

_CARD = "card.json"
_FAMILY = "registry/family.json"


@dataclass(frozen=True)
class Version:
    target: str
    version: str  # "v1", "v2", ...
    card: dict[str, Any]


class Registry:
    """The registry of a store, under `registry/<target>/<version>/`; the card is written last."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def publish(self, target: str, files: Mapping[str, bytes], card: Mapping[str, Any]) -> Version:
        """Store the files and the card as the next version; publishers that race get different versions."""
        number = 1 + max(self._taken(target), default=0)
        while not self.store.put_if_absent(f"{_folder(target)}/v{number}/claim", b""):
            number += 1
        version = f"v{number}"
        for name, data in files.items():
            self.store.put(f"{_folder(target)}/{version}/{name}", data)
        digests = {name: bytes_sha256(data) for name, data in files.items()}
        whole = {**card, "target": target, "version": version, "files": digests}
        self.store.put(
            f"{_folder(target)}/{version}/{_CARD}", json.dumps(whole, indent=1, sort_keys=True).encode()
        )
        return Version(target, version, whole)

    def versions(self, target: str) -> list[Version]:
        """The published versions, oldest first; one without a card was never finished and is not there."""
        found = (self._find(target, f"v{number}") for number in sorted(self._taken(target)))
        return [version for version in found if version is not None]

    def live(self, target: str) -> Version | None:
        """The version that serves now; None: the base draft does."""
        history, _ = self._pointer(target)
        return self._find(target, history[-1]) if history else None

    def promote(self, target: str, version: str, expected: str | None) -> bool:
        """Make `version` live if the live one is still `expected`; whether it did.

        UserError if the version was never published.
        """
        if self._find(target, version) is None:
            raise UserError(f"registry: {target} has no version {version}; publish it, or choose another")
        history, etag = self._pointer(target)
        if (history[-1] if history else None) != expected:
            return False
        return self._move(target, [*history, version], etag)

    def rollback(self, target: str) -> Version:
        """Make the version live that was live before; UserError if there is none."""
        history, etag = self._pointer(target)
        previous = self._find(target, history[-2]) if len(history) > 1 else None
        if previous is None:
            raise UserError(
                f"registry: {target} has no earlier live version to return to; promote one instead"
            )
        if not self._move(target, history[:-1], etag):
            raise UserError(
                f"registry: the live version of {target} moved meanwhile; look again, then repeat"
            )
        return previous

    def path(self, version: Version, name: str) -> Path:
        """A local, read-only copy of one of the version's files; CorruptObject if it is not what was published."""
        path = self.store.local_path(f"{_folder(version.target)}/{version.version}/{name}")
        expected = version.card.get("files", {}).get(name)  # cards of older versions list none
        if expected is not None and file_sha256(path) != expected:
            raise CorruptObject(str(path), file_sha256(path), expected)
        return path

    def location(self, version: Version, name: str) -> str:
        """Where any node finds one of the version's files: for `farm.store.local_copy`."""
        return self.store.location(f"{_folder(version.target)}/{version.version}/{name}")

    def put_family(self, family: Mapping[str, Any]) -> None:
        """Record what serving needs: {base, trunk_key, draft, targets: {name: {model, lora, ...}}}."""
        self.store.put(_FAMILY, json.dumps(family, indent=1, sort_keys=True).encode())

    def family(self) -> dict[str, Any]:
        """The family's record; UserError if nothing was onboarded into this store."""
        try:
            record: dict[str, Any] = json.loads(self.store.get(_FAMILY))
        except NotFound:
            raise UserError(
                f"{self.store.uri}: holds no family; run `farm onboard` with this store first"
            ) from None
        return record

    def _taken(self, target: str) -> set[int]:
        prefix = f"{_folder(target)}/v"
        numbers = (key.removeprefix(prefix).partition("/") for key in self.store.list(prefix))
        return {int(number) for number, slash, _ in numbers if slash and number.isdigit()}

    def _find(self, target: str, version: str) -> Version | None:
        try:
            return Version(
                target, version, json.loads(self.store.get(f"{_folder(target)}/{version}/{_CARD}"))
            )
        except NotFound:
            return None

    def _pointer(self, target: str) -> tuple[list[str], str | None]:
        """Versions that were live, the live one last, and the etag of that record."""
        try:
            data, etag = self.store.get_with_etag(f"{_folder(target)}/live.json")
        except NotFound:
            return [], None
        return json.loads(data)["history"], etag

    def _move(self, target: str, history: list[str], etag: str | None) -> bool:
        data = json.dumps({"version": history[-1], "history": history}).encode()
        return self.store.compare_and_swap(f"{_folder(target)}/live.json", data, etag)


def _folder(target: str) -> str:
    if not target or "/" in target or ".." in target:
        raise UserError(f"registry: {target!r} is no target name; use letters, digits, '.', '_' and '-'")
    return f"registry/{target}"
