"""What a control learns from its rounds: their seconds by rows and length, and how often tokens are accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from farm.decode.control import Load, RoundResult

Bucket = tuple[int, int]  # rows, rounded up to a power of two, and groups
LOOKS = 3  # measurements of a length before it counts as explored; the first may pay for allocations
WEIGHT = 0.1  # of a new measurement in the running mean
OUTLIER = 2.0  # measurements are cut at this multiple of the running mean: another process had the core


@dataclass
class RunningMean:
    """Of seconds; the first two measurements count by the smaller one."""

    value: float = 0.0
    looks: int = 0

    def add(self, seconds: float) -> None:
        self.looks += 1
        if self.looks <= 2:
            self.value = seconds if self.looks == 1 else min(self.value, seconds)
        else:
            self.value += WEIGHT * (min(seconds, OUTLIER * self.value) - self.value)


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


@dataclass
class RoundCosts:
    """Times by bucket of rows (powers of two) and groups, and by length; lengths never tried are interpolated.

    Drafting is kept by the number of draft forwards; the rest (verification, sampling, bookkeeping) by the number of
    drafted tokens that were verified.
    """

    max_length: int
    _draft: dict[Bucket, dict[int, RunningMean]] = field(default_factory=dict)
    _rest: dict[Bucket, dict[int, RunningMean]] = field(default_factory=dict)

    def add(self, result: RoundResult) -> None:
        """Takes note of a round's seconds."""
        bucket, width = _bucket(result.load), max(result.drafted)
        if result.forwards:
            of_draft = self._draft.setdefault(bucket, {})
            of_draft.setdefault(result.forwards, RunningMean()).add(result.draft_s)
        self._rest.setdefault(bucket, {}).setdefault(width, RunningMean()).add(result.rest_s)

    def unexplored(self, load: Load) -> int | None:
        """A length to try next under this load, or None when enough is known."""
        rest = self._rest.get(_bucket(load), {})
        for length in sorted({0, 1, min(2, self.max_length), self.max_length // 2, self.max_length}):
            if length not in rest or rest[length].looks < LOOKS:
                return length
        return None

    def best(self, load: Load, survival: Sequence[float]) -> tuple[int, float]:
        """The fixed length of most tokens a second, and that rate, given mean survival by position."""
        tokens, best = float(load.num_rows), (0, self.plain(load))
        for length in range(1, self.max_length + 1):
            tokens += load.num_rows * survival[length - 1]
            rate = tokens / self._round(load, length)
            if rate > best[1]:
                best = (length, rate)
        return best

    def plain(self, load: Load) -> float:
        """Tokens a second of plain decoding."""
        return load.num_rows / self._round(load, 0)

    def draft_step(self, load: Load, index: int) -> float:
        """Seconds of one more draft forward, for position `index`."""
        return max(0.0, self._drafting(load, index + 1) - self._drafting(load, index))

    def verify_step(self, load: Load, index: int) -> float:
        """Seconds of verifying position `index` beside those before it."""
        rest = self._rest[_bucket(load)]
        return max(0.0, _interpolate(rest, index + 1) - _interpolate(rest, index))

    def break_even(self, load: Load, rate: float) -> float | None:
        """The acceptance at which one more drafted token a row just pays, where `rate` tokens a second are reached.

        None while only one length is known.
        """
        known = [length for length in self._rest.get(_bucket(load), {}) if length]
        if len(known) < 2:
            return None
        short, long = min(known), max(known)
        step = (self._round(load, long) - self._round(load, short)) / (long - short)
        return rate * step / load.num_rows

    def _round(self, load: Load, length: int) -> float:
        return self._drafting(load, length) + _interpolate(self._rest[_bucket(load)], length)

    def _drafting(self, load: Load, forwards: int) -> float:
        if forwards == 0:
            return 0.0
        return _interpolate(self._draft[_bucket(load)], forwards)


def _interpolate(means: dict[int, RunningMean], length: int) -> float:
    """Seconds at `length`: between the nearest known lengths, beyond them in the last known direction."""
    if length in means:
        return means[length].value
    # Length 0 is no neighbour of the others: a row of one token is another kind of product.
    known = sorted(n for n in means if n > 0) or [0]
    if len(known) == 1:
        return means[known[0]].value
    above = next((n for n in known if n > length), known[-1])
    below = known[max(0, known.index(above) - 1)]
    if below == above:
        below, above = known[0], known[1]
    slope = (means[above].value - means[below].value) / (above - below)
    return max(0.0, means[below].value + slope * (length - below))


def _bucket(load: Load) -> Bucket:
    return 1 << (load.num_rows - 1).bit_length(), load.num_groups
