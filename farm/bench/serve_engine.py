"""The engine that the endpoint runs, in this process and without the endpoint: the speed that serving is held to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from farm.bench.serve_client import Ask
from farm.config import Manifest
from farm.data.chat import encode_chat
from farm.decode.controls import drafting_options
from farm.decode.engine import Engine, Request, Route
from farm.decode.sampling import SamplingParams
from farm.evaluate.published import Published
from farm.evaluate.target import OpenTrunk
from farm.sections import TargetSpec
from farm.target.load import LoadedTarget, open_target
from farm.target.lora import open_beside


@dataclass(frozen=True)
class EngineSpeed:
    tokens_per_s: float
    tau: float


def engine_speed(
    manifest: Manifest,
    specs: tuple[TargetSpec, ...],
    asks: Iterator[Ask],
    *,
    num_open: int,
    threads: int,
    seconds: float,
) -> EngineSpeed:
    """Keeps `num_open` requests in one engine, as a closed loop of clients does; a third more warms it up."""
    torch.set_num_threads(threads)
    targets = {target.name: target for target in _open(manifest, specs)}
    engine = _engine(manifest, targets)
    requests = (_request(targets[ask.target], number, ask) for number, ask in enumerate(asks))
    for _ in range(num_open):
        engine.add(next(requests))
    _run(engine, requests, seconds / 3)
    emitted, rounds = engine.stats.emitted, engine.stats.rounds
    started = time.perf_counter()
    tokens = _run(engine, requests, seconds)
    spent = time.perf_counter() - started
    return EngineSpeed(
        round(tokens / spent, 2), (engine.stats.emitted - emitted) / (engine.stats.rounds - rounds)
    )


def _run(engine: Engine, requests: Iterator[Request], seconds: float) -> int:
    """Tokens of the time; a request that ends is followed by another."""
    tokens, deadline = 0, time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        for output in engine.step():
            tokens += len(output.tokens)
            if output.completion is not None:
                engine.add(next(requests))
    return tokens


def _open(manifest: Manifest, specs: tuple[TargetSpec, ...]) -> Iterator[LoadedTarget]:
    """As a replica holds them: a checkpoint that LoRA targets have in common is loaded once."""
    shared = {model for model, count in Counter(spec.model for spec in specs).items() if count > 1}
    checkpoints = {
        model: open_target(
            next(s for s in specs if s.model == model).model_copy(update={"lora": None}), manifest.dtype
        )
        for model in shared
    }
    for spec in specs:
        beside = open_beside(spec, checkpoints[spec.model]) if spec.model in shared and spec.lora else None
        yield beside or open_target(spec, manifest.dtype)


def _engine(manifest: Manifest, targets: dict[str, LoadedTarget]) -> Engine:
    published, settings = Published.of(manifest.store), manifest.serve
    trunk = OpenTrunk.of(published.trunk_folder, next(iter(targets.values())))
    routes = []
    for name, target in targets.items():
        live = published.live_expert(name)
        draft = trunk.draft(str(live.file) if live else None)
        routes.append(Route(target.forward, target.stop_ids, draft, target.lora, name))
    return Engine(
        routes, num_slots=settings.num_slots, max_length=min(settings.max_length, routes[0].forward.max_positions),
        **drafting_options(settings),
    )  # fmt: skip


def _request(target: LoadedTarget, number: int, ask: Ask) -> Request:
    ids = tuple(encode_chat(target.tokenizer, ask.messages, target.chat_template))
    return Request(str(number), ids, SamplingParams(max_new_tokens=ask.max_tokens), ask.target)
