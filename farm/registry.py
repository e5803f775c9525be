"""Published adapters: immutable versions of each target; which is live, and which is tried, by compare-and-swap."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from farm.checksum import bytes_sha256, file_sha256
from farm.errors import UserError
from farm.store import CorruptObject, NotFound, ObjectStore

_CARD = "card.json"
_VERSION = re.compile("v[1-9][0-9]*")
_FAMILY = "registry/family.json"


@dataclass(frozen=True)
class Version:
    target: str
    version: str  # "v1", "v2", ...
    card: dict[str, Any]


@dataclass(frozen=True)
class Canary:
    """A version that is tried on a share of a target's requests, beside the live one."""

    version: str
    share: float  # of the requests, between 0 and 1


@dataclass(frozen=True)
class RolledBack:
    """A canary that a replica has ended, or a live version that somebody took back."""

    version: str
    reason: str
    adapt_key: str | None = None  # of its card: the same adapter may be published again under another number


@dataclass(frozen=True)
class Pointer:
    """What serves a target: `registry/<target>/live.json`. `etag` None: nothing was ever live or tried."""

    history: tuple[str, ...] = ()  # versions that were live, the live one last; empty: the base draft serves
    canary: Canary | None = None
    # Every version that was rolled back and that nobody has promoted or tried since, the last one last.
    withdrawn: tuple[RolledBack, ...] = ()
    # Given up, to be deleted; they stay here for ever, so that the pointer never looks as it did before.
    retired: tuple[str, ...] = ()
    etag: str | None = None

    @property
    def live(self) -> str | None:
        return self.history[-1] if self.history else None

    @property
    def rolled_back(self) -> RolledBack | None:
        """The last of `withdrawn`."""
        return self.withdrawn[-1] if self.withdrawn else None

    def without(self, version: Version) -> tuple[RolledBack, ...]:
        """`withdrawn` once somebody has decided otherwise of this version."""
        adapter = version.card.get("adapt_key")

        def is_same(one: RolledBack) -> bool:
            return one.version == version.version or (adapter is not None and one.adapt_key == adapter)

        return tuple(one for one in self.withdrawn if not is_same(one))


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
        """The published versions, oldest first; without those that were never finished (no card) or are retired."""
        retired = self.pointer(target).retired
        names = (f"v{number}" for number in sorted(self._taken(target)))
        found = (self._find(target, name) for name in names if name not in retired)
        return [version for version in found if version is not None]

    def live(self, target: str) -> Version | None:
        """The version that serves now; None: the base draft does."""
        live = self.pointer(target).live
        return None if live is None else self._find(target, live)

    def canary(self, target: str) -> Canary | None:
        """The version that is tried beside the live one."""
        return self.pointer(target).canary

    def pointer(self, target: str) -> Pointer:
        """Live version and canary as of one moment."""
        try:
            data, etag = self.store.get_with_etag(f"{_folder(target)}/live.json")
        except NotFound:
            return Pointer()
        record = json.loads(data)
        # Records of before there were canaries, retired versions or reasons have none.
        canary, last = record.get("canary"), record.get("rolled_back")
        # Older ones know the last that was rolled back alone.
        withdrawn = record.get("withdrawn", [last] if last else [])
        return Pointer(
            tuple(record["history"]),
            canary and Canary(**canary),
            tuple(RolledBack(**one) for one in withdrawn),
            tuple(record.get("retired", ())),
            etag,
        )

    def version(self, target: str, version: str) -> Version:
        """A published version; UserError if it was never published, or is retired."""
        return self._of(target, version, self.pointer(target))

    def promote(self, target: str, version: str, expected: str | None) -> bool:
        """Make `version` live if the live one is still `expected`; whether it did. Ends its being the canary.

        One that is live already stays so, and the one before it what is rolled back to. UserError if the version was
        never published, or is retired.
        """
        pointer = self.pointer(target)
        found = self._of(target, version, pointer)
        if pointer.live != expected:
            return False
        if pointer.live == version:
            return True
        withdrawn = pointer.without(found)
        return self._move(target, replace(pointer, history=(*pointer.history, version), withdrawn=withdrawn))

    def start_canary(self, target: str, version: str, share: float) -> bool:
        """Try `version` on a share of the requests, or change its share; whether it did.

        It does not while another version is tried, or when the pointer moved meanwhile. UserError for a version that
        was never published, is retired or live, and for a share that is not between 0 and 1.
        """
        if not 0 < share < 1:
            raise UserError(f"registry: a canary's share is between 0 and 1, not {share:g}; promote for all")
        pointer = self.pointer(target)
        found = self._of(target, version, pointer)
        if pointer.live == version:
            raise UserError(f"registry: {target}@{version} is live already; try another version")
        if pointer.canary is not None and pointer.canary.version != version:
            return False
        withdrawn = pointer.without(found)
        return self._move(target, replace(pointer, canary=Canary(version, share), withdrawn=withdrawn))

    def end_canary(self, target: str, version: str, reason: str | None = None) -> bool:
        """End the canary if it is still `version`; whether this call did. Repeating it changes nothing.

        `reason` is why it is rolled back, and is kept; None: somebody wants it no more.
        """
        while True:
            pointer = self.pointer(target)
            if pointer.canary is None or pointer.canary.version != version:
                return False
            ended = () if reason is None else (self._rolled_back(target, version, reason),)
            if self._move(target, replace(pointer, canary=None, withdrawn=(*pointer.withdrawn, *ended))):
                return True

    def rollback(self, target: str) -> Version:
        """Make the version live that was live before; UserError if there is none.

        What was live is marked as rolled back, so that no onboarding promotes it by itself.
        """
        pointer = self.pointer(target)
        before = pointer.history[-2] if len(pointer.history) > 1 else None
        previous = None if before is None or before in pointer.retired else self._find(target, before)
        if previous is None:
            raise UserError(
                f"registry: {target} has no earlier live version to return to; promote one instead"
            )
        ended = self._rolled_back(target, pointer.history[-1], "by hand")
        withdrawn = (*pointer.without(previous), ended)
        if not self._move(target, replace(pointer, history=pointer.history[:-1], withdrawn=withdrawn)):
            raise UserError(
                f"registry: the live version of {target} moved meanwhile; look again, then repeat"
            )
        return previous

    def needed(self, target: str, pointer: Pointer) -> set[str]:
        """Versions that a pointer needs: live, the one before, the canary, and what the live one was compared with."""
        needed = {*pointer.history[-2:]}
        if pointer.canary is not None:
            needed.add(pointer.canary.version)
        live = None if pointer.live is None else self._find(target, pointer.live)
        opponent = None if live is None else live.card.get("opponent")
        return needed if opponent is None else needed | {opponent}

    def retire(self, target: str, version: str) -> bool:
        """Give a version up for ever, unless it is needed; whether it may be deleted.

        The pointer itself says so: who read it before, to make the version live or a canary, cannot write it any more.
        """
        while True:
            pointer = self.pointer(target)
            if version in self.needed(target, pointer):
                return False
            if version in pointer.retired:
                return True
            if self._move(target, replace(pointer, retired=(*pointer.retired, version))):
                return True

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

    def trunk_key(self) -> str | None:
        """Of the trunk that the family was adapted on; None before anything was onboarded into this store."""
        try:
            key: str | None = json.loads(self.store.get(_FAMILY)).get("trunk_key")
        except NotFound:
            return None
        return key

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

    def _of(self, target: str, version: str, pointer: Pointer) -> Version:
        """A version as it is where the pointer is this one; read after it, so that a swap of this pointer proves it."""
        found = None if version in pointer.retired else self._find(target, version)
        if found is None:
            raise UserError(
                f"registry: {target} has no version {version}; publish it, or choose another"
            ) from NotFound(f"{target}@{version}")
        return found

    def _rolled_back(self, target: str, version: str, reason: str) -> RolledBack:
        found = self._find(target, version)
        return RolledBack(version, reason, None if found is None else found.card.get("adapt_key"))

    def _find(self, target: str, version: str) -> Version | None:
        # A folder finds "v3/" and "./v3" too, which would be another version everywhere else.
        if not _VERSION.fullmatch(version):
            return None
        try:
            return Version(
                target, version, json.loads(self.store.get(f"{_folder(target)}/{version}/{_CARD}"))
            )
        except NotFound:
            return None

    def _move(self, target: str, to: Pointer) -> bool:
        """Write the pointer if it is still the one whose etag `to` has; what is live is not tried any more."""
        tried = None if to.canary is None or to.canary.version == to.live else asdict(to.canary)
        last = to.rolled_back and {"version": to.rolled_back.version, "reason": to.rolled_back.reason}
        record = {
            "version": to.live, "history": to.history, "canary": tried, "retired": to.retired,
            "withdrawn": [asdict(one) for one in to.withdrawn],
            "rolled_back": last,  # all that an older farm can read of them
        }  # fmt: skip
        return self.store.compare_and_swap(
            f"{_folder(target)}/live.json", json.dumps(record).encode(), to.etag
        )


def _folder(target: str) -> str:
    if not target or "/" in target or ".." in target:
        raise UserError(f"registry: {target!r} is no target name; use letters, digits, '.', '_' and '-'")
    return f"registry/{target}"
