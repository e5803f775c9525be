"""What a control learns of its rounds: their seconds by rows and length."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Sequence

from farm.decode.control import Load, RoundResult

Bucket = tuple[int, int]  # rows, rounded up to a power of two, and groups
LOOKS = 3  # measurements of a length before it counts as explored
# Measurements of a length of which the median counts: another process may have the core at any time.
KEPT = 15
PACE_ROUNDS = 8  # rounds by whose median the machine's present pace is told
PLAIN_ROUNDS = 16  # plain rounds of which the median counts: they come without end where nothing is drafted
# A pace nearer to 1 is mostly noise: taken out of what is measured, it would let the tables drift apart by lengths.
LEAST_PACE = 1.15
SELDOM = 4  # once a length is well known, one round in so many is measured: measuring costs time too


class RunningMedian:
    """Of the last `keep` measurements, `first` before the first."""

    def __init__(self, keep: int, first: float = 0.0) -> None:
        self.looks, self._last, self._value = 0, deque[float](maxlen=keep), first
        self._stale = False

    def add(self, measured: float) -> None:
        self.looks += 1
        self._last.append(measured)
        self._stale = True

    def clear(self) -> None:
        """Drops the measurements; their median stays until there are others."""
        self._value = self.value
        self._last.clear()

    @property
    def value(self) -> float:
        if self._stale and self._last:
            self._value, self._stale = statistics.median(self._last), False
        return self._value


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


class SecondsByLength:
    """Seconds of one part of a round that drafts, by its length, on one line (weighted least squares).

    A line, because what decides is the price of one token more, and the difference of two neighbouring medians is
    mostly noise. A length that was looked at less than LOOKS times stays off it: its median may be a stutter.
    """

    MOST_LOOKS = 30  # that count: what is rarely tried has its say
    FIT_EVERY = 8  # measurements of lengths that are known: one more hardly moves the line

    def __init__(self) -> None:
        self._medians: dict[int, RunningMedian] = {}
        self._line: tuple[float, float] | None = None
        self._unfitted = 0

    def add(self, length: int, seconds: float) -> None:
        median = self._medians.setdefault(length, RunningMedian(KEPT))
        median.add(seconds)
        self._unfitted += 1
        if median.looks <= LOOKS or self._unfitted >= self.FIT_EVERY:
            self._line, self._unfitted = None, 0

    def looks(self, length: int) -> int:
        """How often a length was measured."""
        return self._medians[length].looks if length in self._medians else 0

    @property
    def num_lengths(self) -> int:
        """That were measured."""
        return len(self._medians)

    @property
    def step(self) -> float:
        """Seconds of one more."""
        return self.line[1]

    @property
    def line(self) -> tuple[float, float]:
        """Seconds of none, and of one more: at lengths that were tried and at others."""
        if self._line is None:
            every = list(self._medians.items())
            settled = [(n, m) for n, m in every if m.looks >= LOOKS]
            points = [(n, m.value, min(m.looks, self.MOST_LOOKS)) for n, m in settled or every]
            points = points or [(0, 0.0, 1)]
            total = sum(weight for *_, weight in points)
            mean_n = sum(weight * n for n, _, weight in points) / total
            mean_s = sum(weight * s for _, s, weight in points) / total
            spread = sum(weight * (n - mean_n) ** 2 for n, _, weight in points)
            shared = sum(weight * (n - mean_n) * (s - mean_s) for n, s, weight in points)
            step = max(0.0, shared / spread) if spread else 0.0
            self._line = mean_s - step * mean_n, step
        return self._line


class RoundCosts:
    """Seconds of rounds by bucket of rows (powers of two) and groups, and by length.

    Rounds that draft and plain ones are kept apart, each as they are among their like: what has just run lies in a
    cache, so a plain round between two that draft takes longer than one behind another, and the other way round. Others
    use the machine too: for minutes all rounds may take twice as long. Of rounds that draft that pace is told from the
    last ones, whatever their lengths, and taken out of what each measures, so that lengths looked at in different
    minutes stay comparable; of plain rounds the last few count.

    Drafting is kept by the number of draft forwards; the rest (verification, sampling, bookkeeping) by the number of
    drafted tokens that were verified. All is kept as of a full bucket: a row fewer reads that many tokens less, each of
    which takes what one more drafted token a row takes, divided by the rows. So five rows and eight compare.

    A bucket that has not been explored goes by the table of the nearest one that has, less the tokens not read.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self._explored: set[Bucket] = set()
        self._pace: defaultdict[Bucket, RunningMedian] = defaultdict(lambda: RunningMedian(PACE_ROUNDS, 1.0))
        self._plain: defaultdict[Bucket, RunningMedian] = defaultdict(lambda: RunningMedian(PLAIN_ROUNDS))
        self._draft: defaultdict[Bucket, SecondsByLength] = defaultdict(SecondsByLength)
        self._rest: defaultdict[Bucket, SecondsByLength] = defaultdict(SecondsByLength)

    def add(self, result: RoundResult) -> None:
        """Takes note of a round's seconds."""
        bucket = bucket_of(result.load)
        draft, rest, pace = self._draft[bucket], self._rest[bucket], self._pace[bucket]
        # A plain token has no price of its own: what drafting pays for one stands for it.
        missing = (1 - result.load.num_rows / bucket[0]) * rest.step
        if not result.forwards:
            self._plain[bucket].add(result.seconds + missing * pace.value)
            return
        length = max(result.drafted)
        looks = min(rest.looks(length), draft.looks(result.forwards))
        if looks >= LOOKS:
            base, forward, token = self._drafting(bucket, result.load)
            pace.add(result.seconds / (base + result.forwards * forward + length * token))
        if looks < KEPT or pace.looks % SELDOM == 0:
            slow = pace.value if not 1 / LEAST_PACE < pace.value < LEAST_PACE else 1.0
            draft.add(result.forwards, result.draft_s / slow)
            rest.add(length, result.rest_s / slow + missing * (1 + length))

    def unexplored(self, load: Load) -> tuple[int, ...]:
        """Lengths to try in turn, so that a slow moment is not one length's, and then 0; () when all is known.

        Plain decoding comes last, next to rounds that it is compared with.
        """
        bucket = bucket_of(load)
        rest, most = self._rest[bucket], min(self.max_length, max(load.limits))
        # Near their end requests allow all kinds of lengths; few of them make a line.
        lengths = {n for n in (1, self.max_length) if n <= most} | {min(self.max_length // 2, most)}
        drafting = tuple(n for n in sorted(lengths) if n and rest.looks(n) < LOOKS)
        if drafting or self._plain[bucket].looks < LOOKS:
            return drafting or (0,)
        self._explored.add(bucket)
        return ()

    def source(self, load: Load) -> Bucket:
        """The bucket whose seconds stand for this load's: its own once explored, or as long as no other is."""
        own = rows, groups = bucket_of(load)
        if own in self._explored:
            return own
        known = [bucket for bucket in self._explored if bucket[1] == groups]
        if not known:
            return own
        return min(known, key=lambda bucket: max(bucket[0], rows) / min(bucket[0], rows))

    def best(self, load: Load, survival: Sequence[float]) -> tuple[int, float]:
        """The fixed length of most tokens a second, and that rate a row, given mean survival by position."""
        plain, drafting = self.plain(load), self.best_drafting(load, survival)
        return drafting if drafting[1] > plain else (0, plain)

    def best_drafting(self, load: Load, survival: Sequence[float]) -> tuple[int, float]:
        """As `best`, of the lengths above 0."""
        tokens, best = 1.0, (0, 0.0)
        base, forward, token = self._drafting(self.source(load), load)
        for length, survives in enumerate(survival, 1):
            tokens += survives
            rate = tokens / (base + length * (forward + token))
            if rate > best[1]:
                best = (length, rate)
        return best[0], self.now(load, best[1])

    def plain(self, load: Load) -> float:
        """Tokens a second that plain decoding gives a row."""
        source = self.source(load)
        seconds, token = self._plain[source].value, self._pace[source].value * self._rest[source].step
        return 1 / (seconds - (1 - load.num_rows / source[0]) * min(token, seconds))

    def plain_full(self, load: Load) -> float:
        """Tokens a second that plain decoding gives a row of a full bucket."""
        return 1 / self._plain[self.source(load)].value

    def of_full(self, load: Load) -> float:
        """How many times as many tokens a second plain decoding gives a row of these as one of a full bucket."""
        return 1.0 if load.num_rows == self.source(load)[0] else self.plain(load) / self.plain_full(load)

    def now(self, load: Load, rate: float) -> float:
        """Tokens a second at the machine's present pace, of a rate over seconds without it."""
        return rate / self._pace[self.source(load)].value

    def without_pace(self, load: Load, rate: float) -> float:
        """The rate that `now` would make this one of."""
        return rate * self._pace[self.source(load)].value

    def forget_plain(self, load: Load) -> None:
        """What plain rounds took is about to be measured anew."""
        self._plain[bucket_of(load)].clear()

    def draft_step(self, load: Load) -> float:
        """Seconds of one more draft forward, without the pace."""
        return self._draft[self.source(load)].step

    def verify_step(self, load: Load) -> float:
        """Seconds of verifying one position more, without the pace."""
        source = self.source(load)
        return self._rest[source].step * load.num_rows / source[0]

    def break_even(self, load: Load, rate: float) -> float | None:
        """The acceptance at which one more drafted token a row just pays, where `rate` tokens a second are reached.

        None while only one length is known.
        """
        if self._rest[self.source(load)].num_lengths < 2:
            return None
        return rate * (self.draft_step(load) + self.verify_step(load)) / load.num_rows

    def seconds(self, result: RoundResult) -> float:
        """What a round that drafts such as this takes by the tables: without the luck of this one, and the pace."""
        base, forward, token = self._drafting(self.source(result.load), result.load)
        return base + result.forwards * forward + max(result.drafted) * token

    def _drafting(self, bucket: Bucket, load: Load) -> tuple[float, float, float]:
        """By a bucket's table, for a load of any rows: seconds of every round, of a forward, of a drafted token."""
        (drafting, forward), (rest, token) = self._draft[bucket].line, self._rest[bucket].line
        share = load.num_rows / bucket[0]
        return drafting + rest - (1 - share) * min(token, rest), forward, share * token


def bucket_of(load: Load) -> Bucket:
    """Loads whose rounds are taken to last alike."""
    return 1 << (load.num_rows - 1).bit_length(), load.num_groups
