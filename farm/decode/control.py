# B rows
"""How many tokens a round drafts: one interface, chosen for an engine.

A decision may read whole draft distributions, past rounds, their times and the load, never a drawn token nor its
probability: else what is verified would depend on what was drawn, and the output would not be the target's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from farm.config import CONTROL_PATTERN
from farm.decode.costs import AcceptanceByPeak, Ratio, RoundCosts

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
    stops at once. Here lambda stays in [0.2, 0.9], and the wanted rate is where a drafted token just pays: R dt / B,
    R the tokens a second reached lately, dt the seconds of drafting and verifying one token more.
    """

    signal: Signal = "entropy"
    GAMMA, BETA_RATE, BETA_LAMBDA, EPSILON = 0.2, 0.5, 0.9, 0.01

    def __init__(self, max_length: int, *, published: bool = False, start: float = 0.5) -> None:
        self.max_length, self.published = max_length, published
        self.threshold, self.wanted = start, 0.9
        self._rate: float | None = None
        self._costs = RoundCosts(max_length)
        self._reached: dict[int, Ratio] = {}  # tokens a second, by number of rows

    def limit(self, num_rows: int) -> int:  # noqa: ARG002
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
            self._learn(result)
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

    def _learn(self, result: RoundResult) -> None:
        _add(self._costs, result)
        num_rows, seconds = len(result.drafted), result.draft_s + result.rest_s
        tokens = sum(result.accepted) + num_rows
        reached = self._reached.setdefault(num_rows, Ratio(tokens / seconds, seconds, memory=64))
        reached.add(tokens, seconds)
        self.wanted = min(0.9, max(0.3, self._costs.break_even(num_rows, reached.value) or 0.6))


class Cost:
    """Drafts and verifies a position where it is expected to raise tokens a second (renewal reward).

    Position j pays where sum_b S_bj > R dt: S_bj the probability that row b accepts all up to j, dt the position's
    share of draft and verification, R the rate that this rule itself reaches (Dinkelbach's iteration) or that of plain
    decoding. Acceptance is looked up by the largest probability of the draft's distribution, times are those of past
    rounds. Where plain decoding is faster nothing is drafted, and a round in PROBE_EVERY looks again; as often, a
    round drafts to the end, so that acceptance stays known where the rule would stop.
    """

    signal: Signal = "peak"
    PROBE_EVERY, REST, MARGIN = 48, 192, 1.02

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self._costs = RoundCosts(max_length)
        self._by_peak = AcceptanceByPeak()
        self._by_position = [Ratio(0.6, 2.0, memory=300) for _ in range(max_length)]
        # Tokens a second of rounds that followed the rule, by number of rows.
        self._rates: dict[int, Ratio] = {}
        self._round, self._rest_until, self._num_rows = 0, 0, 1
        self._forced, self._rate = False, 0.0
        self._survival_B: list[float] = []
        self._peaks: list[list[float]] = []

    def limit(self, num_rows: int) -> int:
        self._round += 1
        self._num_rows, self._survival_B, self._peaks = num_rows, [1.0] * num_rows, []
        trial = self._costs.unexplored(num_rows)
        if trial is None and self._round % self.PROBE_EVERY == 0:
            trial = min(self.max_length, 1 + self._costs.best(num_rows, self._mean_survival())[0])
        self._forced = trial is not None
        if trial is not None:
            return trial
        return self.max_length if self._speculates(num_rows) else 0

    def _speculates(self, num_rows: int) -> bool:
        """Whether the rule beats plain decoding: by what it reached lately, or else by what a fixed length would."""
        plain = self._costs.plain(num_rows)
        if num_rows not in self._rates:
            _, fixed = self._costs.best(num_rows, self._mean_survival())
            if self._round < self._rest_until or fixed < self.MARGIN * plain:
                return False
            self._rates[num_rows] = Ratio(fixed, 8 * num_rows / fixed, memory=64)
        known = self._rates[num_rows].value
        self._rate = max(plain, known)
        if known * self.MARGIN < plain:
            del self._rates[num_rows]
            self._rest_until = self._round + self.REST
            return False
        return True

    def keep(self, index: int, signal_B: Sequence[float]) -> list[bool]:
        self._peaks.append(list(signal_B))
        pairs = zip(self._survival_B, signal_B, strict=True)
        self._survival_B = [survival * self._by_peak.of(peak) for survival, peak in pairs]
        dt = self._costs.verify_step(self._num_rows, index)
        pays = self._forced or sum(self._survival_B) > self._rate * dt
        return [pays] * len(signal_B)

    def more(self, index: int) -> bool:
        if self._forced:
            return True
        dt = self._costs.draft_step(self._num_rows, index) + self._costs.verify_step(self._num_rows, index)
        return sum(self._survival_B) * self._by_position[index].value > self._rate * dt

    def observe(self, result: RoundResult) -> None:
        _add(self._costs, result)
        num_rows = len(result.drafted)
        if result.forwards and not self._forced and num_rows in self._rates:
            tokens = sum(result.accepted) + num_rows
            self._rates[num_rows].add(tokens, result.draft_s + result.rest_s)
        for row, (drafted, accepted) in enumerate(zip(result.drafted, result.accepted, strict=True)):
            for index in range(min(drafted, accepted + 1)):
                hit = float(index < accepted)
                self._by_position[index].add(hit, 1.0)
                self._by_peak.add(self._peaks[index][row], hit)

    def _mean_survival(self) -> list[float]:
        survival, product = [], 1.0
        for ratio in self._by_position:
            product *= ratio.value
            survival.append(product)
        return survival


def _add(costs: RoundCosts, result: RoundResult) -> None:
    width = max(result.drafted)
    costs.add(len(result.drafted), result.forwards, width, result.draft_s, result.rest_s)


def make_control(name: str, max_length: int = 8) -> Control:
    """`off`, `fixed` (4 tokens), `fixed-K`, `adaedl`, `adaedl-published` or `cost`.

    Raises ValueError for others, and for a K above `max_length`.
    """
    if re.fullmatch(CONTROL_PATTERN, name) is None:
        raise ValueError(f"control {name!r} is none of off, fixed, fixed-K, adaedl, adaedl-published, cost")
    kind, _, variant = name.partition("-")
    if kind == "fixed":
        length = int(variant or min(DEFAULT_LENGTH, max_length))
        if length > max_length:
            raise ValueError(f"control {name!r}: at most {max_length} tokens can be drafted here (k)")
        return Fixed(length)
    if kind == "adaedl":
        return AdaEDL(max_length, published=variant == "published")
    return Cost(max_length) if kind == "cost" else Fixed(0)
