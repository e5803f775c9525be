"""What the engine hosts say they host, asked again every few seconds; once it is known, nobody waits long for it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Mapping
from contextvars import Context
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.records import Hosted

FRESH_S = 2.0  # how long a list is believed
ASK_S = 5.0  # how long a group may take to answer
OLDER_AFTER_S = 0.25  # for which a newer list is waited for where there is an older one
log = logging.getLogger("ray.serve")


class Listing:
    """The engines of all groups.

    To ask is a request like any other: a replica that has all the answers open that it may have says what it hosts
    only when one of them ends. A broadcast waits for that, too.
    """

    def __init__(self, hosts: Mapping[str, DeploymentHandle[Any]]) -> None:
        """`hosts` are the deployments of engine hosts by name."""
        self._hosts = hosts
        self._listed: dict[str, list[Hosted]] = {}
        self._listed_at: float | None = None
        self._asking: asyncio.Task[None] | None = None

    async def current(self) -> list[Hosted]:
        """The engines that take new requests, by target; those of a group are older while none of it says which."""
        if self._asking is None or (self._asking.done() and not self._is_fresh):
            # In the context of no request: Serve cancels what a request has asked when its client leaves.
            self._asking = asyncio.create_task(self._ask_all(), context=Context())
        wait_s = None if self._listed_at is None else OLDER_AFTER_S
        await asyncio.wait({self._asking}, timeout=wait_s)
        return sorted(itertools.chain.from_iterable(self._listed.values()), key=lambda one: one.target)

    @property
    def _is_fresh(self) -> bool:
        return self._listed_at is not None and time.monotonic() - self._listed_at < FRESH_S

    async def _ask_all(self) -> None:
        await asyncio.gather(*map(self._ask, self._hosts))
        self._listed_at = time.monotonic()

    async def _ask(self, group: str) -> None:
        try:
            hosted = await asyncio.wait_for(self._hosts[group].hosted.remote(), ASK_S)
        except (TimeoutError, RayError, RayServeException) as error:
            log.warning("%s does not say what it hosts: %s", group, error)
        else:
            self._listed[group] = [engine for engine in hosted if engine.is_current]
