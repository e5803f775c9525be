"""`farm bench serve`: an endpoint under load, over HTTP, beside the same engine without it.

A closed loop of clients over the family's adapters, then an open loop above what it carried. Every answer is compared
with its target's own, decoded alone and undrafted before the load.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farm.bench.serve_chaos import Chaos, copied
from farm.bench.serve_child import ServeChild, check_port_is_free, died, serving
from farm.bench.serve_client import Ask, Client
from farm.bench.serve_engine import engine_speed
from farm.bench.serve_load import ClosedLoop, Solos, Window, open_loop, summary
from farm.bench.serve_subjects import Subjects
from farm.config import Manifest
from farm.errors import UserError

START_S = 240.0
SEED = 0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Load:
    """How much is asked, and for how long."""

    clients: int = 64
    duration_s: float = 120.0
    warm_up_s: float = 10.0
    open_s: float = 15.0
    # Arrivals of the open loop, over the requests a second that the closed loop completed.
    open_factor: float = 2.0
    engine_s: float = 20.0

    @classmethod
    def quick(cls) -> Load:
        return cls(duration_s=30.0, warm_up_s=8.0, open_s=10.0, engine_s=12.0)


@dataclass(frozen=True)
class Endpoint:
    """Where the load goes; `child` is None for an endpoint that somebody else runs."""

    url: str
    key: str | None = None
    child: ServeChild | None = None


def bench_child(manifest: Manifest, arguments: list[str], load: Load, log: Path, say: Say) -> dict[str, Any]:
    """Starts `farm serve ARGUMENTS`, loads it, ends it, and then measures the engine alone on the same cores."""
    url = f"http://127.0.0.1:{manifest.serve.port}"
    check_port_is_free(manifest.serve.port)
    say("starting farm serve")
    with serving(arguments, log) as child:
        record = asyncio.run(_bench(Endpoint(url, child=child), Subjects.of(manifest), load, say))
    return record | with_engine(manifest, load, record, say)


def chaos_child(manifest: Manifest, arguments: list[str], load: Load, log: Path, say: Say) -> dict[str, Any]:
    """Two replicas on a copy of the store, and what happens to them under the closed loop."""
    check_port_is_free(manifest.serve.port)
    with copied(manifest.store, log.with_name("chaos-store")) as store:
        arguments = [*arguments, "--set", f"store={store}", "--set", "resources.serve.replicas=2"]
        say("starting farm serve with two replicas, on a copy of the store")
        with serving(arguments, log) as child:
            endpoint = Endpoint(f"http://127.0.0.1:{manifest.serve.port}", child=child)
            return asyncio.run(_chaos(endpoint, Subjects.of(manifest), load, store, say))


async def _chaos(endpoint: Endpoint, subjects: Subjects, load: Load, store: str, say: Say) -> dict[str, Any]:
    assert endpoint.child is not None
    async with Client(endpoint.url) as client:
        await _ready(client, endpoint, subjects)
        solos = await solo_answers(client, subjects)
        say("a new version, promoted and rolled back; the store away; a replica killed")
        chaos = Chaos(client, endpoint.child, store, subjects.names[0])
        return await chaos.run(subjects.in_turn(), load.clients, solos)


def bench_url(manifest: Manifest, endpoint: Endpoint, load: Load, say: Say) -> dict[str, Any]:
    """The same load on a running endpoint of this family; nothing is known of its engine and its memory."""
    return asyncio.run(_bench(endpoint, Subjects.of(manifest), load, say))


def with_engine(manifest: Manifest, load: Load, record: dict[str, Any], say: Say) -> dict[str, Any]:
    """The engine's own speed under the same requests, slots and threads, and the endpoint's share of it."""
    subjects, threads = Subjects.of(manifest), replica_threads(manifest.resources.serve.num_cpus)
    say("the same engine in this process")
    alone = engine_speed(
        manifest, subjects.specs, subjects.in_turn(),
        num_open=load.clients, threads=threads, seconds=load.engine_s,
    )  # fmt: skip
    return {
        "threads": threads,
        "num_slots": manifest.serve.num_slots,
        "engine_tokens_per_s": alone.tokens_per_s,
        "engine_tau": round(alone.tau, 3),
        "over_engine": round(record["tokens_per_s"] / alone.tokens_per_s, 3),
    }


def replica_threads(num_cpus: float) -> int:
    """Torch threads of a replica: OMP_NUM_THREADS, which Ray sets to the replica's whole CPUs where it is not set."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else max(1, int(num_cpus))


