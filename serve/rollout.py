"""Follows the registry: a replica's targets get their live version and their canary, between two steps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from farm.decode.engine import Route
from farm.errors import Denied, StoreUnusable, UserError, is_unusable
from farm.registry import Canary, Pointer, RolledBack
from farm.store import NotFound
from farm.target.load import LoadedTarget
from serve.canary import WorseTest
from serve.family import Family, ServedDraft
from serve.lanes import Lane
from serve.loop import EngineLoop

POLL_S = 2.0  # how often the registry is looked at
VERDICT_WAIT_S = 60.0  # for the engines to come to the end of a step
log = logging.getLogger("ray.serve")


class StoreAway(Exception):
    """The store does not say what it said before."""


@dataclass
class Followed:
    """What was last acted upon for a target."""

    target: LoadedTarget
    has_pointer: bool = False  # once there, a pointer never goes
    live: str | None = None
    hosted: str = ""  # the version that takes the requests, which may be another one
    canary: Canary | None = None
    is_settled: bool = False  # `live` is hosted, or can never be
    reason: str = ""
    rolled_back: RolledBack | None = None  # a canary that is still to be ended in the store
    drafts: dict[str | None, ServedDraft] = field(default_factory=dict)  # of live and canary


class Rollout:
    """Polls in a thread of its own, so that neither requests nor steps wait for a store.

    Nothing that goes wrong with the store or with one version changes what is served; it is logged once.
    """

    def __init__(
        self,
        family: Family,
        engines: EngineLoop,
        new_test: Callable[[float], WorseTest],
        took_over: Callable[[str, ServedDraft], None] = lambda _target, _draft: None,
        rolled_back: Callable[[str, str], None] = lambda _target, _why: None,
    ) -> None:
        """`took_over` is told of each version that takes a target's requests, `rolled_back` of each canary ended here.

        The latter's reason is "worse" or "unreadable".
        """
        self._family, self._engines, self._new_test = family, engines, new_test
        self._took_over, self._rolled_back = took_over, rolled_back
        self._followed: dict[str, Followed] = {}
        self._complaints: dict[str, str] = {}  # by what it is about, until it is over
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rollout", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def reason(self, target: str) -> str:
        """Why the target's current version is not the live adapter, see `Hosted`."""
        return self._followed[target].reason

    def add(self, target: LoadedTarget) -> None:
        """Host a target with its live adapter or the base's draft; plainly if that cannot be loaded."""
        followed = self._followed[target.name] = Followed(target)
        try:
            pointer = self._pointer(followed)
            if not self._went_live(followed, pointer.live, or_base=True):
                self._host(followed, ServedDraft.plain(followed.reason.removeprefix("kept: ")))
        except Exception as error:  # noqa: BLE001 - whatever a store raises; it is tried again
            log.error("%s is decoded plainly for now: %s", target.name, error)
            self._host(followed, ServedDraft.plain(str(error)))

    def poll(self) -> None:
        """One look at every pointer and at every canary's test."""
        gone: dict[str, Exception] = {}  # by target: what the store says at once of its pointer alone
        try:
            for name, followed in self._followed.items():
                # The first that cannot be asked ends the round: each may take its time.
                try:
                    self._follow(followed)
                except (StoreAway, Denied) as error:
                    gone[name] = error
        except Exception as error:  # noqa: BLE001 - whatever a store raises when it is away
            self._complain("the store", f"cannot be read, what is served stays: {error!r}")
        else:
            self._tell(gone)
        self._judge()

    def _tell(self, gone: Mapping[str, Exception]) -> None:
        """Of pointers that are not to be had: where it is all of them, it is the store."""
        if gone and len(gone) == len(self._followed):
            first = next(iter(gone.values()))
            self._complain("the store", f"cannot be read, what is served stays: {first!r}")
            return
        self._is_over("the store")
        for name, error in gone.items():
            self._complain(name, f"its pointer cannot be read, what is served stays: {error!r}")

    def _run(self) -> None:
        while True:
            try:
                self.poll()
            except Exception:
                log.exception("the registry was not followed in this round")
            if self._stopping.wait(POLL_S):
                return

    def _follow(self, followed: Followed) -> None:
        """Act upon a target's pointer if it moved. Raises what the store raises when it cannot be asked."""
        name = followed.target.name
        try:
            pointer = self._pointer(followed)
        except StoreUnusable:
            raise
        except (ValueError, TypeError, KeyError) as error:
            self._complain(name, f"its pointer makes no sense: {error!r}")
            return
        try:
            if not followed.is_settled or pointer.live != followed.live:
                self._moved(followed, pointer)
            self._go_canary(followed, pointer)
        except Exception as error:  # noqa: BLE001 - of this target alone, and it is tried again
            self._complain(name, f"a version cannot be read: {error!r}")
            return
        self._is_over(name)
        kept = {pointer.live, pointer.canary.version if pointer.canary else None}
        followed.drafts = {version: draft for version, draft in followed.drafts.items() if version in kept}

    def _pointer(self, followed: Followed) -> Pointer:
        pointer = self._family.pointer(followed.target.name)
        if pointer.etag is None and followed.has_pointer:
            raise StoreAway(f"the pointer of {followed.target.name} is gone")
        followed.has_pointer = pointer.etag is not None
        return pointer

    def _moved(self, followed: Followed, pointer: Pointer) -> None:
        """Host what the pointer says; if it cannot be loaded, what serves stays unless it was withdrawn."""
        if followed.hosted not in {one.version for one in pointer.withdrawn}:
            # What was never settled has no draft yet that could be kept.
            self._went_live(followed, pointer.live, or_base=not followed.is_settled)
            return
        try:
            if not self._went_live(followed, pointer.live, or_base=True):
                self._withdraw(followed, followed.reason.removeprefix("kept: "))
        except Exception as error:
            followed.is_settled = False  # also if the pointer goes back to what is given up here
            self._withdraw(followed, f"{pointer.live} cannot be loaded for now: {error}")
            raise

    def _withdraw(self, followed: Followed, why: str) -> None:
        """The base draft, or none, in place of a version that was rolled back."""
        name = followed.target.name
        log.error("%s@%s was rolled back, it is not served on: %s", name, followed.hosted, why)
        base = self._draft(followed, None)
        self._host(followed, replace(base, reason=f"{base.version}: {why}"))

    def _went_live(self, followed: Followed, version: str | None, *, or_base: bool = False) -> bool:
        """Host the version; False, with the reason, if it can never be. Raises what may pass."""
        try:
            draft = self._draft(followed, version, or_base=or_base)
        except UserError as error:
            if _is_passing(error):
                raise
            log.error("%s keeps what it has: %s", followed.target.name, error)
            followed.live, followed.is_settled = version, True
            followed.reason = f"kept: {version or 'the base draft'} cannot be loaded: {error}"
            return False
        followed.live, followed.is_settled = version, True
        self._host(followed, draft)
        return True

    def _go_canary(self, followed: Followed, pointer: Pointer) -> None:
        name, wanted = followed.target.name, pointer.canary
        decided = followed.rolled_back
        if wanted is not None and decided is not None and wanted.version == decided.version:
            if self._family.roll_back(name, decided):  # the store was away when it was decided
                followed.rolled_back = None
            return
        followed.rolled_back = None
        if wanted == followed.canary:
            return
        self._engines.end_canary(name)
        if wanted is None:
            log.info("%s has no canary any more", name)
            followed.canary = None
        else:
            self._try(followed, wanted)

    def _try(self, followed: Followed, canary: Canary) -> None:
        """Give the canary its share, or roll it back if it can never be loaded. Raises what may pass."""
        name = followed.target.name
        try:
            draft = self._draft(followed, canary.version)
        except UserError as error:
            if _is_passing(error):
                raise
            why = f"cannot be loaded: {error}"
            log.error("%s: the canary %s is rolled back: it %s", name, canary.version, why)
            self._roll_back(followed, RolledBack(canary.version, why), "unreadable")
            return
        test = self._new_test(canary.share)
        self._engines.host_canary(name, draft.version, _route(followed, draft), canary.share, test)
        followed.canary = canary
        log.info("%s@%s is tried on %.3g of the requests", name, canary.version, canary.share)

    def _draft(self, followed: Followed, version: str | None, *, or_base: bool = False) -> ServedDraft:
        """A version's draft, loaded unless it is hosted; `or_base`: the base's for one of another trunk."""
        if version not in followed.drafts:
            target = followed.target
            found = None if version is None else self._family.version(target.name, version)
            if or_base and not self._family.fits(found):
                base = self._family.draft(target, None)
                return replace(base, reason=f"{base.version}: {version} was adapted on another trunk")
            followed.drafts[version] = self._family.draft(target, found)
        return followed.drafts[version]

    def _host(self, followed: Followed, draft: ServedDraft) -> None:
        followed.hosted, followed.reason = draft.version, draft.reason
        self._engines.host(followed.target.name, draft.version, _route(followed, draft))
        self._took_over(followed.target.name, draft)
        why = f": {draft.reason}" if draft.reason else ""
        log.info("%s@%s takes the requests from now on%s", followed.target.name, draft.version, why)

    def _judge(self) -> None:
        """Roll back the canaries that are worse."""
        for name, version, test in self._engines.inspect(_worse).result(timeout=VERDICT_WAIT_S):
            self._engines.end_canary(name)
            why = (
                f"tau {test.canary.tau:.3f} over {test.canary.requests} requests, live {test.live.tau:.3f} over "
                f"{test.live.requests}; e-value {test.e_value:.3g}, bound {test.threshold:.3g}"
            )
            log.warning("%s@%s is rolled back: %s", name, version, why)
            self._roll_back(self._followed[name], RolledBack(version, why), "worse")

    def _roll_back(self, followed: Followed, canary: RolledBack, why: str) -> None:
        """End a canary that gets no requests here any more, for all; the store may be away."""
        name = followed.target.name
        followed.canary, followed.rolled_back = None, canary
        self._rolled_back(name, why)
        try:
            if self._family.roll_back(name, canary):
                followed.rolled_back = None  # who starts it again means it
        except Exception as error:  # noqa: BLE001 - the next look at the pointer tries again
            self._complain(
                "the store", f"cannot be written, {name}@{canary.version} is ended later: {error!r}"
            )

    def _complain(self, about: str, what: str) -> None:
        if about not in self._complaints:
            log.warning("%s: %s", about, what)
        self._complaints[about] = what

    def _is_over(self, about: str) -> None:
        if self._complaints.pop(about, None) is not None:
            log.info("%s: all is well again", about)


def _worse(lanes: Iterable[Lane], _current: object) -> list[tuple[str, str, WorseTest]]:
    return [(lane.target, lane.version, lane.test) for lane in lanes if lane.test and lane.test.is_worse]


def _route(followed: Followed, draft: ServedDraft) -> Route:
    target = followed.target
    return Route(target.forward, target.stop_ids, draft.draft, target.lora)


def _is_passing(error: UserError) -> bool:
    """Whether the store failed rather than the version: then it is tried again."""
    return is_unusable(error) or isinstance(error.__cause__, OSError | NotFound)
