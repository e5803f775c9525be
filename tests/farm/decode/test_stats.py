"""tau, survival and alpha from raw counts, as the project defines them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.decode.stats import DecodeStats


def test_without_a_stop_tau_is_one_plus_the_sum_of_survivals() -> None:
    stats = DecodeStats()
    for num_accepted in (0, 3, 1, 3, 2):
        stats.count(3, num_accepted, num_accepted + 1)
    assert stats.tau == pytest.approx(1 + sum(stats.survival))
    assert stats.tau == pytest.approx((5 + 9) / 5)
    assert stats.survival == pytest.approx([4 / 5, 3 / 5, 2 / 5])
    assert stats.alpha == pytest.approx([4 / 5, 3 / 4, 2 / 3])


def test_a_round_cut_by_a_stop_counts_what_it_emitted() -> None:
    """Three accepted and a bonus, but the second accepted token ends the answer."""
    stats = DecodeStats()
    stats.count(3, 3, 2)
    assert stats.tau == 2.0
    assert stats.accepted == [1, 1, 0]
    assert stats.reached == [1, 1, 0]


def test_counts_of_requests_add_up_whatever_their_draft_length() -> None:
    total = DecodeStats()
    for drafted, accepted in ((2, 2), (4, 1)):
        one = DecodeStats()
        one.count(drafted, accepted, accepted + 1)
        total.add(one)
    assert (total.rounds, total.emitted) == (2, 5)
    assert total.accepted == [2, 1, 0, 0]
    assert total.reached == [2, 2, 0, 0]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 6))))
def test_every_round_has_one_reason_for_its_end(rounds: list[tuple[int, int, int]]) -> None:
    """A rejection is counted where a position was reached and not accepted, and nowhere else."""
    stats = DecodeStats()
    for drafted, accepted, emitted in rounds:
        accepted = min(accepted, drafted)
        stats.count(drafted, accepted, min(emitted, accepted + 1))
    assert sum(stats.ended.values()) == stats.rounds
    assert stats.ended["rejected"] == sum(stats.reached) - sum(stats.accepted)
