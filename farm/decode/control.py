# B rows
"""How many tokens a round drafts: one interface, chosen for an engine.

A decision may read whole draft distributions, past rounds, their times and the load, never a drawn token nor its
probability: else what is verified would depend on what was drawn, and the output would not be the target's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from farm.decode.costs import RoundCosts

# What a control wants to know of a draft's distribution: nothing, its entropy in nats, or its largest probability.
Signal = Literal["none", "entropy", "peak"]
DEFAULT_LENGTH = 4


@dataclass(frozen=True)
class RoundResult:
    """What came of one round: drafted and accepted tokens by row, draft forwards, seconds of drafting and the rest."""

    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    forwards: int
    draft_s: float
    rest_s: float


class Control(Protocol):
    """Asked in this order in every round: `limit`, then for each position `keep` and `more`, at last `observe`."""

    signal: Signal

    def limit(self, num_rows: int) -> int:
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

    def __init__(self, length: int) -> None:
        self.length = length

    def limit(self, num_rows: int) -> int:  # noqa: ARG002
        return self.length

    def keep(self, index: int, signal_B: Sequence[float]) -> list[bool]:  # noqa: ARG002
        return [True] * len(signal_B)

    def more(self, index: int) -> bool:  # noqa: ARG002
        return True

    def observe(self, result: RoundResult) -> None:
        """Past rounds change nothing."""


class AdaEDL:
    """Stops a row where 1 - sqrt(gamma H) < lambda, H the entropy of the draft's distribution (AdaEDL, alg. 1).

    lambda follows the acceptance rate: up by epsilon below the wanted rate, down where not everything was accepted.
    As published, the wanted rate is 0.9, which an EAGLE draft never reaches: lambda climbs beyond 1 and every round
    stops at once. Here lambda stays in [0.2, 0.9], and the wanted rate is where a drafted token just pays for itself.
    """

    signal: Signal = "entropy"
    GAMMA, BETA_RATE, BETA_LAMBDA, EPSILON = 0.2, 0.5, 0.9, 0.01

    def __init__(self, max_length: int, *, published: bool = False, start: float = 0.5) -> None:
        self.max_length, self.published = max_length, published
        self.threshold, self.wanted = start, 0.9
        self._rate: float | None = None
        self._costs = RoundCosts(max_length)
        self._num_rows = 1

    def limit(self, num_rows: int) -> int:
        self._num_rows = num_rows
        return self.max_length

    def keep(self, index: int, signal_B: Sequence[float]) -> list[bool]:
        if index == 0:
            return [True] * len(signal_B)
        return [1 - math.sqrt(self.GAMMA * entropy) >= self.threshold for entropy in signal_B]

    def more(self, index: int) -> bool:  # noqa: ARG002
        return True

    def observe(self, result: RoundResult) -> None:
        drafted, accepted = sum(result.drafted), sum(result.accepted)
        if drafted == 0:
            return
        if not self.published:
            _add(self._costs, result)
            self.wanted = min(0.9, max(0.3, self._costs.break_even(self._num_rows) or 0.6))
        rate = self.wanted if self._rate is None else self._rate
        self._rate = self.BETA_RATE * rate + (1 - self.BETA_RATE) * accepted / drafted
        step = 0.0
        if self._rate < self.wanted:
            step = self.EPSILON
        elif accepted != self.max_length * len(result.drafted):
            step = -self.EPSILON
        self.threshold += (1 - self.BETA_LAMBDA) * step
        if not self.published:
            self.threshold = min(0.9, max(0.2, self.threshold))


class Cost:
    """Drafts and verifies a position where it is expected to raise tokens a second (renewal reward).

    Position j pays where sum_b S_bj > R dt: S_bj the probability that row b accepts all up to j, R the best rate known
    and dt the position's share of draft and verification. Acceptance is looked up by the largest probability of the
    draft's distribution, times are those of past rounds. Where no length beats plain decoding none is drafted, and a
    round in PROBE_EVERY looks again.
    """

    signal: Signal = "peak"
    PROBE_EVERY, BINS, HALF_AT = 64, 16, 4000

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self._costs = RoundCosts(max_length)
        self._reached = [2.0] * self.BINS
        self._accepted = [2.0 * (i + 0.5) / self.BINS for i in range(self.BINS)]
        self._position_reached = [2.0] * max_length
        self._position_accepted = [1.2] * max_length
        self._num_rows, self._plain_rounds = 1, 0
        self._forced, self._rate = False, 0.0
        self._survival_B: list[float] = []
        self._peaks: list[list[float]] = []

    def limit(self, num_rows: int) -> int:
        self._num_rows, self._survival_B, self._peaks = num_rows, [1.0] * num_rows, []
        trial = self._costs.unexplored(num_rows)
        self._forced = trial is not None
        if trial is not None:
            return trial
        best, self._rate = self._costs.best(num_rows, self._mean_survival())
        if best > 0:
            self._plain_rounds = 0
            return self.max_length
        self._plain_rounds += 1
        if self._plain_rounds % self.PROBE_EVERY:
            return 0
        self._forced = True
        return min(2, self.max_length)

    def keep(self, index: int, signal_B: Sequence[float]) -> list[bool]:
        self._peaks.append(list(signal_B))
        self._survival_B = [
            s * self._acceptance(peak) for s, peak in zip(self._survival_B, signal_B, strict=True)
        ]
        pays = self._forced or sum(self._survival_B) > self._rate * self._costs.verify_step(
            self._num_rows, index
        )
        return [pays] * len(signal_B)

    def more(self, index: int) -> bool:
        if self._forced:
            return True
        expected = sum(self._survival_B) * self._conditional(index)
        costs = self._costs
        dt = costs.draft_step(self._num_rows, index) + costs.verify_step(self._num_rows, index)
        return expected > self._rate * dt

    def observe(self, result: RoundResult) -> None:
        _add(self._costs, result)
        for row, (drafted, accepted) in enumerate(zip(result.drafted, result.accepted, strict=True)):
            for index in range(min(drafted, accepted + 1)):
                hit = float(index < accepted)
                self._position_reached[index] += 1
                self._position_accepted[index] += hit
                bin_ = self._bin(self._peaks[index][row])
                self._reached[bin_] += 1
                self._accepted[bin_] += hit
        for reached, accepted in (
            (self._reached, self._accepted),
            (self._position_reached, self._position_accepted),
        ):
            if sum(reached) > self.HALF_AT:  # so that a change of workload is seen
                reached[:] = [count / 2 for count in reached]
                accepted[:] = [count / 2 for count in accepted]

    def _bin(self, peak: float) -> int:
        return min(self.BINS - 1, int(peak * self.BINS))

    def _acceptance(self, peak: float) -> float:
        bin_ = self._bin(peak)
        return self._accepted[bin_] / self._reached[bin_]

    def _conditional(self, index: int) -> float:
        return self._position_accepted[index] / self._position_reached[index]

    def _mean_survival(self) -> list[float]:
        survival, product = [], 1.0
        for index in range(self.max_length):
            product *= self._conditional(index)
            survival.append(product)
        return survival


def _add(costs: RoundCosts, result: RoundResult) -> None:
    width = max(result.drafted)
    costs.add(len(result.drafted), result.forwards, width, result.draft_s, result.rest_s)


def make_control(name: str, max_length: int = 8) -> Control:
    """`off`, `fixed` (4 tokens), `fixed-K`, `adaedl`, `adaedl-published` or `cost`. Raises ValueError for others."""
    kind, _, length = name.partition("-")
    if name == "off":
        return Fixed(0)
    if kind == "fixed" and (not length or length.isdigit()):
        return Fixed(int(length) if length else DEFAULT_LENGTH)
    if kind == "adaedl" and length in ("", "published"):
        return AdaEDL(max_length, published=bool(length))
    if name == "cost":
        return Cost(max_length)
    raise ValueError(f"control {name!r} is none of off, fixed, fixed-K, adaedl, adaedl-published, cost")
