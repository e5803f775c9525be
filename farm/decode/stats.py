"""Acceptance statistics as raw counts; every ratio is taken over sums, never over ratios."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

# Nothing was drafted; the request ended before a drafted token could fail; a token was rejected; all were accepted.
RoundEnd = Literal["undrafted", "stopped", "rejected", "accepted"]
ROUND_ENDS: tuple[RoundEnd, ...] = get_args(RoundEnd)


class Outcome(NamedTuple):
    """Of one row in one round: tokens drafted and accepted of it, and tokens committed, cut at a stop."""

    drafted: int
    accepted: int
    emitted: int

    @property
    def end(self) -> RoundEnd:
        """Why the round gave no more."""
        if self.drafted == 0:
            return "undrafted"
        if self.emitted <= self.accepted:
            return "stopped"
        return "rejected" if self.accepted < self.drafted else "accepted"

    @property
    def num_accepted(self) -> int:
        """Positions that were accepted before the cut."""
        return min(self.accepted, self.emitted)

    @property
    def num_reached(self) -> int:
        """Positions that were verified before the cut: tokens cut off by a stop count as not reached."""
        return self.num_accepted + (self.accepted < min(self.drafted, self.emitted))


@dataclass
class DecodeStats:
    """How often verification rounds had which outcome; they add up over requests.

    A round is one target forward after the prefill. A count a row and round is all that is done while decoding: what
    the counts say by position is worked out where it is read.
    """

    outcomes: Counter[tuple[int, int, int]] = field(default_factory=Counter)

    def count(self, num_drafted: int, num_accepted: int, num_emitted: int) -> None:
        """Adds one round."""
        self.outcomes[num_drafted, num_accepted, num_emitted] += 1

    def add(self, other: DecodeStats) -> None:
        self.outcomes.update(other.outcomes)

    @property
    def rounds(self) -> int:
        return self.outcomes.total()

    @property
    def emitted(self) -> int:
        """Tokens that all rounds committed."""
        return sum(count * outcome.emitted for outcome, count in self._counted())

    @property
    def reached(self) -> list[int]:
        """Rounds in which drafted position i was verified, before the cut."""
        return self._by_position((outcome.num_reached, count) for outcome, count in self._counted())

    @property
    def accepted(self) -> list[int]:
        """Rounds in which drafted position i was accepted, before the cut."""
        return self._by_position((outcome.num_accepted, count) for outcome, count in self._counted())

    @property
    def ended(self) -> dict[RoundEnd, int]:
        """Rounds by why they gave no more."""
        ends = dict.fromkeys(ROUND_ENDS, 0)
        for outcome, count in self._counted():
            ends[outcome.end] += count
        return ends

    @property
    def tau(self) -> float:
        """Emitted tokens a round; the prefill's own token is left out. nan before the first round."""
        return self.emitted / self.rounds if self.rounds else float("nan")

    @property
    def survival(self) -> list[float]:
        """Share of rounds in which drafted position i was reached and accepted."""
        rounds = self.rounds
        return [count / rounds if rounds else float("nan") for count in self.accepted]

    @property
    def alpha(self) -> list[float]:
        """Acceptance probability of drafted position i given that it was reached; nan where never reached."""
        pairs = zip(self.accepted, self.reached, strict=True)
        return [accepted / reached if reached else float("nan") for accepted, reached in pairs]

    def _counted(self) -> Iterable[tuple[Outcome, int]]:
        return ((Outcome(*outcome), count) for outcome, count in self.outcomes.items())

    def _by_position(self, lengths: Iterable[tuple[int, int]]) -> list[int]:
        """From how many positions rounds had, and how many rounds, to rounds by position."""
        positions = [0] * max((drafted for drafted, _, _ in self.outcomes), default=0)
        for length, count in lengths:
            for i in range(length):
                positions[i] += count
        return positions
