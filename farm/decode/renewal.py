"""The draft length of most tokens a second, from measured seconds and measured acceptance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from farm.decode.control import Load, RoundResult, Signal
from farm.decode.costs import AcceptanceByPeak, Bucket, Ratio, RoundCosts


class Acceptance:
    """What one target has taught: acceptance by the draft's largest probability, and by position."""

    def __init__(self, max_length: int) -> None:
        self.by_peak = AcceptanceByPeak()
        self.by_position = [Ratio(0.6, 2.0, memory=300) for _ in range(max_length)]

    def mean_survival(self) -> list[float]:
        """Probability that a row accepts all tokens up to each position."""
        survival, product = [], 1.0
        for ratio in self.by_position:
            product *= ratio.value
            survival.append(product)
        return survival


class Price(NamedTuple):
    """Seconds that one more position takes."""

    draft: float
    verify: float

    @classmethod
    def of(cls, costs: RoundCosts, load: Load, index: int) -> Price:
        """Of position `index`."""
        return cls(costs.draft_step(load, index), costs.verify_step(load, index))


class Cost:
    """Drafts and verifies a position where it is expected to raise tokens a second (renewal reward).

    Position j pays where sum_b S_bj > R dt: S_bj the probability that row b accepts all up to j, dt the position's
    share of draft and verification, R the rate that this rule itself reaches (Dinkelbach's iteration) or that of plain
    decoding. Acceptance is looked up by the largest probability of the draft's distribution, times are those of past
    rounds. Where plain decoding is faster nothing is drafted, and after PROBE_EVERY rounds one looks again, then after
    twice as many unless it is surprised: a draft that rests has to read all that was said before. While drafting pays,
    a round in PROBE_EVERY drafts to the end, so that acceptance stays known where the rule would stop. Lengths are
    explored at first, and where a like number of rows is known in one round of EXPLORE_EVERY.
    """

    signal: Signal = "peak"
    PROBE_EVERY, EXPLORE_EVERY = 48, 16
    # What speculation has to promise: rows of a batch that drafts end further apart, which no round's seconds show.
    BEGIN, STAY = 1.1, 1.05
    SURPRISE = 0.3  # share of first tokens accepted beyond what was expected
    SHORTEST_REST, LONGEST_REST, RECKON_EVERY = 24, 768, 8

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self._costs = RoundCosts(max_length)
        self._of_target: defaultdict[str, Acceptance] = defaultdict(lambda: Acceptance(max_length))
        # Tokens a second of rounds that followed the rule, by rows and the bucket that tells their seconds.
        self._rates: dict[tuple[int, Bucket], Ratio] = {}
        self._probes, self._probe_in, self._pause = 0, self.PROBE_EVERY, self.PROBE_EVERY
        self._round, self._rest_until, self._rest, self._began = 0, 0, self.SHORTEST_REST, 0
        self._load, self._forced, self._rate = Load((), ()), False, 0.0
        self._prices: list[Price] = []  # of the first position, and of every one after it
        self._survival_B: list[float] = []
        self._peaks: list[list[float]] = []

    def limit(self, load: Load) -> int:
        self._round += 1
        self._load, self._survival_B, self._peaks = load, [1.0] * load.num_rows, []
        trial = self._costs.unexplored(load)
        if trial is not None and self._costs.borrows(load) and self._round % self.EXPLORE_EVERY:
            trial = None
        elif trial is None and self._is_time_to_probe():
            trial = self._probe(load)
        self._forced = trial is not None
        if trial is not None:
            return trial
        if not self._speculates():
            return 0
        self._prices = [Price.of(self._costs, load, index) for index in (0, 1)]
        return self.max_length

    def _is_time_to_probe(self) -> bool:
        self._probe_in -= 1
        if self._probe_in > 0:
            return False
        self._pause = (
            self.PROBE_EVERY if self._key() in self._rates else min(2 * self._pause, self.LONGEST_REST)
        )
        self._probe_in = self._pause
        return True

    def _probe(self, load: Load) -> int:
        """A length to look at again: in turn a little and much more than is best, and none where that is not in use."""
        best, _ = self._costs.best(load, self._mean_survival())
        lengths = (0, 1 + best, 2 + 2 * best) if self._key() in self._rates else (1 + best,)
        self._probes += 1
        return min(self.max_length, lengths[self._probes % len(lengths)])

    def _speculates(self) -> bool:
        """Whether the rule beats plain decoding: by what it reached lately, or else by what a fixed length would."""
        key = self._key()
        if key not in self._rates and self._round < self._rest_until:
            return False
        plain = self._costs.plain(self._load)
        if key not in self._rates:
            _, fixed = self._costs.best(self._load, self._mean_survival())
            if fixed < self.BEGIN * plain:
                self._rest_until = self._round + self.RECKON_EVERY
                return False
            self._rates[key] = Ratio(fixed, 8 * self._load.num_rows / fixed, memory=64)
            self._began = self._round
        known = self._rates[key].value
        self._rate = max(plain, known)
        if known < self.STAY * plain:
            del self._rates[key]
            confirmed = self._round - self._began < self._rest
            self._rest = min(2 * self._rest, self.LONGEST_REST) if confirmed else self.SHORTEST_REST
            self._rest_until = self._round + self._rest
            return False
        return True

    def keep(self, index: int, signal_B: Sequence[float]) -> list[bool]:
        self._peaks.append(list(signal_B))
        rows = zip(self._load.targets, self._open(index), signal_B, strict=True)
        self._survival_B = [
            survival * self._of_target[name].by_peak.of(peak) for name, survival, peak in rows
        ]
        pays = self._forced or sum(self._survival_B) > self._rate * self._prices[min(index, 1)].verify
        return [pays] * len(signal_B)

    def more(self, index: int) -> bool:
        if self._forced:
            return True
        rows = zip(self._load.targets, self._open(index), strict=True)
        expected = sum(survival * self._of_target[name].by_position[index].value for name, survival in rows)
        return expected > self._rate * sum(self._prices[min(index, 1)])

    def observe(self, result: RoundResult) -> None:
        self._costs.add(result)
        key = self._key()
        if result.forwards and not self._forced and key in self._rates:
            self._rates[key].add(result.tokens, self._costs.seconds(result))
        if self._forced and self._surprises(result):
            self._pause, self._probe_in = self.PROBE_EVERY, min(self._probe_in, self.PROBE_EVERY)
        rows = zip(result.load.targets, result.drafted, result.accepted, strict=True)
        for row, (target, drafted, accepted) in enumerate(rows):
            known = self._of_target[target]
            for index in range(min(drafted, accepted + 1)):
                hit = float(index < accepted)
                known.by_position[index].add(hit, 1.0)
                known.by_peak.add(self._peaks[index][row], hit)

    def _surprises(self, result: RoundResult) -> bool:
        """Whether far more first tokens were accepted than what is known lets expect."""
        rows = zip(result.load.targets, result.drafted, result.accepted, strict=True)
        above = [
            bool(got) - self._of_target[name].by_position[0].value for name, drafted, got in rows if drafted
        ]
        return bool(above) and sum(above) > self.SURPRISE * len(above)

    def _key(self) -> tuple[int, Bucket]:
        return self._load.num_rows, self._costs.source(self._load)

    def _mean_survival(self) -> list[float]:
        """Over the rows of this round; beyond its limit a row accepts nothing."""
        total = [0.0] * self.max_length
        for name, limit in zip(self._load.targets, self._load.limits, strict=True):
            for index, survival in enumerate(self._of_target[name].mean_survival()[:limit]):
                total[index] += survival
        return [survival / self._load.num_rows for survival in total]

    def _open(self, index: int) -> list[float]:
        """Survival so far of the rows that may draft position `index`; 0 for the others."""
        rows = zip(self._survival_B, self._load.limits, strict=True)
        return [survival if index < limit else 0.0 for survival, limit in rows]
