"""Answers that are not trained on, by the name of their fault; of equal ones the first stays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from typing import Final

import numpy as np

from farm.sections import Fault

LONGEST_PERIOD: Final = 32
LOOP_TIMES, LOOP_TOKENS = 4, 24  # a stretch of so many periods, and of so many tokens, is a loop
SHORTEST: Final = 3  # answer tokens that have a drafted one, and a true hidden state after it


def trainable(num_answer_tokens: int) -> bool:
    """Whether an answer has a token that is drafted, and the true hidden state after it."""
    return num_answer_tokens >= SHORTEST


def fault_of(answer_ids: Sequence[int], finish_reason: str) -> Fault | None:
    """The first fault of one answer by itself: too short to train on, repeating itself, cut by the length limit."""
    if not trainable(len(answer_ids)):
        return "empty"
    if loops(answer_ids):
        return "loop"
    return "truncated" if finish_reason == "length" else None


def loops(tokens: Sequence[int]) -> bool:
    """Whether some stretch repeats a period of at most LONGEST_PERIOD tokens, LOOP_TIMES or more."""
    ids = np.asarray(tokens)
    for period in range(1, min(LONGEST_PERIOD, len(ids) // LOOP_TIMES) + 1):
        repeated = max(LOOP_TIMES * period, LOOP_TOKENS) - period
        if _longest_run(ids[period:] == ids[:-period]) >= repeated:
            return True
    return False


def _longest_run(true_N: np.ndarray) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], true_N.astype(np.int8), [0]))))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def digest_of(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> str:
    """16 hex digits that equal answers to equal prompts share."""
    text = json.dumps([list(prompt_ids), list(answer_ids)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def repeated(digests: Sequence[str | None], seen: set[str]) -> list[int]:
    """Indices of the digests that were seen, here or before; all are seen from now on. None equals nothing."""
    found = []
    for index, digest in enumerate(digests):
        if digest is not None and digest in seen:
            found.append(index)
        elif digest is not None:
            seen.add(digest)
    return found


def listed(faults: dict[str, int], reject: Collection[str]) -> str:
    """For a log: `3 loop, 1 duplicate; kept all the same: 5 truncated`; empty where there are none."""
    rejected = ", ".join(f"{count} {name}" for name, count in faults.items() if name in reject)
    kept = ", ".join(f"{count} {name}" for name, count in faults.items() if name not in reject)
    return "; ".join(filter(None, (rejected, kept and f"kept all the same: {kept}")))
