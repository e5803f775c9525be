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
    while scheduler.has_work:
        for prefill in scheduler.prefills():
            for row, sequence in enumerate(prefill.rows):
                slots.owner[prefill.first + row] = sequence.request.id
            slots.move(scheduler.prefilled(prefill))
        groups = ["ab".find(one.request.target) for one in scheduler.live]
        changes = sum(left != right for left, right in zip(groups, groups[1:], strict=False))
        assert changes == max(0, len(set(groups)) - 1)
        assert [one.request.id for one in scheduler.live] == slots.owner[: len(scheduler.live)]
        ended = [slot for slot in range(len(scheduler.live)) if rng.random() < 0.5]
        slots.move(scheduler.release(ended))
        assert [one.request.id for one in scheduler.live] == slots.owner[: len(scheduler.live)]


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
