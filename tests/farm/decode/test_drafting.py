"""What a draft has yet to read, while sequences join, leave and change slots."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from farm.decode.drafting import KEPT_ROUNDS, Drafting
from farm.decode.routes import Route, Routes
from farm.decode.scheduler import Move
from farm.decode.steps import EagerSteps
from farm.layers.cache import Rows
from tests.farm.models import tiny_pair

SLOTS, CAPACITY, PADDING = 4, 400, -1.0


class Sequences:
    """Made-up hidden states: 1000 times the sequence's number and the position, whatever its slot."""

    def __init__(self) -> None:
        target, draft = tiny_pair(seed=1)
        routes = Routes()
        routes.host(Route(target, frozenset(), draft))
        self.hidden_size = target.hidden_size
        self.drafting = Drafting(
            next(iter(routes)), routes,
            num_slots=SLOTS, capacity=CAPACITY, max_drafted=3, steps=EagerSteps(),
        )  # fmt: skip
        self.live: list[list[int]] = []  # number and tokens of each slot's sequence
        self.next_number = 1

    def join(self, *prompts: int) -> None:
        """Of prompts of these lengths, as many as there is room for; each gets a first token."""
        prompts = prompts[: SLOTS - len(self.live)]
        first, widest = len(self.live), max(prompts, default=0)
        if not prompts:
            return
        rows = [[self.next_number + row, prompt] for row, prompt in enumerate(prompts)]
        hidden_BTH = self._hidden([(number, 0, prompt) for number, prompt in rows], widest)
        self.drafting.prefilled(hidden_BTH, Rows([0] * len(rows), first=first, counts=list(prompts)))
        self.live += [[number, prompt + 1] for number, prompt in rows]
        self.next_number += len(rows)

    def round(self, *kept: int) -> None:
        """Each row keeps so many of the tokens that all rows read."""
        if not self.live:
            return
        kept = (kept * SLOTS)[: len(self.live)]
        of_rows = [(number, tokens - 1, num) for (number, tokens), num in zip(self.live, kept, strict=True)]
        self.drafting.committed(self._hidden(of_rows, max(kept)), [tokens for _, tokens in self.live])
        for row, num in zip(self.live, kept, strict=True):
            row[1] += num

    def leave(self, *slots: int) -> None:
        """As Scheduler.release: the last sequences move into the slots that become free."""
        sources = list(range(len(self.live)))
        for slot in sorted({slot for slot in slots if slot < len(self.live)}, reverse=True):
            self.live[slot], sources[slot] = self.live[-1], sources[-1]
            self.live.pop()
            sources.pop()
        self.exchange(sources)

    def exchange(self, sources: list[int]) -> None:
        """Tells of sequences that are in other slots now."""
        pairs = [(source, slot) for slot, source in enumerate(sources) if source != slot]
        if pairs:
            self.drafting.move(Move(*map(tuple, zip(*pairs, strict=True)), CAPACITY))  # type: ignore[call-arg]

    def turn(self) -> None:
        """Every sequence moves on by a slot, as where groups are put side by side."""
        if self.live:
            self.live = self.live[-1:] + self.live[:-1]
            self.exchange([*range(len(self.live))][-1:] + [*range(len(self.live))][:-1])

    def _hidden(self, of_rows: list[tuple[int, int, int]], width: int) -> Tensor:
        values_BT = [
            [1000.0 * number + start + t if t < real else PADDING for t in range(width)]
            for number, start, real in of_rows
        ]
        return torch.tensor(values_BT)[..., None].expand(-1, -1, self.hidden_size)

    @property
    def kept(self) -> list[list[float]]:
        """What the draft finds for each slot's sequence."""
        return [
            self.drafting._kept(Rows([0], first=slot), tokens - 1)[0, :, 0].tolist()
            for slot, (_, tokens) in enumerate(self.live)
        ]

    @property
    def left(self) -> list[list[float]]:
        """What they left."""
        return [[1000.0 * number + t for t in range(tokens - 1)] for number, tokens in self.live]


STEPS: dict[str, Callable[[Sequences, list[int]], None]] = {
    "join": lambda all_, numbers: all_.join(*numbers),
    "plain": lambda all_, _: all_.round(1),
    "drafting": lambda all_, numbers: all_.round(*numbers),
    "leave": lambda all_, numbers: all_.leave(*(number - 1 for number in numbers)),
    "turn": lambda all_, _: all_.turn(),
}


@settings(max_examples=150)
@example([("join", [2, 3]), ("plain", [1]), ("leave", [2]), ("plain", [1])])  # the last slot: nobody moves
@example([("join", [2, 3]), ("plain", [1]), ("leave", [2]), ("join", [2]), ("plain", [1])])
@given(
    st.lists(
        st.tuples(st.sampled_from(list(STEPS)), st.lists(st.integers(1, 4), min_size=1, max_size=3)),
        max_size=30,
    )
)
def test_a_draft_finds_what_each_sequence_left_whoever_had_its_slot_before(
    steps: list[tuple[str, list[int]]],
) -> None:
    all_ = Sequences()
    for name, numbers in steps:
        STEPS[name](all_, numbers)
    assert all_.kept == all_.left


@pytest.mark.parametrize("rounds", [1, KEPT_ROUNDS - 1, KEPT_ROUNDS, 3 * KEPT_ROUNDS + 5])
def test_a_draft_that_rests_keeps_few_rounds_apart_and_loses_none(rounds: int) -> None:
    all_ = Sequences()
    all_.join(3, 5, 2)
    for _ in range(rounds):
        all_.round(1)
        assert sum(len(note.hidden) for note in all_.drafting._notes) < KEPT_ROUNDS
    assert all_.kept == all_.left
