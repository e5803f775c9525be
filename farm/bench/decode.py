# B rows, T tokens
"""`farm bench decode`: tokens a second of every way to decode, on the same prompts, interleaved in one run.

Both sides decode greedily, ignore end tokens and emit the same number of tokens; an arm's ratio is taken within one
repeat, so that a machine that slows down slows both of its sides.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from farm.bench.arms import Arm
from farm.bench.family import Member, generate
from farm.bench.vllm_engine import VllmEngine
from farm.decode.controls import make_control
from farm.decode.engine import Engine, Request, Route
from farm.decode.sampling import SamplingParams
from farm.decode.tree import TreeShape
from farm.draft.model import Draft
from farm.evaluate.bench import PromptIds

MAX_DRAFTED = 8
# No more tokens than most answers of the zoo have: behind its end a target says what nobody asked for, and no draft was
# trained on. At least so many prompts: one alone may be easy or hard to draft.
EQUAL_TOKENS, EQUAL_PROMPTS = 48, 8
RAGGED_REQUESTS, RAGGED_SHORTEST, RAGGED_LONGEST = 64, 16, 256


@dataclass(frozen=True)
class Row:
    """One arm in one repeat. Seconds are sums over the run; None where an engine does not tell."""

    model: str
    target: str
    engine: str
    control: str
    draft: str
    batch: int
    adapters: int
    workload: str
    dtype: str
    threads: int
    repeat: int
    tokens_per_s: float
    tau: float | None = None
    rounds: int | None = None
    draft_s: float | None = None
    verify_s: float | None = None
    sample_s: float | None = None
    host_s: float | None = None
    prefill_s: float | None = None


@dataclass(frozen=True)
class Durations:
    """For how long an arm runs its requests again and again before it is measured, and while it is.

    A small model answers all in a few hundredths of a second, in which any other process is half of what is measured.
    A control learns for some rounds, as a server's has: by then its looks are as far apart as they get, whether a round
    takes half a millisecond or forty.
    """

    warm_up_s: float = 0.5
    learning_rounds: int = 512
    measured_s: float = 0.25


@dataclass(frozen=True)
class Task:
    """Prompts and how many tokens each is to be answered with."""

    prompts: tuple[PromptIds, ...]
    num_new: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.num_new)


@dataclass(frozen=True)
class Measured:
    seconds: float
    fields: dict[str, Any]


def largest(member: Member, arms: Sequence[Arm]) -> tuple[int, int]:
    """Positions of the longest request of any arm, and the most requests side by side."""
    longest = max(_longest(task) for arm in arms for task in _tasks(member, arm))
    return longest, max(arm.batch for arm in arms)


def _longest(task: Task) -> int:
    return max(len(ids) + new for ids, new in zip(task.prompts, task.num_new, strict=True))


def measure(
    member: Member,
    model: str,
    arms: Sequence[Arm],
    repeats: int,
    vllm: Mapping[str, VllmEngine] | None = None,
    durations: Durations = Durations(),
) -> Iterator[Row]:
    """Warms every arm up, then runs all of them in turn, `repeats` times; `vllm` has an engine a control.

    Arms are warmed up on other prompts where there are so many: what a control learns there has to hold for new ones.
    """
    arms = [arm for arm in arms if arm.draft != "adapted" or member.adapted is not None]
    runs = []
    for arm in arms:
        run, (task, other) = _runner(member, arm, vllm or {}), _tasks(member, arm)
        last_s = _warm_up(arm, run, other, durations)
        runs.append((arm, run, task, max(1, math.ceil(durations.measured_s / last_s))))
    for repeat in range(repeats):
        for arm, run, task, count in runs:
            measured = _together([run(task) for _ in range(count)])
            yield Row(
                **asdict(arm), model=model, target=member.name,
                adapters=int(arm.draft == "adapted"),
                dtype=_dtype(member, arm, vllm or {}), threads=torch.get_num_threads(), repeat=repeat,
                tokens_per_s=count * task.tokens / measured.seconds, **measured.fields,
            )  # fmt: skip


def _warm_up(arm: Arm, run: Callable[[Task], Measured], task: Task, durations: Durations) -> float:
    """Runs a task again and again; seconds of the last run."""
    spent, learned = 0.0, 0.0
    least = durations.learning_rounds if arm.control == "cost" else 0
    while True:
        last = run(task)
        spent += last.seconds
        learned += last.fields.get("rounds", 0) / arm.batch  # they are counted for every row
        if spent >= durations.warm_up_s and learned >= least:
            return last.seconds


def _together(passes: Sequence[Measured]) -> Measured:
    """Sums over runs of one task; tau is that of all their rounds."""
    fields = {name: sum(one.fields[name] for one in passes) for name in passes[0].fields}
    if fields:
        fields["tau"] = sum(one.fields["tau"] * one.fields["rounds"] for one in passes) / fields["rounds"]
    return Measured(sum(one.seconds for one in passes), fields)


def _dtype(member: Member, arm: Arm, vllm: Mapping[str, VllmEngine]) -> str:
    if arm.engine == "vllm":
        return vllm[arm.control].settings.dtype
    return (
        str(member.target.forward.dtype).removeprefix("torch.")
        if arm.engine == "farm"
        else member.reference_dtype
    )


def _tasks(member: Member, arm: Arm) -> tuple[Task, Task]:
    """What is measured, the same for all arms of a batch size and workload; with the last prompts, what warms up."""
    return _task(member, arm, member.prompts), _task(member, arm, member.prompts[::-1])


def _task(member: Member, arm: Arm, order: Sequence[PromptIds]) -> Task:
    count = max(arm.batch, EQUAL_PROMPTS) if arm.workload == "equal" else RAGGED_REQUESTS
    prompts = tuple(order[i % len(order)] for i in range(count))
    if arm.workload == "equal":
        return Task(prompts, (EQUAL_TOKENS,) * count)
    rng = random.Random(0)
    lengths = tuple(rng.randint(RAGGED_SHORTEST, RAGGED_LONGEST) for _ in range(count))
    room = member.target.max_positions - max(map(len, prompts))
    return Task(prompts, tuple(min(length, room) for length in lengths))


def _runner(member: Member, arm: Arm, vllm: Mapping[str, VllmEngine]) -> Callable[[Task], Measured]:
    if arm.engine == "vllm":
        engine = vllm[arm.control]
        return lambda task: _vllm_run(engine, arm, task)
    if arm.engine == "farm":
        draft = {"none": None, "base": member.base_draft, "adapted": member.adapted}[arm.draft]
        return _engine_run(member, arm, draft, _tasks(member, arm))
    options = {"prompt_lookup_num_tokens": 4} if arm.engine == "transformers-assisted" else {}
    return lambda task: _generate_run(member, arm, task, options)


def _engine_run(
    member: Member, arm: Arm, draft: Draft | None, tasks: Sequence[Task]
) -> Callable[[Task], Measured]:
    """One engine for `tasks` and all repeats, as a server has one: what its control has learned stays."""
    longest = max(map(_longest, tasks))
    tree = TreeShape.named(arm.control)
    engine = Engine(
        [Route(member.target.forward, frozenset(), draft)],
        num_slots=arm.batch, max_length=min(longest, member.target.max_positions), k=MAX_DRAFTED,
        control=None if tree else make_control(arm.control, MAX_DRAFTED), tree=tree,
    )  # fmt: skip

    def run(task: Task) -> Measured:
        pairs = enumerate(zip(task.prompts, task.num_new, strict=True))
        return timed(
            engine, [Request(str(i), ids, SamplingParams(max_new_tokens=new)) for i, (ids, new) in pairs]
        )

    return run


def timed(engine: Engine, requests: Sequence[Request]) -> Measured:
    """Answers the requests to their full length; what that took, and where."""
    before, emitted, rounds = seconds_so_far(engine), engine.stats.emitted, engine.stats.rounds
    started = time.perf_counter()
    done = engine.run(requests)
    seconds = time.perf_counter() - started
    assert [len(one.tokens) for one in done] == [one.params.max_new_tokens for one in requests]
    spent = {name: value - before[name] for name, value in seconds_so_far(engine).items()}
    rounds = engine.stats.rounds - rounds
    tau = (engine.stats.emitted - emitted) / rounds
    return Measured(seconds, {"tau": tau, "rounds": rounds, **spent})


def seconds_so_far(engine: Engine) -> dict[str, float]:
    """Where an engine's time went so far, as fields of a row."""
    return {f"{name}_s": value for name, value in vars(engine.seconds).items()}


def _generate_run(member: Member, arm: Arm, task: Task, options: dict[str, Any]) -> Measured:
    """Batches in order, each run to its longest answer; only the tokens asked for count."""
    device = member.target.forward.device
    started = time.perf_counter()
    for first in range(0, len(task.prompts), arm.batch):
        prompts = task.prompts[first : first + arm.batch]
        width = max(map(len, prompts))
        tokens_BT = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
        mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        longest = max(task.num_new[first : first + arm.batch])
        out_BT = generate(member.reference, tokens_BT, longest, attention_mask=mask_BT, **options)
        assert out_BT.shape[1] == width + longest
    return Measured(time.perf_counter() - started, {})


def _vllm_run(engine: VllmEngine, arm: Arm, task: Task) -> Measured:
    answer = engine.generate(task.prompts, task.num_new, arm.batch)
    assert [len(one) for one in answer.tokens] == list(task.num_new)
    return Measured(answer.seconds, {})
