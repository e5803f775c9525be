# N runs, R requests
"""The canary's test keeps its promise while it is looked at all the time, and finds what it is there to find."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.canary import WorseTest, takes

ALPHA, K = 0.05, 4
ROUNDS = 12  # of a request


def taus(generator: np.random.Generator, shape: tuple[int, int], alpha: float) -> np.ndarray:
    """Emitted tokens of a request's `ROUNDS` rounds: every request has its own difficulty, its rounds share it."""
    own = np.clip(generator.normal(alpha, 0.12, (*shape, 1)), 0.02, 0.98)
    hits = generator.random((*shape, ROUNDS, K)) < own[..., None]
    return (1 + np.cumprod(hits, axis=-1).sum(axis=-1)).sum(axis=-1)


def peeking_z_test(is_canary_R: np.ndarray, emitted_R: np.ndarray) -> np.ndarray:
    """One-sided z of the difference of means after every request: a fixed-n test that is looked at repeatedly."""
    tau_R = emitted_R / ROUNDS
    z_R = np.zeros(len(tau_R))
    sums = {}
    for arm in (True, False):
        of_arm = is_canary_R == arm
        count = np.maximum(np.cumsum(of_arm), 1)
        mean = np.cumsum(tau_R * of_arm) / count
        sums[arm] = count, mean, np.cumsum(tau_R**2 * of_arm) / count - mean**2
    (n_c, mean_c, var_c), (n_l, mean_l, var_l) = sums[True], sums[False]
    error = np.sqrt(np.maximum(var_c, 1e-9) / n_c + np.maximum(var_l, 1e-9) / n_l)
    z_R = (mean_l - mean_c) / error
    z_R[(n_c < 10) | (n_l < 10)] = 0.0
    return z_R


def first_alarm(is_canary_R: np.ndarray, emitted_R: np.ndarray, share: float, margin: float) -> float:
    """Requests until the canary is called worse; inf if it never is."""
    test = WorseTest(share, K, margin, ALPHA)
    for number, (is_canary, emitted) in enumerate(zip(is_canary_R, emitted_R, strict=True), 1):
        test.add(is_canary=bool(is_canary), emitted=int(emitted), rounds=ROUNDS)
        if test.is_worse:
            return number
    return math.inf


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_an_equal_canary_is_rarely_rolled_back_however_often_one_looks(share):
    """The hardest equal case: no margin. Bound: alpha plus 3 standard errors of 300 runs."""
    generator, num_runs = np.random.default_rng(1), 300
    emitted_NR = taus(generator, (num_runs, 1500), 0.6)
    is_canary_NR = generator.random(emitted_NR.shape) < share
    runs = list(zip(is_canary_NR, emitted_NR, strict=True))
    bound = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / num_runs)
    false = sum(first_alarm(*run, share, margin=0.0) < math.inf for run in runs) / num_runs
    peeking = sum(bool((peeking_z_test(*run) > 1.645).any()) for run in runs) / num_runs
    assert false <= bound
    assert peeking > bound  # the test of this test: what peeks breaks the same promise


def test_traffic_that_changes_over_time_does_not_roll_an_equal_canary_back():
    """Both versions lose half of their acceptance during the run: order within a block must not matter."""
    generator, num_runs = np.random.default_rng(2), 100
    easy, hard = (taus(generator, (num_runs, 1000), alpha) for alpha in (0.8, 0.3))
    is_hard_NR = generator.random(easy.shape) < np.linspace(0, 1, 1000)
    emitted_NR = np.where(is_hard_NR, hard, easy)
    is_canary_NR = generator.random(easy.shape) < 0.1
    false = [first_alarm(*run, 0.1, 0.0) < math.inf for run in zip(is_canary_NR, emitted_NR, strict=True)]
    assert sum(false) / num_runs <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / num_runs)


@pytest.mark.parametrize(("share", "within"), [(0.1, 1500), (0.5, 600)])
def test_a_canary_that_is_a_fifth_worse_is_found_within_so_many_requests(share, within):
    """Seen here at margin 0.05 and k = 4: 95 % within 1,041 requests at a share of 0.1, within 370 at 0.5."""
    generator, num_runs = np.random.default_rng(3), 100
    live, worse = (taus(generator, (num_runs, within), alpha) for alpha in (0.70, 0.572))
    assert worse.mean() / live.mean() == pytest.approx(0.8, abs=0.02)
    is_canary_NR = generator.random(live.shape) < share
    emitted_NR = np.where(is_canary_NR, worse, live)
    found = [first_alarm(*run, share, 0.05) for run in zip(is_canary_NR, emitted_NR, strict=True)]
    assert np.mean(np.isfinite(found)) >= 0.95


def test_a_canary_within_the_margin_stays():
    generator = np.random.default_rng(4)
    live, slightly = (taus(generator, (50, 2000), alpha) for alpha in (0.70, 0.69))
    is_canary_NR = generator.random(live.shape) < 0.5
    emitted_NR = np.where(is_canary_NR, slightly, live)
    found = [first_alarm(*run, 0.5, 0.05) for run in zip(is_canary_NR, emitted_NR, strict=True)]
    assert not np.isfinite(found).any()


rows = st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.floats(1, K + 1)), max_size=200)


@given(rows=rows, share=st.floats(0.01, 0.99), margin=st.floats(0, 0.5))
def test_evidence_is_never_negative_nor_lost(rows, share, margin):
    test, before = WorseTest(share, K, margin, ALPHA), 1.0
    for is_canary, rounds, tau in rows:
        test.add(is_canary=is_canary, emitted=round(tau * rounds), rounds=rounds)
        assert test.e_value >= before
        before = test.e_value
    assert min(test._capitals) > 0
    assert test.live.requests + test.canary.requests == sum(rounds > 0 for _, rounds, _ in rows)


@given(value=st.sampled_from([0.0, 0.3, 1.0]))
def test_capital_is_the_product_of_the_bets_on_each_block(value):
    """Against the formula in fp64: two blocks of two requests at k = 4."""
    test = WorseTest(0.5, K, 0.05, ALPHA)
    for _ in range(2):
        test.add(is_canary=False, emitted=8, rounds=2)
        test.add(is_canary=True, emitted=2 + round(8 * value), rounds=2)
    lost = 0.95 * 4 - (2 + round(8 * value)) / 2
    bets = np.array([1 / 16, 1 / 8, 1 / 4, 1 / 2, 0.9]) / (K + 0.05)
    assert test.e_value == pytest.approx(
        max(1.0, *((1 + bets * lost) ** n @ np.full(5, 0.2) for n in (1, 2)))
    )


def test_the_share_of_requests_is_met_and_an_id_is_always_answered_alike():
    ids = [f"chatcmpl-{number}" for number in range(20_000)]
    for share in (0.05, 0.5):
        taken = [takes("legal@v2", share, one) for one in ids]
        assert np.mean(taken) == pytest.approx(share, abs=0.01)
        assert taken == [takes("legal@v2", share, one) for one in ids]
    second = [takes("legal@v3", 0.5, one) for one in ids]
    assert np.mean(np.array(second) & np.array(taken)) == pytest.approx(0.25, abs=0.01)
