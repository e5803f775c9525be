"""Promotion must follow from the prompts' own spread, not from a lucky mean."""

import random

import pytest

from farm.evaluate.gate import PromptCounts, gain_interval, promotes, tau_of


def counts(taus: list[float], rounds: int = 20) -> list[PromptCounts]:
    return [PromptCounts(round(tau * rounds), rounds) for tau in taus]


def test_tau_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    assert tau_of([PromptCounts(30, 10), PromptCounts(10, 10), PromptCounts(100, 100)]) == 140 / 120


def test_a_gain_on_every_prompt_is_promoted_and_a_loss_never_is() -> None:
    live = counts([1.5, 2.0, 2.5, 1.8] * 16)
    better = counts([1.9, 2.3, 3.0, 2.1] * 16)
    assert promotes(gain_interval(better, live), 0.0)
    assert not promotes(gain_interval(live, better), 0.0)
    assert not promotes(gain_interval(live, live), 0.0)
    assert not promotes(gain_interval(better, live), 1.0)


def test_prompts_are_resampled_in_pairs() -> None:
    """Prompts differ far more than drafts do: unpaired, this gain of 0.1 on every prompt would drown."""
    taus = [1.0 + 0.05 * i for i in range(64)]
    low, high = gain_interval(counts([tau + 0.1 for tau in taus]), counts(taus))
    assert low > 0.05
    assert high < 0.15


def test_false_promotions_stay_near_the_stated_rate() -> None:
    """Two drafts that differ by noise alone: of 200 gates, 2.5 % should pass; 24 would be far outside chance."""
    rng = random.Random(0)
    passed = 0
    for seed in range(200):
        left = counts([2 + rng.gauss(0, 0.4) for _ in range(64)])
        right = counts([2 + rng.gauss(0, 0.4) for _ in range(64)])
        passed += promotes(gain_interval(left, right, seed=seed), 0.0)
    assert passed < 15


def test_different_numbers_of_prompts_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="same"):
        gain_interval(counts([1.0, 2.0]), counts([1.0]))