async def _bench(endpoint: Endpoint, subjects: Subjects, load: Load, say: Say) -> dict[str, Any]:
    async with Client(endpoint.url, endpoint.key) as client:
        await _ready(client, endpoint, subjects)
        say(f"{len(subjects.names) * len(subjects.prompts)} answers alone")
        solos = await solo_answers(client, subjects)
        asks = subjects.in_turn()
        closed = await _closed(client, endpoint, asks, load, solos, say)
        record = {"clients": load.clients, "adapters": len(subjects.names), **closed}
        rate = load.open_factor * closed["completed"] / closed["duration_s"]
        say(f"open loop, {rate:.1f} requests a second")
        record["open_loop"] = await _open(client, asks, rate, load, solos)
        return record


async def _ready(client: Client, endpoint: Endpoint, subjects: Subjects) -> None:
    waiting = asyncio.create_task(client.wait_ready(START_S))
    while not waiting.done():
        if endpoint.child is not None and not endpoint.child.is_alive:
            waiting.cancel()
            raise died(endpoint.child)
        await asyncio.sleep(0.2)
    try:
        await waiting
    except TimeoutError:
        raise UserError(
            f"{endpoint.url}: lists no models after {START_S:.0f} s; is `farm serve` running?"
        ) from None
    missing = set(subjects.names) - set(await client.versions())
    if missing:
        raise UserError(f"{endpoint.url}: does not serve {', '.join(sorted(missing))}; its log says why")


async def solo_answers(client: Client, subjects: Subjects) -> Solos:
    """Each target's answer to each prompt, one request at a time, without drafts."""
    solos = {}
    for ask in subjects.each(max_drafted=0):
        answer = await client.answer(ask)
        if not answer.completed:
            raise UserError(f"{ask.target}: does not answer alone: {answer.error}")
        solos[ask.target, ask.prompt] = answer.text
    return solos


async def _closed(
    client: Client, endpoint: Endpoint, asks: Iterator[Ask], load: Load, solos: Solos, say: Say
) -> dict[str, Any]:
    """The closed loop: warmed up, measured, ended; with memory and processor time at both ends of the measurement."""
    say(
        f"closed loop of {load.clients} clients, {load.warm_up_s:.0f} s to warm up, {load.duration_s:.0f} s measured"
    )
    loop = ClosedLoop(client, asks, load.clients)
    await asyncio.sleep(load.warm_up_s)
    before, start_s = _machine(endpoint.child), time.perf_counter()
    await asyncio.sleep(load.duration_s)
    after, end_s = _machine(endpoint.child), time.perf_counter()
    answers = await loop.stop()
    window = Window(start_s, end_s)
    return {
        "duration_s": round(window.seconds, 2),
        **summary(answers, window, solos),
        "rss_mb_start": before["rss_mb"],
        "rss_mb_end": after["rss_mb"],
        "cpu_share": {
            role: round((spent - before["cpu_s"].get(role, 0.0)) / window.seconds, 3)
            for role, spent in after["cpu_s"].items()
        },
    }


async def _open(client: Client, asks: Iterator[Ask], rate: float, load: Load, solos: Solos) -> dict[str, Any]:
    start_s = time.perf_counter()
    answers = await open_loop(client, asks, rate, load.open_s, SEED)
    window = Window(start_s, max(answer.ended_s for answer in answers) + 1e-9)
    found = summary(answers, window, solos)
    return {
        "arrivals_per_s": round(rate, 2),
        "arriving_s": load.open_s,
        "duration_s": round(window.seconds, 2),
        **found,
    }


def _machine(child: ServeChild | None) -> dict[str, Any]:
    """Memory of the serving processes, and processor seconds so far of each role, this client's among them."""
    own = {"client": time.process_time()}
    if child is None:
        return {"rss_mb": None, "cpu_s": own}
    return {"rss_mb": child.rss_mb(), "cpu_s": child.cpu_s() | own}
