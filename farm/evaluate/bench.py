"""Measures of one target: tau of a draft on held-out prompts, and the speed of every arm in one interleaved run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from farm.decode.engine import OFFLINE_PREFILL_TOKENS, Engine, Request, Route
from farm.decode.sampling import SamplingParams
from farm.decode.stats import DecodeStats
from farm.draft.model import Draft
from farm.evaluate.gate import PromptCounts
from farm.target.load import LoadedTarget

NUM_SLOTS = 32
ARMS = ("transformers", "autoregressive", "base_draft", "adapted")

PromptIds = tuple[int, ...]


@dataclass(frozen=True)
class TauResult:
    """Acceptance of one draft: counts a prompt, and their sums."""

    counts: tuple[PromptCounts, ...]
    stats: DecodeStats
    drafted: tuple[tuple[int, int], ...]  # accepted and reached drafted tokens a prompt
    decode_s: float  # of all rounds
    prefill_s: float  # of all prompts


@dataclass(frozen=True)
class SpeedResult:
    """Emitted tokens / wall second including prefill, batch 1, by arm; medians over rounds.

    `ratio_rounds[arm]` holds a round's speed over that of autoregressive decoding in the same round.
    """

    tokens_per_s: dict[str, float]
    ratio_rounds: dict[str, tuple[float, ...]]

    def ratio(self, arm: str) -> float:
        return statistics.median(self.ratio_rounds[arm])

    def interval(self, arm: str) -> tuple[float, float]:
        """90 % interval of the ratio over rounds."""
        low, high = np.quantile(self.ratio_rounds[arm], [0.05, 0.95])
        return float(low), float(high)


def measure_tau(
    target: LoadedTarget,
    draft: Draft | None,
    prompts: Sequence[PromptIds],
    params: SamplingParams,
    *,
    k: int,
    num_slots: int = NUM_SLOTS,
) -> TauResult:
    """Decodes every prompt once, in batches; prompt i is sampled with seed `params.seed + i`."""
    max_length = min(max(map(len, prompts)) + params.max_new_tokens, target.max_positions)
    engine = Engine(
        [Route(target.forward, target.stop_ids, draft)],
        num_slots=min(num_slots, len(prompts)), max_length=max_length, k=k,
        prefill_tokens=OFFLINE_PREFILL_TOKENS,
    )  # fmt: skip
    start = time.perf_counter()
    done = engine.run(Request(str(i), ids, _seeded(params, i)) for i, ids in enumerate(prompts))
    prefill_s = engine.seconds.prefill
    decode_s = time.perf_counter() - start - prefill_s
    by_prompt = [completion.stats for completion in done]
    counts = tuple(PromptCounts(stats.emitted, stats.rounds) for stats in by_prompt)
    drafted = tuple((sum(stats.accepted), sum(stats.reached)) for stats in by_prompt)
    return TauResult(counts, engine.stats, drafted, decode_s, prefill_s)


def measure_speed(
    target: LoadedTarget,
    reference: Any,
    drafts: dict[str, Draft],
    prompts: Sequence[PromptIds],
    *,
    k: int,
    max_new_tokens: int,
    rounds: int,
) -> SpeedResult:
    """Greedy decoding, batch 1: the arms alternate prompt by prompt, all under the thread count now in force.

    `reference` is the target's `transformers` model, `drafts` the draft of each speculative arm.
    """
    arms: dict[str, Callable[[PromptIds], int]] = {
        "transformers": lambda ids: _generate(reference, target, ids, max_new_tokens),
        "autoregressive": _arm(target, None, prompts, 0, max_new_tokens),
    }
    for name, draft in drafts.items():
        arms[name] = _arm(target, draft, prompts, k, max_new_tokens)
    for arm in arms.values():
        arm(prompts[0])  # the first call of an arm pays for allocations
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        tokens, seconds = dict.fromkeys(arms, 0), dict.fromkeys(arms, 0.0)
        for ids in prompts:
            for name, arm in arms.items():
                start = time.perf_counter()
                tokens[name] += arm(ids)
                seconds[name] += time.perf_counter() - start
        for name in arms:
            speeds[name].append(tokens[name] / seconds[name])
    plain = speeds["autoregressive"]
    ratios = {
        name: tuple(s / p for s, p in zip(values, plain, strict=True)) for name, values in speeds.items()
    }
    return SpeedResult({name: statistics.median(values) for name, values in speeds.items()}, ratios)


def _seeded(params: SamplingParams, index: int) -> SamplingParams:
    return replace(params, seed=params.seed + index)


def _arm(
    target: LoadedTarget,
    draft: Draft | None,
    prompts: Sequence[PromptIds],
    k: int,
    max_new: int,
) -> Callable[[PromptIds], int]:
    max_length = min(max(map(len, prompts)) + max_new, target.max_positions)
    engine = Engine([Route(target.forward, target.stop_ids, draft)], num_slots=1, max_length=max_length, k=k)
    params = SamplingParams(max_new_tokens=max_new)
    return lambda ids: len(engine.run([Request("0", ids, params)])[0].tokens)


@torch.inference_mode()
def _generate(reference: Any, target: LoadedTarget, ids: PromptIds, max_new: int) -> int:
    tokens_1T = torch.tensor([ids], device=target.forward.device)
    out = reference.generate(
        tokens_1T, attention_mask=torch.ones_like(tokens_1T), max_new_tokens=max_new, do_sample=False,
        eos_token_id=sorted(target.stop_ids) or None, pad_token_id=0,
    )  # fmt: skip
    return int(out.shape[1]) - len(ids)
