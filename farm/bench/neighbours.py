"""`farm bench neighbours`: decoding and a training step beside processes that keep a core busy.

How long OpenMP's threads spin while they wait is read once, when torch is loaded: each setting is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from farm.config import Manifest

SPINS = "GOMP_SPINCOUNT"
SLOTS, NEW_TOKENS, STEPS = (1, 16), 40, 8
BUSY = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """One setting beside so many neighbours. `spins` is None where nothing is set: OpenMP's own, milliseconds."""

    spins: str | None
    threads: int
    busy: int
    tokens_per_s: tuple[float, ...]  # by SLOTS, decoding without a draft
    step_s: float  # a training step of a whole model


def measure(manifest: Path, threads: int, spins: str) -> Iterator[Row]:
    """Unset and `spins` beside 0, 1 and 2 neighbours, and one thread, which waits for no other."""
    for busy in BUSY:
        for setting, count in ((None, threads), (spins, threads), (None, 1)):
            with neighbours(busy):
                yield _row(manifest, setting, count, busy)


def table(rows: list[Row]) -> Table:
    """A row a setting and number of neighbours."""
    shown = Table(title="beside busy processes")
    for column in ("neighbours", "threads", SPINS, *(f"tokens/s, {n} slots" for n in SLOTS), "ms a step"):
        shown.add_column(column, justify="right")
    for row in rows:
        speeds = (f"{speed:,.0f}" for speed in row.tokens_per_s)
        shown.add_row(
            str(row.busy), str(row.threads), row.spins or "unset", *speeds, f"{1000 * row.step_s:.0f}"
        )
    return shown


def write(out: Path, rows: list[Row], source: dict[str, str]) -> Path:
    """Keeps the rows with where they come from; returns the file."""
    path = out / "neighbours.json"
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**source, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return path


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that count, for as long as the block lasts."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for one in running:
            one.kill()
            one.wait()


def _row(manifest: Path, spins: str | None, threads: int, busy: int) -> Row:
    environment = {name: value for name, value in os.environ.items() if name != SPINS}
    environment |= {"OMP_NUM_THREADS": str(threads)} | ({} if spins is None else {SPINS: spins})
    command = [sys.executable, "-m", "farm.bench.neighbours", str(manifest)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    speeds, step_s = json.loads(done.stdout.splitlines()[-1])
    return Row(spins, threads, busy, tuple(speeds), step_s)


def _child(manifest: Manifest) -> tuple[list[float], float]:
    """Tokens a second by slots of the first full target, and seconds of a training step of it."""
    from farm.bench.family import held_out
    from farm.decode.engine import Engine, Request, Route
    from farm.decode.sampling import SamplingParams
    from farm.target.load import open_target

    spec = next(spec for spec in manifest.targets if spec.lora is None)
    target = open_target(spec, manifest.dtype)
    prompts = held_out(manifest, spec, target)[:32]
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    requests = [Request(str(i), ids, params) for i, ids in enumerate(prompts)]
    length = max(map(len, prompts)) + NEW_TOKENS

    def answered(slots: int) -> int:
        engine = Engine([Route(target.forward, target.stop_ids)], num_slots=slots, max_length=length, k=0)
        return sum(len(done.tokens) for done in engine.run(requests))

    answered(SLOTS[-1])  # the first call pays for allocations
    speeds = []
    for slots in SLOTS:
        begun = time.perf_counter()
        tokens = answered(slots)
        speeds.append(tokens / (time.perf_counter() - begun))
    return speeds, _seconds(_training_step(spec.model), STEPS)


def _training_step(model: str) -> Callable[[], None]:
    """A forward and a backward pass of the whole checkpoint over eight rows of 128 tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False).train()
    tokens_BT = torch.randint(whole.config.vocab_size, (8, 128), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        whole(tokens_BT, labels=tokens_BT).loss.backward()
        whole.zero_grad(set_to_none=True)

    return step


def _seconds(call: Callable[[], None], times: int) -> float:
    call()
    begun = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begun) / times


if __name__ == "__main__":
    from farm.config import load_manifest

    sys.stdout.write(json.dumps(_child(load_manifest(Path(sys.argv[1])))) + "\n")
