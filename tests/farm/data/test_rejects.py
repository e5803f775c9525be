"""Answers that are not trained on: each fault is found by its name, and ordinary text is not taken for one."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.data.rejects import LONGEST_PERIOD, LOOP_TIMES, LOOP_TOKENS, fault_of, listed, loops, repeated


@given(
    period=st.integers(1, LONGEST_PERIOD),
    before=st.integers(0, 40),
    after=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_a_loop_is_found_wherever_it_stands(period: int, before: int, after: int, seed: int) -> None:
    rng = random.Random(seed)
    stretch = rng.sample(range(1000), period)
    times = max(LOOP_TIMES, -(-LOOP_TOKENS // period))
    around = [[rng.randrange(1000, 10**6) for _ in range(num)] for num in (before, after)]
    assert loops([*around[0], *stretch * times, *around[1]])
    assert not loops([*around[0], *stretch * (times - 1), *around[1]])


def test_text_of_few_words_is_no_loop() -> None:
    rng = random.Random(0)
    assert not any(loops([rng.randrange(6) for _ in range(300)]) for _ in range(50))


@pytest.mark.parametrize(
    ("tokens", "reason", "fault"),
    [
        ([], "stop", "empty"),
        ([5, 2], "stop", "empty"),
        ([5, 6, 2], "stop", None),
        ([7] * 30, "length", "loop"),
        ([7] * 20, "length", "truncated"),
        (list(range(90)), "length", "truncated"),
        (list(range(90)), "stop", None),
    ],
)
def test_an_answer_has_its_first_fault(tokens: list[int], reason: str, fault: str | None) -> None:
    assert fault_of(tokens, reason) == fault


def test_of_equal_answers_all_but_the_first_are_repeated_across_shards_too() -> None:
    seen: set[str] = set()
    assert repeated(["a", None, "b", "a", None], seen) == [3]
    assert repeated(["c", "b", "c"], seen) == [1, 2]


def test_a_log_says_what_is_rejected_and_what_only_counted() -> None:
    faults = {"loop": 3, "truncated": 5, "duplicate": 1}
    assert listed(faults, ("loop", "duplicate")) == "3 loop, 1 duplicate; kept all the same: 5 truncated"
    assert listed({"loop": 3}, ("loop",)) == "3 loop"
    assert listed({}, ("loop",)) == ""
