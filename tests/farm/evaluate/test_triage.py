"""Whether adapting pays is arithmetic: each figure of the line is checked against the tokens it speaks of."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.config import OWN_DRAFT
from farm.evaluate.triage import (
    GUESSED_RECOVERY,
    LEAST_SPEEDUP,
    Cost,
    Offer,
    Past,
    Seen,
    Tier,
    Verdict,
    count,
    decide,
    line,
    offers,
    recovery,
)

SLOW = Seen(tau=1.2, plain_s=0.010, round_s=0.015, tau_interval=(1.1, 1.3), alpha=0.2)
COST = Cost(answers_s=100, training_s=200)


def past(after: float, *, before: float = 1.0, kind: str = "full", tier: Tier = "expert") -> Past:
    return Past("t", kind, tier, before, after, 4.0, 100, 10.0, 20.0)


def test_seconds_after_the_break_even_are_those_before_it() -> None:
    (offer,) = [o for o in offers(SLOW, 4.0, COST, "full", ()) if o.tier == "expert"]
    tau = 1.2 + 0.85 * 2.8
    now_s, after_s = 0.010, 0.015 / tau  # plain decoding is faster than a draft that is refused
    assert offer.tau == pytest.approx(tau)
    assert offer.speedup == pytest.approx(now_s / after_s)
    tokens = offer.break_even
    assert tokens * now_s == pytest.approx(300 + tokens * after_s)
    assert offer.net_s(tokens) == pytest.approx(0, abs=1e-9)
    assert offer.gain_per_cost == pytest.approx(1e6 / tokens)
    wrong = 300 / (0.015 / 1.2 - after_s)  # as if a refused draft had to be used
    assert tokens > 1.2 * wrong


def test_a_prefill_costs_the_same_whatever_the_tau() -> None:
    """As a part of the round it would be divided by tau, and adapting would seem to shorten it."""
    prefilled = replace(SLOW, prefill_s=0.02)
    for whole, without in zip(
        offers(prefilled, 4.0, COST, "full", ()), offers(SLOW, 4.0, COST, "full", ()), strict=True
    ):
        assert whole.saved_s == pytest.approx(without.saved_s)
        assert whole.break_even == pytest.approx(without.break_even)
        assert whole.speedup == pytest.approx((0.02 + 0.010) / (0.02 + 0.015 / whole.tau))


def test_a_probe_that_was_kept_before_prefills_were_told_apart_is_read() -> None:
    known = {
        "target": "math", "tau": 1.2, "survival": [0.2], "alpha": 0.2, "tau_interval": [1.1, 1.3],
        "alpha_interval": None, "plain_s": 0.010, "round_s": 0.015,
    }  # fmt: skip
    assert Seen.of_probe(known) == SLOW
    assert Seen.of_probe({**known, "prefill_s": None}) == SLOW
    assert Seen.of_probe({**known, "prefill_s": 0.02}) == replace(SLOW, prefill_s=0.02)


def test_what_past_runs_won_back_replaces_the_guess() -> None:
    assert recovery("expert", "full", ()) == GUESSED_RECOVERY["expert"]
    poor = [past(1.6)] * 50  # a fifth of what was lost
    assert recovery("expert", "full", poor) == pytest.approx(0.2, abs=0.05)
    assert recovery("expert", "lora", poor) == GUESSED_RECOVERY["expert"]
    assert recovery("low-rank", "full", poor) < 0.3  # a guess beside measured targets is scaled by them
    assert recovery("low-rank", "full", poor) < recovery("full", "full", poor)
    nothing_lost = past(3.96, before=3.95)
    assert recovery("expert", "full", [nothing_lost]) == GUESSED_RECOVERY["expert"]
    assert nothing_lost.recovery is None


def test_a_tier_that_was_never_measured_is_not_preferred_to_one_that_was() -> None:
    guessed = decide("t", SLOW, 4.0, offers(SLOW, 4.0, COST, "full", ()), 1e9)
    assert guessed.decision == "full"
    assert line(guessed).endswith(OWN_DRAFT), "an onboarding refuses this tier"
    known = [past(3.55)] * 3
    tried = decide("t", SLOW, 4.0, offers(SLOW, 4.0, COST, "full", known), 1e9)
    assert tried.decision == "expert"
    assert OWN_DRAFT not in line(tried)
    both = [*known, *[past(3.9, tier="full")] * 3]
    assert decide("t", SLOW, 4.0, offers(SLOW, 4.0, COST, "full", both), 1e9).decision == "full"


@pytest.mark.parametrize(
    ("seen", "tau_base", "tokens", "reason"),
    [
        (replace(SLOW, tau=3.9), 4.0, 1e9, "would gain"),
        (replace(SLOW, tau=4.5), 4.0, 1e9, "would gain"),  # better than on the base
        (replace(SLOW, round_s=0.1), 4.0, 1e9, "would gain"),  # a draft that never beats plain decoding
        (SLOW, 4.0, 1000, "pays only after"),
        (Seen(1.2), 4.0, 1e9, "no speed"),
    ],
)
def test_skipping_has_its_reason(seen: Seen, tau_base: float, tokens: float, reason: str) -> None:
    verdict = decide("t", seen, tau_base, offers(seen, tau_base, COST, "full", ()), tokens)
    assert verdict.decision == "skip"
    assert reason in verdict.reason
    assert line(verdict).startswith("t: skip: tau ")
    assert reason in line(verdict)


def test_a_target_that_keeps_enough_is_left_as_it_is() -> None:
    made = offers(SLOW, 4.0, COST, "full", ())
    assert decide("t", SLOW, 4.0, made, 1e9, skip_above=0.31).decision == "full"
    kept = decide("t", SLOW, 4.0, made, 1e9, skip_above=0.29)
    assert kept.decision == "skip"
    assert "keeps 30% of its tau, above 29%" in kept.reason


@given(st.floats(1, 5), st.floats(1, 6), st.floats(0.001, 1), st.floats(0.001, 1), st.floats(1, 1e12))
def test_a_decision_never_costs_more_than_it_wins(
    tau: float, tau_base: float, plain_s: float, round_s: float, tokens: float
) -> None:
    seen = Seen(tau, plain_s, round_s)
    made = offers(seen, tau_base, COST, "full", ())
    verdict = decide("t", seen, tau_base, made, tokens)
    best = max(made, key=lambda offer: offer.net_s(tokens))
    if verdict.decision == "skip":
        assert best.net_s(tokens) <= 0 or best.speedup < LEAST_SPEEDUP
    else:
        assert verdict.offer.tier == verdict.decision
        assert verdict.offer.break_even < tokens
        assert verdict.offer == best
    cheap, middle, dear = made
    assert cheap.seconds < middle.seconds < dear.seconds
    assert cheap.tau <= middle.tau <= dear.tau


def test_the_line_says_what_the_verdict_holds() -> None:
    offer = Offer("expert", 3.5, 2.1, 95.0, 95 / 41_234, 3)
    text = line(Verdict("math", "expert", "", SLOW, 4.0, (offer,)))
    assert text == (
        "math: expert: tau 1.20 (1.10 to 1.30) -> 3.50 expected, 2.10 times the speed; adapting 95 s, "
        "paid after 41,000 served tokens"
    )


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(7, "7"), (1234, "1,200"), (99_900, "100,000"), (2.54e6, "2.5 million"), (3e9, "3 billion")],
)
def test_counts_have_two_digits(tokens: float, text: str) -> None:
    assert count(tokens) == text
    assert count(math.inf) == "no number of"


def test_triage_and_history_need_no_torch() -> None:
    modules = "farm.evaluate.triage, farm.evaluate.history"
    program = f"import {modules}, sys; assert not {{'torch', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
