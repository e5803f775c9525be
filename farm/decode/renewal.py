"""The draft length of most tokens a second, from measured seconds and measured acceptance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from farm.decode.control import Load, RoundResult, Signal
from farm.decode.costs import LOOKS, AcceptanceByPeak, Bucket, Ratio, RoundCosts, bucket_of
from farm.decode.growth import Growing, Growth, Rule


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


@dataclass
class Trial:
    """Rounds of some lengths in turn, whatever the rule says, to learn what they take and bring.

    It belongs to loads that last alike, and waits while there are others.
    """

    lengths: tuple[int, ...]
    left: int
    decides: bool = False  # at its end: whether to speculate
    seconds: float = 0.0  # that it has taken, and what it has brought a row meanwhile
    tokens: float = 0.0

    @property
    def length(self) -> int:
        """Of its next round."""
        return self.lengths[self.left % len(self.lengths)]


class Regime:
    """Of loads that last alike: whether they speculate, at what rate a row, and for how many rounds more.

    What is done is looked into after `left` rounds; `rest` and `watch` are the pauses before that, of plain decoding
    and of speculation, and grow while it is confirmed.
    """

    def __init__(self, pause: int) -> None:
        self.speculates, self.rate, self.since = False, Ratio(1.0, 1.0, memory=1), 0
        self.left, self.rest, self.watch = pause, pause, pause


class Cost:
    """Drafts and verifies a position where it is expected to raise tokens a second (renewal reward).

    Position j pays where sum_b S_bj > R dt: S_bj the probability that row b accepts all up to j, dt the position's
    share of draft and verification, R the rate that this rule itself reaches (Dinkelbach's iteration) or that of plain
    decoding. Acceptance is looked up by the largest probability of the draft's distribution, times are those of past
    rounds (farm/decode/costs.py).

    Loads that last alike either speculate or decode plainly. Now and then a few rounds try the other way, after ever
    longer pauses while they confirm what is done. A draft that rests has to read all that was said first: what a look
    into it costs is to be at most LOOK_SHARE of the pause that follows. While drafting pays, a round in DEEP_EVERY
    drafts far beyond what is best, so that acceptance stays known where the rule would stop. Lengths are explored at
    first, a few rounds each, and where a like number of rows is known only now and then.
    """

    signal: Signal = "peak"
    LOOK, SETTLE = 4, 1  # rounds of a trial that count, and those before them that pay for the change
    DEEP_EVERY, EXPLORE_EVERY, RULE_ROUNDS = 48, 16, 8
    FIRST_WATCH, SHORTEST_PAUSE, LONGEST_PAUSE, LONGEST_REST = 16, 96, 768, 3072
    LOOK_SHARE = 0.01
    # What speculation has to promise and to keep, of one row and of several. Rows of a batch that drafts end further
    # apart, which no round's seconds show, and a look sees but a few of the places that an answer has.
    BEGIN, STAY = (1.03, 1.15), (1.0, 1.02)

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.growth: Growth | None = None
        self._costs = RoundCosts(max_length)
        self._of_target: defaultdict[str, Acceptance] = defaultdict(lambda: Acceptance(max_length))
        self._regimes: defaultdict[Bucket, Regime] = defaultdict(lambda: Regime(self.SHORTEST_PAUSE))
        self._explored: set[Bucket] = set()
        self._trials: dict[Bucket, Trial] = {}
        self._asked, self._round, self._alike, self._drafted = False, 0, 0, False
        self._growing: Growing | None = None
        self._rule_load, self._rule_until = Load((), ()), 0
        self._last_rule: Rule | None = None

    def limit(self, load: Load) -> int:
        self._asked, self.growth, self._growing = True, None, None
        self._round += 1
        own, like = bucket_of(load), self._costs.source(load)
        trial = self._trials.get(own) or self._next_trial(load, own, like)
        if trial is not None:
            self._trials[own] = trial
            return self._follow(Growth.whole(load.limits, trial.length), trial.length)
        regime = self._regimes[like]
        if not regime.speculates:
            return 0
        rule = self._rule(load, regime.rate.value)
        return 0 if rule is None else self._follow(Growth(load.limits, rule), self.max_length)

    def _follow(self, growth: Growth, length: int) -> int:
        self.growth = growth if length else None
        return length

    def _next_trial(self, load: Load, own: Bucket, like: Bucket) -> Trial | None:
        if own not in self._explored:
            lengths = self._costs.unexplored(load)
            if not lengths:
                self._explored.add(own)
                self._decide(load, self._regimes[own])
            elif like == own or self._round % self.EXPLORE_EVERY == 0:
                return Trial(lengths, self.SETTLE + LOOKS * len(lengths))
            return None
        regime = self._regimes[own]
        regime.left -= 1
        if regime.left <= 0 or self._disappoints(load, regime):
            lengths = (0,) if regime.speculates else (1, max(1, self.max_length // 2))
            if regime.speculates:
                self._costs.forget_plain(load)
            return Trial(lengths, self.SETTLE + self.LOOK, decides=True)
        if regime.speculates and self._round % self.DEEP_EVERY == 0:
            return Trial((min(self.max_length, 2 + 2 * self._best(load)[0]),), 1)
        return None

    def _disappoints(self, load: Load, regime: Regime) -> bool:
        """Whether speculation brings less than plain decoding did when it was last seen; looked at now and then."""
        if not regime.speculates or (self._round - regime.since) % self.RULE_ROUNDS:
            return False
        return self._costs.now(regime.rate.value) < self.STAY[load.num_rows > 1] * self._costs.plain(load)

    def _decide(self, load: Load, regime: Regime, trial: Trial | None = None) -> None:
        """Whether loads such as this speculate from now on, and for how many rounds that goes unquestioned."""
        plain, several = self._costs.plain(load), load.num_rows > 1
        if regime.speculates:
            if self._costs.now(regime.rate.value) > self.STAY[several] * plain:
                regime.left = regime.watch = min(2 * regime.watch, self.LONGEST_PAUSE)
                return
            lasted = self._round - regime.since > self.LONGEST_PAUSE
            regime.rest = self.SHORTEST_PAUSE if lasted else self._longer(regime.rest, self.LONGEST_PAUSE)
        else:
            _, promised = self._best(load)
            if promised > self.BEGIN[several] * plain:
                rate = self._costs.without_pace(promised)
                regime.rate, regime.since = Ratio(rate, 4 / rate, memory=64), self._round
                regime.left = regime.watch = self.FIRST_WATCH
                regime.speculates = True
                return
            # In rounds of plain decoding, which commit a token a row.
            lost = 0.0 if trial is None else trial.seconds * plain - trial.tokens
            regime.rest = self._longer(regime.rest, min(int(lost / self.LOOK_SHARE), self.LONGEST_REST))
        regime.left, regime.speculates = regime.rest, False

    def _longer(self, pause: int, longest: int) -> int:
        return max(self.SHORTEST_PAUSE, min(2 * pause, longest))

    def _best(self, load: Load) -> tuple[int, float]:
        return self._costs.best(load, self._mean_survival(load))

    def _rule(self, load: Load, reached: float) -> Rule | None:
        """Survival that pays for each position, at the rate that is reached; worked out anew every few rounds.

        None where nothing pays: the targets of this batch are drafted worse than those that the rate came from. At
        other limits something may.
        """
        same = load if self._last_rule is None else replace(load, limits=self._rule_load.limits)
        if self._round < self._rule_until and same == self._rule_load:
            return self._last_rule
        plain, verify = self._costs.plain(load), self._costs.verify_step(load)
        self._last_rule = None
        if self._best(load)[1] > plain:
            rate = load.num_rows * max(self._costs.without_pace(plain), reached)
            of_rows = [self._of_target[name] for name in load.targets]
            self._last_rule = Rule(
                [one.by_peak.table() for one in of_rows],
                [[ratio.value for ratio in one.by_position] for one in of_rows],
                [rate * verify] * self.max_length,
                [rate * (self._costs.draft_step(load) + verify)] * self.max_length,
            )  # fmt: skip
        self._rule_load, self._rule_until = load, self._round + self.RULE_ROUNDS
        return self._last_rule

    def keep(self, index: int, signal_B: Sequence[float]) -> list[bool]:
        growing = self._following()
        return [growing is not None and growing.keeps(index, signal_B)] * len(signal_B)

    def more(self, index: int) -> bool:
        growing = self._following()
        return growing is not None and growing.grows(index)

    def _following(self) -> Growing | None:
        if self._growing is None and self.growth is not None:
            self._growing = Growing(self.growth)
        return self._growing

    def observe(self, result: RoundResult) -> None:
        drafted, asked, self._asked = result.forwards > 0, self._asked, False
        self._alike = self._alike + 1 if drafted == self._drafted else 1
        self._drafted = drafted
        settled = self._alike > self.SETTLE
        if settled:
            self._costs.add(result)
        if drafted:
            self._learn(result)
        if not asked:  # no row could have drafted anything
            return
        own = bucket_of(result.load)
        regime = self._regimes[own]
        if own in self._trials:
            self._count(own, result, regime)
        elif drafted and settled and regime.speculates:
            regime.rate.add(result.tokens / result.load.num_rows, self._costs.seconds(result))

    def _count(self, own: Bucket, result: RoundResult, regime: Regime) -> None:
        trial = self._trials[own]
        trial.left -= 1
        trial.seconds += result.seconds + result.catch_up_s
        trial.tokens += result.tokens / result.load.num_rows
        if trial.left == 0:
            del self._trials[own]
            if trial.decides:
                self._decide(result.load, regime, trial)

    def _learn(self, result: RoundResult) -> None:
        """What was verified and not cut by a stop; of a position that was drafted and dropped what its peak says.

        Acceptance by position has to hold before a distribution is known, and the likely ones alone are verified.
        """
        load, forwards = result.load, len(result.signals)
        rows = zip(load.targets, load.limits, result.drafted, result.accepted, result.emitted, strict=True)
        for row, (target, limit, drafted, accepted, emitted) in enumerate(rows):
            known = self._of_target[target]
            for index in range(min(drafted, accepted + 1, emitted)):
                hit = float(index < accepted)
                known.by_position[index].add(hit, 1.0)
                known.by_peak.add(result.signals[index][row], hit)
            if accepted == drafted < min(limit, forwards, emitted):
                known.by_position[drafted].add(known.by_peak.at(result.signals[drafted][row]), 1.0)

    def _mean_survival(self, load: Load) -> list[float]:
        """Over the rows of a round; beyond its limit a row accepts nothing."""
        total = [0.0] * self.max_length
        for name, limit in zip(load.targets, load.limits, strict=True):
            for index, survival in enumerate(self._of_target[name].mean_survival()[:limit]):
                total[index] += survival
        return [survival / load.num_rows for survival in total]
