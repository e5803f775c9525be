# B rows
"""How many tokens a round drafts: one interface, chosen for an engine.

A decision may read whole draft distributions, past rounds, their times and the load, never a drawn token nor its
probability: else what is verified would depend on what was drawn, and the output would not be the target's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from farm.decode.growth import Growth

# What a control wants to know of a draft's distribution: nothing, its entropy in nats, or its largest probability.
Signal = Literal["none", "entropy", "peak"]
# Rows whose drafts are accepted alike: of one target, greedy or sampled.
Kind = tuple[str, bool]


@dataclass(frozen=True)
class Load:
    """Who decodes in a round: each row's target, the most tokens it may draft, and in how many groups all are verified.

    A row's limit is its request's own, or the engine's; 0 where its target has no draft. `sampled` says which rows are
    not greedy; none are where it is empty.
    """

    targets: tuple[str, ...]
    limits: tuple[int, ...]
    num_groups: int = 1
    sampled: tuple[bool, ...] = ()

    @property
    def num_rows(self) -> int:
        return len(self.targets)

    @functools.cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """Of each row."""
        return tuple(zip(self.targets, self.sampled or (False,) * len(self.targets), strict=True))

    @functools.cached_property
    def distinct(self) -> frozenset[Kind]:
        """Kinds that there are."""
        return frozenset(self.kinds)


@dataclass(frozen=True)
class RoundResult:
    """What came of a round: by row drafted, accepted, emitted tokens; draft forwards; seconds of drafting and the rest.

    `signals[i][b]` is what the control wanted to know of row b's distribution at position i. `catch_up_s` went on what
    the draft had not read of earlier rounds: it is no part of the round's `seconds`, which are alike in all like it.
    A row emits what it accepted and one token more, or less where a stop cut them.
    """

    load: Load
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    emitted: tuple[int, ...]
    forwards: int
    draft_s: float
    rest_s: float
    signals: Sequence[Sequence[float]] = ()
    catch_up_s: float = 0.0

    @property
    def tokens(self) -> int:
        """Committed by all rows."""
        return sum(self.emitted)

    @property
    def seconds(self) -> float:
        return self.draft_s + self.rest_s


class Control(Protocol):
    """Asked in this order in every round: `limit`, then for each position `keep` and `more`, at last `observe`.

    `observe` is left out where `observes` is false, which is read behind the round. Where `keep` and `more` decide by
    the largest probabilities alone, `growth` has the same decisions for who follows them without asking; it is read
    after `limit`. A signal of "none" says that a chain always grows to its limit.
    """

    signal: Signal

    @property
    def growth(self) -> Growth | None: ...

    @property
    def observes(self) -> bool: ...

    def limit(self, load: Load) -> int:
        """Most tokens that this round may draft; 0 decodes plainly."""
        ...

    def keep(self, index: int, signal_B: Sequence[float]) -> list[bool]:
        """Rows whose position `index` (from 0) is drafted, by the signal of its distribution."""
        ...

    def more(self, index: int) -> bool:
        """Whether the draft computes the distribution of position `index` at all."""
        ...

    def observe(self, result: RoundResult) -> None: ...


class Fixed:
    """Always the same length; 0 switches speculation off."""

    signal: Signal = "none"
    growth: Growth | None = None
    observes: bool = False

    def __init__(self, length: int) -> None:
        self.length = length

    def limit(self, load: Load) -> int:  # noqa: ARG002
        return self.length

    def keep(self, index: int, signal_B: Sequence[float]) -> list[bool]:  # noqa: ARG002
        return [True] * len(signal_B)

    def more(self, index: int) -> bool:  # noqa: ARG002
        return True

    def observe(self, result: RoundResult) -> None:
        """Past rounds change nothing."""
