"""What an endpoint under load must survive: versions that come, go and come back, a store that is away, a lost replica.

It works on a copy of the store. Every version that it publishes is the live adapter again: answers must not change, and
`system_fingerprint` says which one gave them.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from farm.bench.serve_child import ServeChild
from farm.bench.serve_client import Answer, Ask, Client
from farm.bench.serve_load import ClosedLoop, Solos, Window, summary
from farm.draft.checkpoint import EXPERT_FILE
from farm.errors import UserError
from farm.registry import Registry
from farm.store import open_store

REPLICA = "EngineHost"
AWAY_S, SETTLE_S, WARM_UP_S = 20.0, 6.0, 8.0
RECOVER_S = 90.0
CANARY_SHARE = 0.5


@dataclass
class Chaos:
    """One run: a load that goes on, and what is done to the endpoint meanwhile."""

    client: Client
    child: ServeChild
    store: str  # a file:// URI that may be changed
    target: str
    events: list[dict[str, Any]] = field(default_factory=list)

    async def run(self, asks: Iterator[Ask], num_clients: int, solos: Solos) -> dict[str, Any]:
        loop = ClosedLoop(self.client, asks, num_clients)
        await asyncio.sleep(WARM_UP_S)
        start_s = time.perf_counter()
        await self._roll_out()
        await self._store_away()
        killed_s = await self._kill_replica()
        end_s = time.perf_counter()
        answers = await loop.stop()
        return self._record(answers, Window(start_s, end_s), killed_s, solos)

    async def _roll_out(self) -> None:
        """Publishes, tries, promotes and rolls back; each is given time to be seen."""
        registry = Registry(open_store(self.store))
        live = registry.live(self.target)
        if live is None:
            raise UserError(f"{self.target}: has no live adapter; run `farm onboard` first")
        files = {EXPERT_FILE: registry.path(live, EXPERT_FILE).read_bytes()}
        new = registry.publish(self.target, files, live.card).version
        self._event("publish", version=new)
        registry.start_canary(self.target, new, CANARY_SHARE)
        self._event("canary", version=new, share=CANARY_SHARE)
        await asyncio.sleep(2 * SETTLE_S)
        registry.promote(self.target, new, live.version)
        self._event("promote", version=new, before=live.version)
        await asyncio.sleep(2 * SETTLE_S)
        registry.rollback(self.target)
        self._event("rollback", version=live.version, before=new)
        await asyncio.sleep(2 * SETTLE_S)

    async def _store_away(self) -> None:
        folder = folder_of(self.store)
        away = folder.with_name(folder.name + ".away")
        folder.rename(away)
        self._event("store away", seconds=AWAY_S)
        try:
            await asyncio.sleep(AWAY_S)
        finally:
            away.rename(folder)
        self._event("store back")
        await asyncio.sleep(SETTLE_S)

    async def _kill_replica(self) -> float:
        """Kills one and waits until there are as many again; the moment of its end."""
        before = self._replicas()
        if len(before) < 2:
            raise UserError("--chaos kills a replica: it needs resources.serve.replicas of 2 or more")
        os.kill(before[0], signal.SIGKILL)
        killed_s = time.perf_counter()
        self._event("kill", pid=before[0])
        while len(set(self._replicas()) - {before[0]}) < len(before):
            if time.perf_counter() - killed_s > RECOVER_S:
                raise UserError(f"no replica came for the killed one within {RECOVER_S:.0f} s")
            await asyncio.sleep(0.5)
        self._event("replica back")
        await asyncio.sleep(2 * SETTLE_S)
        return killed_s

    def _replicas(self) -> list[int]:
        return [
            one.pid
            for one in self.child.processes()
            if one.title.startswith("ray::ServeReplica:") and f":{REPLICA}" in one.title
        ]

    def _event(self, what: str, **fields: Any) -> None:
        self.events.append({"event": what, "at_s": time.perf_counter(), **fields})

    def _record(
        self, answers: Sequence[Answer], window: Window, killed_s: float, solos: Solos
    ) -> dict[str, Any]:
        found = summary(answers, window, solos)
        failed = [answer for answer in answers if not answer.completed and answer.ended_s >= window.start_s]
        lost = [answer for answer in failed if answer.started_s <= killed_s <= answer.ended_s]
        known = {f"{self.target}@{event['version']}" for event in self.events if "version" in event}
        for event, following in zip(self.events, [*self.events[1:], {"at_s": window.end_s}], strict=True):
            if "before" in event:
                steady = Window(event["at_s"], following["at_s"])
                event["old_until_s"] = _last_start(answers, f"{self.target}@{event['before']}", steady)
                event["new_from_s"] = _first_start(answers, f"{self.target}@{event['version']}", steady)
        for event in self.events:
            event["at_s"] = round(event["at_s"] - window.start_s, 2)
        named = {version for answer in answers for version in answer.versions}
        served = sorted(version for version in named if version.startswith(f"{self.target}@"))
        others = [answer for answer in failed if answer not in lost]
        return {
            "duration_s": round(window.seconds, 2),
            **found,
            "errors": len(others),
            "lost_with_replica": len(lost),
            "error_messages": sorted({f"{answer.status}: {answer.error}"[:200] for answer in others}),
            "versions": served,
            "unexpected_versions": [version for version in served if version not in known],
            "lost_messages": sorted({f"{answer.status}: {answer.error}"[:200] for answer in lost}),
            "events": self.events,
        }  # fmt: skip


def _last_start(answers: Sequence[Answer], version: str, steady: Window) -> float:
    """Seconds into the window at which the last request was sent that `version` still answered within it."""
    starts = [
        answer.started_s - steady.start_s
        for answer in answers
        if version in answer.versions and steady.holds(answer.started_s) and steady.holds(answer.ended_s)
    ]
    return round(max(starts, default=0.0), 2)


def _first_start(answers: Sequence[Answer], version: str, steady: Window) -> float | None:
    """Seconds into the window at which the first request was sent that `version` answered; None: none was."""
    starts = [
        answer.started_s - steady.start_s
        for answer in answers
        if version in answer.versions and steady.holds(answer.started_s)
    ]
    return round(min(starts), 2) if starts else None


def folder_of(store: str) -> Path:
    """The folder of a file:// store. Raises UserError for another one."""
    parts = urlsplit(store)
    if parts.scheme != "file":
        raise UserError(
            f"{store}: --chaos takes the store away for a while, which it can do with a folder only"
        )
    return Path(unquote(parts.path))


@contextmanager
def copied(store: str, folder: Path) -> Iterator[str]:
    """A copy of a store, by hard links where that is possible: files of a store are replaced, never changed."""
    copy = folder / "store"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(folder_of(store), copy, copy_function=_link)
    try:
        yield copy.resolve().as_uri()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _link(source: str, destination: str) -> str:
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)
    return destination
