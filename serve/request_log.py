"""One request as the gateway sees it: measured while its pieces pass, counted and logged at its end."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import cache
from typing import Any

from ray.util import metrics as ray_metrics

from serve.errors import ErrorBody
from serve.metrics import REQUESTS, Meter
from serve.records import Ask, Delta, Item

CLIENT_LEFT = 499
log = logging.getLogger("farm.requests")


def log_to_stdout() -> None:
    """Lines of JSON and nothing around them; Ray keeps them in the worker's own file."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


@cache
def request_meter() -> RequestMeter:
    """That of this process, exported by Ray too."""
    log_to_stdout()
    return RequestMeter(Meter(REQUESTS, mirror=ray_metrics))


class RequestMeter:
    """Counts requests into a meter of serve.metrics.REQUESTS. What clients sent never gets into a label or the log."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._known: set[str] = set()  # targets that have answered: others are no labels
        self._open: dict[str, int] = {}

    def refused(self, status: int) -> None:
        """A request that was refused before it had a target."""
        self.meter.inc("farm_requests", target="", status=str(status))

    async def watch(self, ask: Ask, items: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
        """The same items. An end without a finish reason and without an error is a client that left."""
        started_s = before_s = time.perf_counter()
        first_s, status = None, CLIENT_LEFT
        last: dict[int, Delta] = {}  # by choice
        try:
            async with aclosing(items):
                async for item in items:
                    now_s = time.perf_counter()
                    if isinstance(item, ErrorBody):
                        status = item.status
                    else:
                        if first_s is None:
                            first_s = now_s
                            self._begin(ask)
                            self.meter.observe(
                                "farm_time_to_first_token_seconds", now_s - started_s, target=self._name(ask)
                            )
                        else:
                            self.meter.observe(
                                "farm_inter_token_latency_seconds", now_s - before_s, target=self._name(ask)
                            )
                        before_s, last[item.index] = now_s, item
                        ended = sum(one.finish_reason is not None for one in last.values())
                        status = 200 if ended == ask.num_choices else CLIENT_LEFT
                    yield item
        finally:
            self._end(ask, status, started_s, first_s, last)

    def _name(self, ask: Ask) -> str:
        """The target, "" for one that never answered."""
        return ask.target if ask.target in self._known else ""

    def _begin(self, ask: Ask) -> None:
        self._known.add(ask.target)
        self._count_open(ask, 1)

    def _count_open(self, ask: Ask, change: int) -> None:
        name = self._name(ask)
        self._open[name] = self._open.get(name, 0) + change
        self.meter.set("farm_requests_open", self._open[name], target=name)

    def _end(
        self, ask: Ask, status: int, started_s: float, first_s: float | None, last: Mapping[int, Delta]
    ) -> None:
        name, ended_s = self._name(ask), time.perf_counter()
        self.meter.inc("farm_requests", target=name, status=str(status))
        self.meter.observe("farm_request_seconds", ended_s - started_s, target=name)
        line: dict[str, Any] = {
            "event": "request", "id": ask.id, "target": name, "status": status,
            "duration_ms": _ms(ended_s - started_s),
        }  # fmt: skip
        if last and first_s is not None:
            self._count_open(ask, -1)
            choices = list(last.values())
            one = choices[0]  # all are of one prompt and one version
            tokens = sum(choice.num_new_tokens for choice in choices)
            rounds = sum(choice.num_rounds for choice in choices)
            self.meter.inc("farm_prompt_tokens", one.num_prompt_tokens, target=name)
            self.meter.inc("farm_generation_tokens", tokens, target=name, version=one.version)
            if tokens > 1:
                self.meter.observe(
                    "farm_time_per_output_token_seconds", (ended_s - first_s) / (tokens - 1), target=name
                )
            tau = round(sum(choice.num_emitted for choice in choices) / rounds, 3) if rounds else None
            line |= {
                "version": one.version, "prompt_tokens": one.num_prompt_tokens, "tokens": tokens, "tau": tau,
                "ttft_ms": _ms(first_s - started_s), "finish_reason": one.finish_reason,
            }  # fmt: skip
        log.info(json.dumps(line))


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)
