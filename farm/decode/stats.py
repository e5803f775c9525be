"""Acceptance statistics as raw counts; every ratio is taken over sums, never over ratios."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

# Nothing was drafted; the request ended before a drafted token could fail; a token was rejected; all were accepted.
RoundEnd = Literal["undrafted", "stopped", "rejected", "accepted"]
ROUND_ENDS: tuple[RoundEnd, ...] = get_args(RoundEnd)


@dataclass
class DecodeStats:
    """Counts of verification rounds; they add up over requests.

    A round is one target forward after the prefill. `emitted` counts the tokens it committed, cut at a stop;
    `reached[i]` and `accepted[i]` count drafted position i before the cut; `ended` counts why a round gave no more.
    """

    rounds: int = 0
    emitted: int = 0
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    ended: dict[RoundEnd, int] = field(default_factory=lambda: dict.fromkeys(ROUND_ENDS, 0))

    def count(self, num_drafted: int, num_accepted: int, num_emitted: int) -> None:
        """Adds one round; tokens cut off by a stop count as not reached."""
        self._widen(num_drafted)
        self.rounds += 1
        self.emitted += num_emitted
        self.ended[_end(num_drafted, num_accepted, num_emitted)] += 1
        for i in range(min(num_accepted, num_emitted)):
            self.reached[i] += 1
            self.accepted[i] += 1
        if num_accepted < min(num_drafted, num_emitted):
            self.reached[num_accepted] += 1

    def add(self, other: DecodeStats) -> None:
        self._widen(len(other.reached))
        self.rounds += other.rounds
        self.emitted += other.emitted
        for reason, count in other.ended.items():
            self.ended[reason] += count
        for i, (reached, accepted) in enumerate(zip(other.reached, other.accepted, strict=True)):
            self.reached[i] += reached
            self.accepted[i] += accepted

    @property
    def tau(self) -> float:
        """Emitted tokens a round; the prefill's own token is left out. nan before the first round."""
        return self.emitted / self.rounds if self.rounds else float("nan")

    @property
    def survival(self) -> list[float]:
        """Share of rounds in which drafted position i was reached and accepted."""
        return [count / self.rounds if self.rounds else float("nan") for count in self.accepted]

    @property
    def alpha(self) -> list[float]:
        """Acceptance probability of drafted position i given that it was reached; nan where never reached."""
        pairs = zip(self.accepted, self.reached, strict=True)
        return [accepted / reached if reached else float("nan") for accepted, reached in pairs]

    def _widen(self, num_drafted: int) -> None:
        while len(self.reached) < num_drafted:
            self.reached.append(0)
            self.accepted.append(0)


def _end(num_drafted: int, num_accepted: int, num_emitted: int) -> RoundEnd:
    if num_drafted == 0:
        return "undrafted"
    if num_emitted <= num_accepted:
        return "stopped"
    return "rejected" if num_accepted < num_drafted else "accepted"
