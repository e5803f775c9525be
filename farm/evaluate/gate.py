# P prompts, R resamples
"""The promotion gate: is the adapted draft's tau above the live one's, given which prompts happened to be asked?

Paired bootstrap over prompts (Efron & Tibshirani 1993, chapter 13): both drafts answer the same prompts, a resample
draws prompts with replacement, tau is a ratio of sums over the resample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000


@dataclass(frozen=True)
class PromptCounts:
    """One draft's rounds on one prompt: tokens emitted by verification rounds, and rounds."""

    emitted: int
    rounds: int


def tau_of(counts: Sequence[PromptCounts]) -> float:
    """Ratio of sums; nan without a round."""
    rounds = sum(count.rounds for count in counts)
    return sum(count.emitted for count in counts) / rounds if rounds else float("nan")


def gain_interval(
    adapted: Sequence[PromptCounts], live: Sequence[PromptCounts], *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Two-sided percentile interval of tau_adapted - tau_live over prompts.

    Raises ValueError unless both drafts answered the same, at least two, prompts.
    """
    if len(adapted) != len(live) or len(adapted) < 2:
        raise ValueError(f"needs the same two or more prompts, got {len(adapted)} and {len(live)}")
    rng = np.random.default_rng(seed)
    chosen_RP = rng.integers(0, len(adapted), size=(RESAMPLES, len(adapted)))
    gain_R = _resampled_tau(adapted, chosen_RP) - _resampled_tau(live, chosen_RP)
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(gain_R, [tail, 1 - tail])
    return float(low), float(high)


def promotes(interval: tuple[float, float], min_gain: float) -> bool:
    """Promote only when the whole interval lies above `min_gain`."""
    return interval[0] > min_gain


def _resampled_tau(counts: Sequence[PromptCounts], chosen_RP: NDArray[np.int64]) -> NDArray[np.float64]:
    emitted_P = np.array([count.emitted for count in counts], dtype=np.float64)
    rounds_P = np.array([count.rounds for count in counts], dtype=np.float64)
    rounds_R = rounds_P[chosen_RP].sum(axis=1)
    sums_R: NDArray[np.float64] = emitted_P[chosen_RP].sum(axis=1) / np.where(rounds_R > 0, rounds_R, np.nan)
    return sums_R
