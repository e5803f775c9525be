"""What a control learns from its rounds: their seconds by rows and length, and how often tokens are accepted."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from farm.decode.control import Load, RoundResult

Bucket = tuple[int, int]  # rows, rounded up to a power of two, and groups
LOOKS = 3  # measurements of a length before it counts as explored; the first may pay for allocations
# Measurements of a length of which the median counts: another process may have the core at any time.
KEPT = 15
PACE_ROUNDS = 8  # rounds by whose median the machine's present pace is told


@dataclass
class RunningMedian:
    """Of the last measurements, 0 before the first."""

    keep: int
    looks: int = 0
    value: float = 0.0
    _last: deque[float] = field(default_factory=deque)

    def add(self, measured: float) -> None:
        self.looks += 1
        self._last.append(measured)
        if len(self._last) > self.keep:
            self._last.popleft()
        self.value = statistics.median(self._last)


class Ratio:
    """A ratio of sums over the last observations. It starts at `first`, which counts as much as `weight` below."""

    def __init__(self, first: float, weight: float, memory: int) -> None:
        self._upper, self._lower, self._keep = first * weight, weight, 1 - 1 / memory

    @property
    def value(self) -> float:
        return self._upper / self._lower

    def add(self, upper: float, lower: float) -> None:
        """Adds one observation; what is `memory` observations old counts a third of it."""
        self._upper, self._lower = self._keep * self._upper + upper, self._keep * self._lower + lower


class AcceptanceByPeak:
    """Probability that a drafted token is accepted, by the largest probability of the distribution it came from.

    Until a bin has seen enough, it says what its peak says: a draft that is right about itself.
    """

    BINS, PRIOR, MEMORY = 16, 4.0, 500

    def __init__(self) -> None:
        self._bins = [Ratio((i + 0.5) / self.BINS, self.PRIOR, self.MEMORY) for i in range(self.BINS)]

    def of(self, peak: float) -> float:
        return self._bins[self._bin(peak)].value

    def add(self, peak: float, hit: float) -> None:
        self._bins[self._bin(peak)].add(hit, 1.0)

    def _bin(self, peak: float) -> int:
        return min(self.BINS - 1, int(peak * self.BINS))


class SecondsByLength:
    """Seconds of one part of a round by its length: 0 by itself, all others on one line (weighted least squares).

    A line, because what decides is the price of one token more, and the difference of two neighbouring medians is
    mostly noise. A length that was looked at less than LOOKS times stays off it: its median may be a stutter.
    """

    MOST_LOOKS = 30  # that count: what is rarely tried has its say

    def __init__(self) -> None:
        self._medians: dict[int, RunningMedian] = {}
        self._line: tuple[float, float] | None = None

    def add(self, length: int, seconds: float) -> None:
        self._medians.setdefault(length, RunningMedian(KEPT)).add(seconds)
        self._line = None

    def looks(self, length: int) -> int:
        """How often a length was measured."""
        return self._medians[length].looks if length in self._medians else 0

    @property
    def num_lengths(self) -> int:
        """Of those above 0 that were measured."""
        return sum(length > 0 for length in self._medians)

    @property
    def step(self) -> float:
        """Seconds of one more."""
        return self._fit()[1]

    def at(self, length: int) -> float:
        """Seconds at a length, tried or not; never less than at 0."""
        intercept, step = self._fit()
        plain = self._medians[0].value if 0 in self._medians else intercept
        return max(plain, intercept + step * length) if length else plain

    def _fit(self) -> tuple[float, float]:
        if self._line is None:
            lengths = [(n, m) for n, m in self._medians.items() if n]
            settled = [(n, m) for n, m in lengths if m.looks >= LOOKS]
            points = [(n, m.value, min(m.looks, self.MOST_LOOKS)) for n, m in settled or lengths]
            points = points or [(0, self._medians[0].value, 1)]
            total = sum(weight for *_, weight in points)
            mean_n = sum(weight * n for n, _, weight in points) / total
            mean_s = sum(weight * s for _, s, weight in points) / total
            spread = sum(weight * (n - mean_n) ** 2 for n, _, weight in points)
            shared = sum(weight * (n - mean_n) * (s - mean_s) for n, s, weight in points)
            step = max(0.0, shared / spread) if spread else 0.0
            self._line = mean_s - step * mean_n, step
        return self._line


@dataclass
class RoundCosts:
    """Times by bucket of rows (powers of two) and groups, and by length, at one pace of the machine.

    Others use the machine too: for minutes all rounds may take twice as long. That is told from the last rounds,
    whatever their lengths, and taken out of what each measures: so lengths that were looked at in different minutes
    stay comparable.

    Drafting is kept by the number of draft forwards; the rest (verification, sampling, bookkeeping) by the number of
    drafted tokens that were verified.

    A bucket that has not been explored reads the table of the nearest one that has: what one more token costs beside a
    round differs little between four rows and eight.
    """

    max_length: int
    _explored: set[Bucket] = field(default_factory=set)
    _pace: RunningMedian = field(default_factory=lambda: RunningMedian(PACE_ROUNDS, value=1.0))
    _draft: defaultdict[Bucket, SecondsByLength] = field(default_factory=lambda: defaultdict(SecondsByLength))
    _rest: defaultdict[Bucket, SecondsByLength] = field(default_factory=lambda: defaultdict(SecondsByLength))

    def add(self, result: RoundResult) -> None:
        """Takes note of a round's seconds."""
        bucket, length = _bucket(result.load), max(result.drafted)
        draft, rest = self._draft[bucket], self._rest[bucket]
        if rest.looks(length) and (draft.looks(result.forwards) or not result.forwards):
            self._pace.add(result.seconds / self._round(bucket, result.forwards, length))
        if result.forwards:
            draft.add(result.forwards, result.draft_s / self._pace.value)
        rest.add(length, result.rest_s / self._pace.value)

    def unexplored(self, load: Load) -> int | None:
        """A length to try next under this load, or None when enough is known."""
        rest, most = self._rest[_bucket(load)], min(self.max_length, max(load.limits))
        middle = self.max_length // 2
        # Near their end requests allow all kinds of lengths; few of them make a line.
        lengths = {n for n in (0, 1, self.max_length) if n <= most} | {min(middle, most)}
        least = min(sorted(lengths), key=rest.looks)  # in turn, so that a slow moment is not one length's
        if rest.looks(least) < LOOKS:
            return least
        self._explored.add(_bucket(load))
        return None

    def source(self, load: Load) -> Bucket:
        """The bucket whose seconds stand for this load's: its own once explored, or as long as no other is."""
        own = rows, groups = _bucket(load)
        known = [bucket for bucket in self._explored if bucket[1] == groups]
        if own in self._explored or not known:
            return own
        return min(known, key=lambda bucket: max(bucket[0], rows) / min(bucket[0], rows))

    def borrows(self, load: Load) -> bool:
        """Whether another bucket's seconds stand for this load's."""
        return self.source(load) != _bucket(load)

    def best(self, load: Load, survival: Sequence[float]) -> tuple[int, float]:
        """The fixed length of most tokens a second, and that rate, given mean survival by position."""
        tokens, best, source = float(load.num_rows), (0, self.plain(load)), self.source(load)
        for length in range(1, self.max_length + 1):
            tokens += load.num_rows * survival[length - 1]
            rate = tokens / self._round(source, length, length)
            if rate > best[1]:
                best = (length, rate)
        return best

    def plain(self, load: Load) -> float:
        """Tokens a second of plain decoding."""
        return load.num_rows / self._round(self.source(load), 0, 0)

    def draft_step(self, load: Load, index: int) -> float:
        """Seconds of one more draft forward, for position `index`."""
        draft = self._draft[self.source(load)]
        return draft.step if index else draft.at(1)

    def verify_step(self, load: Load, index: int) -> float:
        """Seconds of verifying position `index` beside those before it."""
        rest = self._rest[self.source(load)]
        return rest.step if index else max(0.0, rest.at(1) - rest.at(0))

    def break_even(self, load: Load, rate: float) -> float | None:
        """The acceptance at which one more drafted token a row just pays, where `rate` tokens a second are reached.

        None while only one length is known.
        """
        bucket = self.source(load)
        if self._rest[bucket].num_lengths < 2:
            return None
        return rate * (self._draft[bucket].step + self._rest[bucket].step) / load.num_rows

    def seconds(self, result: RoundResult) -> float:
        """What a round such as this takes, by the tables: without the luck of this one."""
        return self._round(self.source(result.load), result.forwards, max(result.drafted))

    def _round(self, bucket: Bucket, forwards: int, length: int) -> float:
        return (self._draft[bucket].at(forwards) if forwards else 0.0) + self._rest[bucket].at(length)


def _bucket(load: Load) -> Bucket:
    return 1 << (load.num_rows - 1).bit_length(), load.num_groups
