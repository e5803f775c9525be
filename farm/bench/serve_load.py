"""Load on an endpoint: a closed loop of clients that ask again when they are answered, an open loop that does not wait.

In a closed loop the server sets the pace, and it must answer everything; arrivals of an open loop come at their own
(Poisson), and a server above its capacity has to refuse some.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import numpy as np

from farm.bench.serve_client import Answer, Ask, Client

Solos = Mapping[tuple[str, int], str]  # the text of each target's answer to each prompt, alone and undrafted


@dataclass(frozen=True)
class Window:
    """The part of a load that counts."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    def holds(self, moment_s: float) -> bool:
        return self.start_s <= moment_s < self.end_s


class ClosedLoop:
    """`num_clients` clients, each with one request open at any time; `answers` grows as they end."""

    def __init__(self, client: Client, asks: Iterator[Ask], num_clients: int) -> None:
        self._client, self._asks = client, asks
        self.answers: list[Answer] = []
        self._stopping = False
        self._clients = [asyncio.create_task(self._ask_on()) for _ in range(num_clients)]

    async def _ask_on(self) -> None:
        while not self._stopping:
            answer = await self._client.answer(next(self._asks))
            self.answers.append(answer)
            if not answer.completed:
                await asyncio.sleep(0.1)  # a server that fails at once is not asked in a spin

    async def stop(self) -> list[Answer]:
        """Asks nothing new and waits for what is open; all answers."""
        self._stopping = True
        await asyncio.gather(*self._clients)
        return self.answers


async def open_loop(
    client: Client, asks: Iterator[Ask], rate: float, seconds: float, seed: int
) -> list[Answer]:
    """Poisson arrivals of `rate` requests a second over `seconds`, all answered or refused."""
    rng, tasks = random.Random(seed), []
    due_s = started_s = time.perf_counter()
    while due_s < started_s + seconds:
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        tasks.append(asyncio.create_task(client.answer(next(asks))))
        due_s += rng.expovariate(rate)
    return list(await asyncio.gather(*tasks))


def percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """p50, p95 and p99 in milliseconds; None without a value."""
    if not seconds:
        return {"p50": None, "p95": None, "p99": None}
    found = np.quantile(np.asarray(seconds) * 1000, [0.5, 0.95, 0.99])
    return dict(zip(("p50", "p95", "p99"), (round(float(value), 2) for value in found), strict=True))


def summary(answers: Sequence[Answer], window: Window, solos: Solos) -> dict[str, Any]:
    """Counts over the requests that began in the window; tokens by the pieces that arrived in it.

    A stream does not say how many tokens a piece has: those of an answer are taken as even over its pieces.
    """
    asked = [answer for answer in answers if window.holds(answer.started_s)]
    refused = [answer for answer in asked if answer.status == 429]
    completed = [answer for answer in asked if answer.completed]
    arrived = [(answer, sum(map(window.holds, answer.event_s))) for answer in answers if answer.completed]
    tokens = sum(answer.num_tokens * count / len(answer.event_s) for answer, count in arrived if count)
    return {
        "requests": len(asked),
        "completed": len(completed),
        "rejected_429": len(refused),
        "rejected_without_retry_after": sum(not (answer.retry_after or "").isdigit() for answer in refused),
        "errors": len(asked) - len(completed) - len(refused),
        "wrong_model": sum(is_of_another(answer, solos) for answer in completed),
        "differing": sum(answer.text != solos[answer.ask.target, answer.ask.prompt] for answer in completed),
        "ttft_ms": percentiles([answer.ttft_s for answer in completed if answer.ttft_s is not None]),
        "itl_ms": percentiles([gap for answer in completed for gap in answer.gaps_s]),
        "tokens_per_s": round(tokens / window.seconds, 2),
        "pieces_per_s": round(sum(count for _, count in arrived) / window.seconds, 2),
    }


def is_of_another(answer: Answer, solos: Solos) -> bool:
    """Whether the text begins as another target's answer to the same prompt and not, as far, as the target's own.

    A batch rounds otherwise than a request alone, and a near tie of two tokens may fall the other way: such an answer
    differs, but up to there it is its own target's.
    """
    own = solos[answer.ask.target, answer.ask.prompt]
    if answer.text == own:
        return False
    others = [text for (target, prompt), text in solos.items() if prompt == answer.ask.prompt and text != own]
    shared = max((_shared(answer.text, text) for text in others), default=0)
    return shared > _shared(answer.text, own)


def _shared(one: str, other: str) -> int:
    return len(commonprefix([one, other]))
