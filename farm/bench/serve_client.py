"""A lean client of a chat endpoint: it reads streams with one pass over the bytes, so that it measures the server.

On a small machine the client takes its time from what it measures; `openai`'s own costs a millisecond an event.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Ask:
    """One conversation for one target; `prompt` is its number among those of a benchmark."""

    target: str
    prompt: int
    messages: tuple[dict[str, str], ...]
    max_tokens: int
    max_drafted: int | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The body of the request: greedy, streamed, with the count of tokens at the end."""
        fields: dict[str, Any] = {
            "model": self.target, "messages": list(self.messages), "temperature": 0, "max_tokens": self.max_tokens,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        return fields if self.max_drafted is None else {**fields, "max_drafted": self.max_drafted}


@dataclass
class Answer:
    """What came back. Times are those of `time.perf_counter`; an answer without `error` is complete."""

    ask: Ask
    started_s: float
    status: int = 0
    retry_after: str | None = None
    error: str | None = None
    text: str = ""
    num_tokens: int = 0
    versions: set[str] = field(default_factory=set)
    event_s: list[float] = field(default_factory=list)  # when each piece with text arrived
    ended_s: float = 0.0

    @property
    def completed(self) -> bool:
        return self.status == 200 and self.error is None

    @property
    def ttft_s(self) -> float | None:
        return self.event_s[0] - self.started_s if self.event_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Between one piece and the next."""
        return [after - before for before, after in zip(self.event_s, self.event_s[1:], strict=False)]

    def take(self, event: dict[str, Any], now: float) -> None:
        """Adds one chunk."""
        if "error" in event:
            self.error = event["error"]["message"]
            return
        self.versions.add(event.get("system_fingerprint") or "")
        for choice in event["choices"]:
            piece = choice["delta"].get("content")
            if piece:
                self.text += piece
                self.event_s.append(now)
        if event.get("usage"):
            self.num_tokens = event["usage"]["completion_tokens"]


class Client:
    """Connections to one endpoint; `async with` opens and closes them."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def __aenter__(self) -> Client:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def answer(self, ask: Ask) -> Answer:
        """Asks and reads to the end; what goes wrong is in the answer."""
        answer = Answer(ask, time.perf_counter())
        try:
            async with self._session.post(f"{self._url}/v1/chat/completions", json=ask.fields) as response:
                answer.status, answer.retry_after = response.status, response.headers.get("Retry-After")
                if response.status == 200:
                    await _read(response, answer)
                else:
                    answer.error = (await response.text())[:500]
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.ended_s = time.perf_counter()
        return answer

    async def get(self, path: str) -> Any:
        """The JSON at a path. Raises aiohttp.ClientError, or ValueError where it is none."""
        async with self._session.get(self._url + path) as response:
            response.raise_for_status()
            return await response.json(content_type=None)

    async def versions(self) -> dict[str, str]:
        """Of each target, the version that takes new requests."""
        return {card["id"]: card["version"] for card in (await self.get("/v1/models"))["data"]}

    async def wait_ready(self, seconds: float) -> None:
        """Until the endpoint lists its models. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while True:
                try:
                    if await self.versions():
                        return
                except (aiohttp.ClientError, OSError, ValueError, KeyError):
                    pass
                await asyncio.sleep(0.2)


async def _read(response: aiohttp.ClientResponse, answer: Answer) -> None:
    async for data in _events(response):
        if data == b"[DONE]":
            return
        answer.take(json.loads(data), time.perf_counter())
        if answer.error is not None:
            return
    answer.error = "the stream ended before [DONE]"


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of each event; servers here write one line an event."""
    rest = b""
    async for received in response.content.iter_any():
        *events, rest = (rest + received).split(b"\n\n")
        for event in events:
            yield event.removeprefix(b"data: ")
