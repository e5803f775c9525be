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
LEAST_PROMPTS = 2  # for an interval


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
    if len(adapted) != len(live) or len(adapted) < LEAST_PROMPTS:
        raise ValueError(f"needs the same two or more prompts, got {len(adapted)} and {len(live)}")
    chosen_RP = _resample(len(adapted), seed)
    return _quantiles(_resampled_tau(adapted, chosen_RP) - _resampled_tau(live, chosen_RP), confidence)


def ratio_interval(
    upper: Sequence[float], lower: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Two-sided percentile interval over prompts of a ratio of sums, such as tau or alpha; counts are by prompt.

    Raises ValueError for fewer than two prompts.
    """
    if len(upper) != len(lower) or len(upper) < LEAST_PROMPTS:
        raise ValueError(f"needs two or more prompts, got {len(upper)} and {len(lower)}")
    chosen_RP = _resample(len(upper), seed)
    return _quantiles(_resampled_ratio(upper, lower, chosen_RP), confidence)


def promotes(interval: tuple[float, float], min_gain: float) -> bool:
    """Promote only when the whole interval lies above `min_gain`."""
    return interval[0] > min_gain


def _resample(num_prompts: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, num_prompts, size=(RESAMPLES, num_prompts))


def _quantiles(values_R: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(values_R, [tail, 1 - tail])
    return float(low), float(high)


def _resampled_tau(counts: Sequence[PromptCounts], chosen_RP: NDArray[np.int64]) -> NDArray[np.float64]:
    emitted, rounds = [count.emitted for count in counts], [count.rounds for count in counts]
    return _resampled_ratio(emitted, rounds, chosen_RP)


def _resampled_ratio(
    upper: Sequence[float], lower: Sequence[float], chosen_RP: NDArray[np.int64]
) -> NDArray[np.float64]:
    upper_P, lower_P = (np.array(side, dtype=np.float64) for side in (upper, lower))
    lower_R = lower_P[chosen_RP].sum(axis=1)
    ratios_R: NDArray[np.float64] = upper_P[chosen_RP].sum(axis=1) / np.where(lower_R > 0, lower_R, np.nan)
    return ratios_R
