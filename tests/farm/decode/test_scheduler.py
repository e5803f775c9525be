"""The scheduler without an engine: slots of one group stay side by side, and moves say exactly what moved."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from farm.decode.sampling import SamplingParams
from farm.decode.scheduler import Move, Request, Scheduler


class Slots:
    """What lies in each slot's memory, moved as a runner moves it."""

    def __init__(self, num_slots: int) -> None:
        self.owner: list[str | None] = [None] * num_slots

    def move(self, move: Move | None) -> None:
        if move is not None:
            moved = [self.owner[source] for source in move.sources]
            for destination, owner in zip(move.destinations, moved, strict=True):
                self.owner[destination] = owner


@given(
    targets=st.lists(st.sampled_from("aabcd"), max_size=20),
    num_slots=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_rows_of_a_group_are_neighbours_and_lie_where_the_scheduler_says(
    targets: list[str], num_slots: int, seed: int
) -> None:
    rng, slots = random.Random(seed), Slots(num_slots)
    limits = {"num_slots": num_slots, "max_length": 50, "prefill_tokens": 6}
    scheduler = Scheduler(lambda target: frozenset(), lambda target: "ab".find(target), **limits)
    for index, target in enumerate(targets):
        prompt = (1,) * rng.choice([2, 3, 9])
        scheduler.add(Request(str(index), prompt, SamplingParams(max_new_tokens=5), target))
    read = list[str]()
    while scheduler.has_work:
        for prefill in scheduler.prefills():
            for row, sequence in enumerate(prefill.rows):
                slots.owner[prefill.first + row] = sequence.request.id
            assert prefill.ends[0] > prefill.start
            read += [row.request.id for row in prefill.rows if prefill.completes]
            slots.move(scheduler.prefilled(prefill))
            if rng.random() < 0.2 and scheduler.live:  # one ends with its first token
                slots.move(scheduler.release([rng.randrange(len(scheduler.live))]))
        groups = ["ab".find(one.request.target) for one in scheduler.live]
        changes = sum(left != right for left, right in zip(groups, groups[1:], strict=False))
        assert changes == max(0, len(set(groups)) - 1)
        assert [one.request.id for one in scheduler.live] == slots.owner[: len(scheduler.live)]
        ended = [slot for slot in range(len(scheduler.live)) if rng.random() < rng.choice([0.1, 0.5])]
        slots.move(scheduler.release(ended, behind_round=True))
        if rng.random() < 0.2 and scheduler.live:
            gone = rng.choice(scheduler.live).request.id
            slots.move(scheduler.cancel(gone))
            read.append(gone)  # whether it was or not
        owners = zip(scheduler.live, slots.owner, strict=False)
        assert all(one.request.id == owner for one, owner in owners if one.request.id in read)
    assert set(read) == set(map(str, range(len(targets))))


def full(num_requests: int) -> Scheduler:
    """Three slots at work, and the rest of so many requests waiting."""
    scheduler = Scheduler(lambda t: frozenset(), lambda t: t, num_slots=3, max_length=50, prefill_tokens=6)
    for index in range(num_requests):
        scheduler.add(Request(str(index), (1, 2), SamplingParams(), "a"))
    for prefill in scheduler.prefills():
        scheduler.prefilled(prefill)
    return scheduler


def test_the_next_request_takes_the_slot_of_the_one_that_ended_and_nobody_moves() -> None:
    """Moving the last sequence there copies all that it has in the cache: for every request, where requests wait."""
    scheduler = full(5)
    assert scheduler.release([0], behind_round=True) is None
    assert [one.request.id for one in scheduler.live] == ["3", "1", "2"]
    (prefill,) = scheduler.prefills()
    assert (prefill.first, prefill.rows, prefill.ends) == (0, (scheduler.live[0],), (2,))
    assert scheduler.prefilled(prefill) is None
    assert list(scheduler.prefills()) == []


def test_requests_that_end_together_are_followed_by_one_reading() -> None:
    scheduler = full(6)
    assert scheduler.release([0, 1], behind_round=True) == Move((2,), (0,), 2)
    prefill = next(scheduler.prefills())
    assert [row.request.id for row in prefill.rows] == ["3", "4"]


def test_a_long_prompt_does_not_begin_with_what_a_short_one_has_left_of_a_step() -> None:
    """Its first chunk would be a token, and no slot is taken over while it is worked off."""
    scheduler = full(4)
    scheduler.add(Request("long", (1,) * 20, SamplingParams(), "a"))
    assert scheduler.release([0], behind_round=True) is None
    assert scheduler.release([1]) is not None
    chunks = []
    for _ in range(2):
        for prefill in scheduler.prefills():
            chunks.append(
                [
                    (row.request.id, end - prefill.start)
                    for row, end in zip(prefill.rows, prefill.ends, strict=True)
                ]
            )
            scheduler.prefilled(prefill)
    assert chunks == [[("3", 2)], [("long", 6)]]


def test_a_join_moves_one_row_of_each_later_group_at_the_most() -> None:
    scheduler = Scheduler(lambda t: frozenset(), lambda t: t, num_slots=10, max_length=50, prefill_tokens=512)
    for index, target in enumerate("aaabbbccc"):
        scheduler.add(Request(str(index), (1, 2), SamplingParams(), target))
    for prefill in scheduler.prefills():
        assert scheduler.prefilled(prefill) is None
    scheduler.add(Request("new", (1, 2), SamplingParams(), "a"))
    (prefill,) = scheduler.prefills()
    move = scheduler.prefilled(prefill)
    assert move is not None
    assert len(move.sources) == 3  # the new row, one of b, one of c
