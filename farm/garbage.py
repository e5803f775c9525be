"""What of a store nobody refers to any more: old versions, stage outputs and training checkpoints."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from farm.registry import Registry
from farm.status import unfinished_runs
from farm.store import Entry, NotFound, ObjectStore

GRACE_S: Final = 7 * 86400.0
UNDER_WAY_S: Final = 86400.0  # a run that was heard of since may be at work, however short the grace time is
CARD, MANIFEST, CLAIM = "card.json", "manifest.json", "claim"
SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of a run's checkpoints


@dataclass(frozen=True)
class Garbage:
    """Objects that belong together and go together."""

    what: str  # "version math@v3", "answers 0123456789abcdef", "checkpoints of adapt-math-..."
    keys: tuple[str, ...]  # in the order of deletion: first the one that makes the others exist
    num_bytes: int
    age_s: float  # of the youngest object
    version: tuple[str, str] | None = None  # target and name, where they are what was published as that


@dataclass(frozen=True)
class _Group:
    """The objects below one folder of the store."""

    folder: str
    entries: tuple[Entry, ...]

    @property
    def names(self) -> set[str]:
        return {entry.key.removeprefix(f"{self.folder}/") for entry in self.entries}

    def age_s(self, now: float) -> float:
        return now - max(entry.modified for entry in self.entries)

    def garbage(self, what: str, first: str, now: float) -> Garbage:
        # Lists and cards before what they name: what is half deleted must not pass for whole.
        def rank(entry: Entry) -> tuple[bool, bool]:
            return entry.key != f"{self.folder}/{first}", not entry.key.endswith(".json")

        ordered = sorted(self.entries, key=rank)
        keys = tuple(entry.key for entry in ordered)
        return Garbage(what, keys, sum(entry.num_bytes for entry in self.entries), self.age_s(now))


def find_garbage(store: ObjectStore, grace_s: float, now: float) -> list[Garbage]:
    """What can go: not live, not the version to roll back to, not a canary, not named by what stays, and old enough.

    A version's claim stays for ever, so that its number is never given again. Figures without files (checks, probes,
    evaluations) stay: they are small, and a rerun would have to measure them again. While a run is under way, which is
    one with an undecided target that was heard of within the grace time or UNDER_WAY_S, all outputs and checkpoints
    stay: what it reads may be old, and nothing names it yet. What a writer has not finished may be finished yet for
    UNDER_WAY_S, however short the grace time is.
    """
    versions = {(group.folder.split("/")[1], group.folder.split("/")[2]): group for group in _versions(store)}
    targets = {target for target, _ in versions}
    registry = Registry(store)
    kept = {(name, version) for name in targets for version in registry.needed(name, registry.pointer(name))}
    kept |= {key for key, group in versions.items() if group.age_s(now) < grace_s}
    found = [
        replace(group.garbage(f"version {target}@{version}", CARD, now), version=(target, version))
        for (target, version), group in sorted(versions.items())
        if (target, version) not in kept
    ]
    found = [_without_claim(garbage) for garbage in found]
    found = [garbage for garbage in found if garbage.keys]
    found += _unfinished(store, max(grace_s, UNDER_WAY_S), now)
    if unfinished_runs(store, now - max(grace_s, UNDER_WAY_S)):
        return found
    named = _named_by(store, (f"registry/{target}/{version}/{CARD}" for target, version in kept))
    named |= _named_by(store, ["registry/family.json"])
    return [*found, *_outputs(store, named, grace_s, now), *_checkpoints(store, grace_s, now)]


def _unfinished(store: ObjectStore, grace_s: float, now: float) -> Iterator[Garbage]:
    for entry in store.unfinished():
        if now - entry.modified >= grace_s:
            folder = entry.key.rpartition("/")[0]
            yield Garbage(f"unfinished file in {folder}", (entry.key,), entry.num_bytes, now - entry.modified)


def delete_garbage(store: ObjectStore, garbage: Garbage) -> bool:
    """Delete it, unless it is a version that is needed by now; whether it is gone."""
    if garbage.version is not None and not Registry(store).retire(*garbage.version):
        return False
    for key in garbage.keys:
        store.delete(key)
    return True


def _versions(store: ObjectStore) -> list[_Group]:
    entries = [entry for entry in store.entries("registry/") if entry.key.count("/") == 3]
    return _grouped(entries, 3)


def _outputs(store: ObjectStore, named: set[str], grace_s: float, now: float) -> list[Garbage]:
    groups = _grouped(store.entries("artifacts/"), 3)
    young = {group.folder.split("/")[2] for group in groups if group.age_s(now) < grace_s}
    kept, waiting = set[str](), named | young
    while waiting:
        key = waiting.pop()
        kept.add(key)
        manifests = [f"{group.folder}/{MANIFEST}" for group in groups if group.folder.endswith(f"/{key}")]
        waiting |= _named_by(store, manifests) - kept
    gone = [
        group.garbage(" ".join(group.folder.split("/")[1:]), MANIFEST, now)
        for group in groups
        if group.folder.split("/")[2] not in kept and group.names != {MANIFEST}
    ]
    finished = (group for group in groups if group.folder.split("/")[2] in kept and MANIFEST in group.names)
    return [*gone, *_strays(store, finished, grace_s, now)]


def _strays(store: ObjectStore, groups: Iterable[_Group], grace_s: float, now: float) -> Iterator[Garbage]:
    """Files beside those that an output's manifest lists: of a run that wrote the same one, and was killed."""
    for group in groups:
        manifest = _read(store, f"{group.folder}/{MANIFEST}")
        place = f"{group.folder}/{manifest['folder']}" if "folder" in manifest else group.folder
        listed = {f"{group.folder}/{MANIFEST}", *(f"{place}/{name}" for name in manifest.get("files", ()))}
        old = (entry for entry in group.entries if now - entry.modified >= grace_s)
        strays = _Group(group.folder, tuple(entry for entry in old if entry.key not in listed))
        if manifest and strays.entries:
            yield strays.garbage(f"strays of {' '.join(group.folder.split('/')[1:])}", "", now)


def _checkpoints(store: ObjectStore, grace_s: float, now: float) -> list[Garbage]:
    groups = _grouped(store.entries("train/"), 2)
    return [
        group.garbage(f"checkpoints of {group.folder.removeprefix('train/')}", SNAPSHOT, now)
        for group in groups
        if group.age_s(now) >= grace_s
    ]


def _without_claim(garbage: Garbage) -> Garbage:
    keys = tuple(key for key in garbage.keys if not key.endswith(f"/{CLAIM}"))
    return replace(garbage, keys=keys)


def _grouped(entries: Iterable[Entry], depth: int) -> list[_Group]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        parts = entry.key.split("/")
        if len(parts) > depth:
            groups.setdefault("/".join(parts[:depth]), []).append(entry)
    return [_Group(folder, tuple(found)) for folder, found in sorted(groups.items())]


def _named_by(store: ObjectStore, keys: Iterable[str]) -> set[str]:
    """Values of all fields of JSON objects whose names end with `_key`: that is how one output names another."""
    return {value for key in keys for value in _key_fields(_read(store, key))}


def _key_fields(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name.endswith("_key") and isinstance(value, str):
                yield value
            yield from _key_fields(value)


def _read(store: ObjectStore, key: str) -> dict[str, Any]:
    """A JSON object; empty if it is absent."""
    try:
        found = json.loads(store.get(key))
    except NotFound:
        return {}
    return found if isinstance(found, dict) else {}
