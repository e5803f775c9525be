"""AdaEDL: stop drafting where the draft's entropy says that the next token will be rejected (arXiv 2410.18351)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from farm.decode.control import Kind, Load, RoundResult, Signal
from farm.decode.costs import Ratio, RoundCosts
from farm.decode.growth import Growth


@dataclass
class Threshold:
    """lambda of one kind of rows, and the acceptance rate that it follows (None before the first round)."""

    value: float
    rate: float | None = None


class AdaEDL:
    """Stops a row where 1 - sqrt(gamma H) < lambda, H the entropy of the draft's distribution (AdaEDL, alg. 1).

    A kind's lambda follows its acceptance rate: up by epsilon below the wanted rate, down where not everything was
    accepted. As published, the wanted rate is 0.9, which an EAGLE draft never reaches: lambda climbs beyond 1 and every
    round stops at once. Here lambda stays in [0.2, 0.9], and the wanted rate is where a drafted token just pays:
    R dt / B, R the tokens a second reached lately, dt the seconds of drafting and verifying one token more.
    """

    signal: Signal = "entropy"
    growth: Growth | None = None
    observes: bool = True
    GAMMA, BETA_RATE, BETA_LAMBDA, EPSILON = 0.2, 0.5, 0.9, 0.01

    def __init__(self, max_length: int, *, published: bool = False, start: float = 0.5) -> None:
        self.max_length, self.published = max_length, published
        self.wanted = 0.9
        self.thresholds: defaultdict[Kind, Threshold] = defaultdict(lambda: Threshold(start))
        self._costs = RoundCosts(max_length)
        self._reached: dict[tuple[int, int], Ratio] = {}  # tokens a second, by rows and groups
        self._kinds: tuple[Kind, ...] = ()

    def limit(self, load: Load) -> int:
        self._kinds = load.kinds
        return self.max_length

    def keep(self, index: int, signal_B: Sequence[float]) -> list[bool]:
        if index == 0:
            return [True] * len(signal_B)
        pairs = zip(self._kinds, signal_B, strict=True)
        return [1 - math.sqrt(self.GAMMA * h) >= self.thresholds[kind].value for kind, h in pairs]

    def more(self, index: int) -> bool:  # noqa: ARG002
        return True

    def observe(self, result: RoundResult) -> None:
        if not self.published and result.forwards:
            self._learn(result)
        for kind in set(result.load.kinds):
            rows = [row for row, one in enumerate(result.load.kinds) if one == kind]
            drafted, accepted = map(sum, zip(*(_before_stop(result, row) for row in rows), strict=True))
            if drafted:
                self._follow(
                    self.thresholds[kind], accepted / drafted, accepted == self.max_length * len(rows)
                )

    def _follow(self, threshold: Threshold, accepted: float, everything: bool) -> None:
        rate = self.wanted if threshold.rate is None else threshold.rate
        threshold.rate = self.BETA_RATE * rate + (1 - self.BETA_RATE) * accepted
        step = 0.0
        if threshold.rate < self.wanted:
            step = self.EPSILON
        elif not everything:
            step = -self.EPSILON
        threshold.value += (1 - self.BETA_LAMBDA) * step
        if not self.published:
            threshold.value = min(0.9, max(0.2, threshold.value))

    def _learn(self, result: RoundResult) -> None:
        """Aims at the acceptance where one more token pays at the rate that is reached."""
        load = result.load
        self._costs.add(result)
        key, seconds = (load.num_rows, load.num_groups), self._costs.seconds(result)
        reached = self._reached.setdefault(key, Ratio(result.tokens / seconds, seconds, memory=64))
        reached.add(result.tokens, seconds)
        self.wanted = min(0.9, max(0.3, self._costs.break_even(load, reached.value) or 0.6))


def _before_stop(result: RoundResult, row: int) -> tuple[int, int]:
    """Tokens that a row drafted and accepted; where a stop cut them, nothing is known of what lies behind it."""
    drafted, accepted, emitted = result.drafted[row], result.accepted[row], result.emitted[row]
    return (drafted, accepted) if emitted > accepted else (emitted, emitted)
