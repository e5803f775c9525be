"""What the rule of farm/decode/renewal.py keeps of loads that last alike: whether they speculate, and what is tried."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from farm.decode.control import Load, RoundResult
from farm.decode.costs import Bucket, Ratio


@dataclass
class Trial:
    """Rounds of some lengths in turn, whatever the rule says, to learn what they take and bring.

    It belongs to loads that last alike, and waits while there are others. Rounds behind a change of kind do not count;
    where too many of them come, it ends with what it has.
    """

    lengths: tuple[int, ...]
    left: int
    decides: bool = False  # at its end: whether to speculate
    seconds: float = 0.0  # that it has taken, and what it has brought a row meanwhile
    tokens: float = 0.0
    wasted: int = 0

    MOST_WASTED = 12

    @property
    def length(self) -> int:
        """Of its next round."""
        return self.lengths[self.left % len(self.lengths)]

    def count(self, result: RoundResult, settled: bool) -> bool:
        """Takes note of one of its rounds; whether it was the last."""
        self.seconds += result.seconds + result.catch_up_s
        self.tokens += result.tokens / result.load.num_rows
        self.left, self.wasted = self.left - settled, self.wasted + (not settled)
        return self.left == 0 or self.wasted > self.MOST_WASTED


class Regime:
    """Of loads that last alike: whether they speculate, at what rate a row, and for how many rounds more.

    What is done is looked into after `left` rounds; `rest` and `watch` are the pauses before that, of plain decoding
    and of speculation, and grow while it is confirmed. Every look says how much more drafting brings than plain
    decoding; the mean of the last ones decides, since one alone errs by NOISE. `caught_up` is what drafts take to read
    the prompts of requests that begin, in the seconds of rounds that draft: no round has it, plain decoding needs none.
    """

    NOISE = 0.08  # standard deviation of a look, of the logarithm of a rate
    LOOKS = 8  # whose mean counts
    # Rounds that what is known of catching up counts as, when speculation begins and at most.
    CAUGHT_UP_FIRST, CAUGHT_UP_MOST = 32, 512

    def __init__(self, pause: int) -> None:
        self.speculates, self.rate, self.since = False, Ratio(1.0, 1.0, memory=1), 0
        self.caught_up = Ratio(0.0, 1.0, memory=1)
        self.left, self.rest, self.watch = pause, pause, pause
        self.gain, self._looks = 0.0, 0
        self.deep_at, self.doubted_at = (
            0,
            0,
        )  # rounds from which it drafts deep once more, and is doubted once more

    def look(self, gain: float) -> None:
        """Takes note of one look: the logarithm of drafting's rate over that of plain decoding."""
        if abs(gain - self.gain) > 3 * self.NOISE:
            self._looks = 0  # no luck any more: something has changed
        self._looks = min(self._looks + 1, self.LOOKS)
        self.gain += (gain - self.gain) / self._looks

    def begin(self, rate: float, number: int) -> None:
        """Speculates from round `number` on, at a rate that is expected."""
        self.speculates, self.since, self.rate = True, number, Ratio(rate, 4 / rate, memory=64)
        self.caught_up = Ratio(self.caught_up.value, self.CAUGHT_UP_FIRST / rate, self.CAUGHT_UP_MOST)

    def with_catching_up(self, rate: float) -> float:
        """What is left of a rate that drafting rounds have."""
        return rate / (1 + self.caught_up.value)


def gain_over(plain: float, drafting: float) -> float:
    """Logarithm of one rate over the other; no look says more than that one is eight times the other."""
    return math.log(min(max(drafting / plain, 1 / 8), 8.0))


class Stays:
    """Rounds that loads of a bucket last before there are others, on average."""

    def __init__(self) -> None:
        self._rounds, self._visits, self._last = Counter[Bucket](), Counter[Bucket](), (0, 0)

    def add(self, bucket: Bucket, rounds: int = 1) -> None:
        """Takes note of rounds behind each other."""
        self._rounds[bucket] += rounds
        if bucket != self._last:
            self._visits[bucket] += 1
            self._last = bucket

    def mean(self, bucket: Bucket) -> float:
        return self._rounds[bucket] / max(1, self._visits[bucket])


@dataclass
class Nap:
    """Rounds that the control has no part in: plain ones of a bucket, or those of one load that draft by one rule."""

    bucket: Bucket
    rounds: int
    load: Load | None = None  # that drafts; None: any of the bucket decode plainly
    slept: int = 0

    @property
    def drafts(self) -> bool:
        """Whether its rounds do."""
        return self.load is not None

    def goes_on(self, load: Load, bucket: Bucket) -> bool:
        """Whether the next round is one of them; then it is counted."""
        alike = bucket == self.bucket and (not self.drafts or load is self.load or load == self.load)
        if self.slept >= self.rounds or not alike:
            return False
        self.slept += 1
        return True
