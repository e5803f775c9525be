"""The draft length of most tokens a second, from measured seconds and measured acceptance."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence

from farm.decode.acceptance import Known
from farm.decode.control import Kind, Load, RoundResult, Signal
from farm.decode.costs import LOOKS, PLAIN_ROUNDS, Bucket, RoundCosts, bucket_of
from farm.decode.growth import Growing, Growth, Rule
from farm.decode.regimes import Nap, Regime, Stays, Trial, gain_over


class Cost:
    """Drafts and verifies a position where it is expected to raise tokens a second (renewal reward).

    Position j pays where sum_b S_bj > R dt: S_bj the probability that row b accepts all up to j, dt the position's
    share of draft and verification, R the rate that the best fixed length promises or that of plain decoding.
    Acceptance is looked up by the largest probability of the draft's distribution (farm/decode/acceptance.py), times
    are those of past rounds (farm/decode/costs.py).

    Loads that last alike either speculate or decode plainly. Now and then a few rounds try the other way, after ever
    longer pauses while they confirm what is done; the mean of such looks decides. A draft that rests has to read all
    that was said first: what a look into it costs is to be at most LOOK_SHARE of the pause that follows. While drafting
    pays, a round in DEEP_EVERY drafts far beyond what is best, so that acceptance stays known where the rule would
    stop. Lengths are explored at first, a few rounds each, and where a like number of rows is known only if these last.
    """

    signal: Signal = "peak"
    LOOK = 4  # rounds of a trial that count
    # Those before them, which pay for the change: the first plain rounds behind drafting ones are slower,
    # and each brings little.
    SETTLE, SETTLE_PLAIN = 1, 5
    DEEP_EVERY, EXPLORE_EVERY = 48, 16
    RULE_ROUNDS = 8  # that a rule holds for
    FIRST_WATCH, SHORTEST_PAUSE, LONGEST_PAUSE, LONGEST_REST = 16, 96, 768, 3072
    LOOK_SHARE = 0.005
    # Of plain decoding's rate, what drafting has to promise for a batch of other targets than those it was begun for.
    CLEARLY = 0.9
    ATTENTIVE = 64  # rounds of speculation that are all observed; of later ones those are that teach
    AWAKE = 2 * PLAIN_ROUNDS  # rounds before a look that are measured, for it to compare with
    LEAST_STAY = 16  # rounds that loads have to last before they are explored for themselves
    # Logarithm of what speculation has to promise and to keep over plain decoding, of one row and of several: rows of a
    # batch that drafts end further apart, which no round's seconds show.
    BEGIN, STAY = (0.01, 0.08), (-0.01, 0.06)

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.growth: Growth | None = None
        self._costs = RoundCosts(max_length)
        self._known = Known(max_length)
        self._regimes: defaultdict[Bucket, Regime] = defaultdict(lambda: Regime(self.SHORTEST_PAUSE))
        self._explored: set[Bucket] = set()
        self._stays = Stays()
        self._trials: dict[Bucket, Trial] = {}
        self._asked, self._attends, self._drafted = False, True, False
        self._round, self._alike = 0, 0
        self._growing: Growing | None = None
        self._nap: Nap | None = None
        # Kinds, groups and, where nothing pays, limits that it was worked out for.
        self._rule_of: tuple[tuple[Kind, ...], int, tuple[int, ...]] = ((), 0, ())
        self._rule_until = 0
        self._last_rule: Rule | None = None

    @property
    def observes(self) -> bool:
        return self._attends

    def limit(self, load: Load) -> int:
        own, nap = bucket_of(load), self._nap
        if nap is not None:
            if nap.goes_on(load, own):
                self._attends, self._growing = False, None
                return self.max_length if nap.drafts else 0
            self._wake(nap)
        self._asked, self._attends, self.growth, self._growing = True, True, None, None
        self._round += 1
        like = self._costs.source(load)
        self._stays.add(own)
        trial = self._trials.get(own) or self._next_trial(load, own, like)
        if trial is not None:
            self._trials[own] = trial
            return self._follow(Growth.whole(load.limits, trial.length), trial.length)
        regime = self._regimes[like]
        rule = self._rule(load, regime) if regime.speculates else None
        self._sleep_from(load, own, regime, drafts=rule is not None)
        return 0 if rule is None else self._follow(Growth(load.limits, rule), self.max_length)

    def _sleep_from(self, load: Load, own: Bucket, regime: Regime, *, drafts: bool) -> None:
        """Leaves the rounds that follow to themselves where nothing new is to be learned of them.

        Of plain ones those before the next look are observed, of those that draft the ones that teach.
        """
        used_to = self._alike > (self.SETTLE if drafts else self.SETTLE_PLAIN)
        if own not in self._explored or drafts != self._drafted or drafts != regime.speculates or not used_to:
            return
        if not drafts and regime.left > self.AWAKE:
            self._attends, self._nap = False, Nap(own, regime.left - self.AWAKE)
        if drafts and self._is_known(regime):
            self._attends = self._known.teaches(load, self._round)
            self._alike += not self._attends
            rounds = next(n for n in itertools.count() if self._known.teaches(load, self._round + n + 1))
            self._nap = Nap(own, min(rounds, regime.left - 1), load)

    def _is_known(self, regime: Regime) -> bool:
        """Whether it has speculated for long."""
        return self._round > regime.since + self.ATTENTIVE

    def _wake(self, nap: Nap) -> None:
        """Counts the rounds that were slept."""
        self._nap = None
        self._round += nap.slept
        self._alike += nap.slept
        self._stays.add(nap.bucket, nap.slept)
        self._regimes[nap.bucket].left -= nap.slept

    def _follow(self, growth: Growth, length: int) -> int:
        self.growth = growth if length else None
        return length

    def _next_trial(self, load: Load, own: Bucket, like: Bucket) -> Trial | None:
        if own not in self._explored:
            return (
                self._exploration(load, own) if like == own or self._is_worth_exploring(load, own) else None
            )
        regime = self._regimes[own]
        regime.left -= 1
        if regime.left <= 0 or self._disappoints(load, regime):
            lengths = (0,) if regime.speculates else (1, max(1, self.max_length // 2))
            if regime.speculates:
                self._costs.forget_plain(load)
            return Trial(lengths, self.LOOK, decides=True)
        if regime.speculates and self._round >= regime.deep_at and max(load.limits) == self.max_length:
            regime.deep_at = self._round + self.DEEP_EVERY
            return Trial((min(self.max_length, 2 + 2 * self._best(load)[0]),), 1)
        return None

    def _is_worth_exploring(self, load: Load, own: Bucket) -> bool:
        """Whether loads that could go by another bucket's table get their own: if they last, and allow all lengths."""
        if self._round % self.EXPLORE_EVERY or max(load.limits) < self.max_length:
            return False
        return self._stays.mean(own) >= self.LEAST_STAY

    def _exploration(self, load: Load, own: Bucket) -> Trial | None:
        """Of the lengths that are not known yet; once all are, whether to speculate."""
        lengths = self._costs.unexplored(load)
        if lengths:
            return Trial(lengths, LOOKS * len(lengths))
        self._explored.add(own)
        self._decide(load, self._regimes[own])
        return None

    def _disappoints(self, load: Load, regime: Regime) -> bool:
        """Whether speculation brings far less than plain decoding did when it was last seen; looked at now and then."""
        if not regime.speculates or self._round < regime.doubted_at:
            return False
        regime.doubted_at = self._round + self.RULE_ROUNDS
        return self._gain_of(load, regime) < -2 * regime.NOISE

    def _gain_of(self, load: Load, regime: Regime) -> float:
        """Of speculation over plain decoding, as both were when they were last seen."""
        rate = regime.with_catching_up(regime.rate.value)
        return gain_over(self._costs.plain_full(load), self._costs.now(load, rate))

    def _decide(self, load: Load, regime: Regime, trial: Trial | None = None) -> None:
        """Whether loads such as this speculate from now on, and for how many rounds that goes unquestioned."""
        several = load.num_rows > 1
        if regime.speculates:
            regime.look(self._gain_of(load, regime))
            if regime.gain > self.STAY[several]:
                regime.left = regime.watch = min(2 * regime.watch, self.LONGEST_PAUSE)
                return
            lasted = self._round - regime.since > self.LONGEST_PAUSE
            regime.rest = self.SHORTEST_PAUSE if lasted else self._longer(regime.rest, self.LONGEST_PAUSE)
        else:
            plain = self._costs.plain(load)
            promised = self._best_drafting(load)
            regime.look(gain_over(plain, regime.with_catching_up(promised)))
            if regime.gain > self.BEGIN[several]:
                rate = self._costs.without_pace(load, promised) / self._costs.of_full(load)
                regime.begin(rate, self._round)
                regime.left = regime.watch = self.FIRST_WATCH
                return
            # In rounds of plain decoding, which commit a token a row.
            lost = 0.0 if trial is None else trial.seconds * plain - trial.tokens
            regime.rest = self._longer(regime.rest, min(int(lost / self.LOOK_SHARE), self.LONGEST_REST))
        regime.left, regime.speculates = regime.rest, False

    def _longer(self, pause: int, longest: int) -> int:
        return max(self.SHORTEST_PAUSE, min(2 * pause, longest))

    def _best(self, load: Load) -> tuple[int, float]:
        return self._costs.best(load, self._known.mean_survival(load))

    def _best_drafting(self, load: Load) -> float:
        return self._costs.best_drafting(load, self._known.mean_survival(load))[1]

    def _rule(self, load: Load, regime: Regime) -> Rule | None:
        """Survival that pays for each position, at the rate that is expected; worked out anew every few rounds.

        None where nothing pays by far: the targets of this batch are drafted worse than those that the regime is known
        by. At other limits something may.
        """
        of = (load.kinds, load.num_groups, load.limits if self._last_rule is None else ())
        if self._round < self._rule_until and of == self._rule_of:
            return self._last_rule
        costs, verify = self._costs, self._costs.verify_step(load)
        # Plain decoding's rate as it lies below speculation's by all looks: that of the last few rounds errs by more.
        drafting = regime.with_catching_up(regime.rate.value)
        plain = drafting / math.exp(regime.gain) * costs.of_full(load)
        promised = costs.without_pace(load, self._best_drafting(load))
        self._last_rule = None
        if promised > self.CLEARLY * plain:
            rate = load.num_rows * max(plain, promised)
            known = {kind: self._known[kind] for kind in load.kinds}
            accepted = {kind: one.by_peak.table() for kind, one in known.items()}
            expected = {kind: [ratio.value for ratio in one.by_position] for kind, one in known.items()}
            self._last_rule = Rule(
                [accepted[kind] for kind in load.kinds],
                [expected[kind] for kind in load.kinds],
                [rate * verify] * self.max_length,
                [rate * (costs.draft_step(load) + verify)] * self.max_length,
            )  # fmt: skip
        limits = load.limits if self._last_rule is None else ()
        self._rule_of = (load.kinds, load.num_groups, limits)
        self._rule_until = self._round + self.RULE_ROUNDS
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
        settled = self._alike > (self.SETTLE if drafted else self.SETTLE_PLAIN)
        if settled:
            self._costs.add(result)
        own = bucket_of(result.load)
        if drafted and (own in self._trials or self._known.teaches(result.load, self._round)):
            self._known.learn(result)
        if not asked:  # no row could have drafted anything
            return
        regime = self._regimes[own]
        if own in self._trials:
            if self._trials[own].count(result, settled):
                trial = self._trials.pop(own)
                if trial.decides:
                    self._decide(result.load, regime, trial)
        elif drafted and settled and regime.speculates:
            load = result.load
            tokens = result.tokens / load.num_rows / self._costs.of_full(load)
            regime.rate.add(tokens, self._costs.seconds(result))
        # What rows in flight had to read when it began is the change's price, not that of going on. Rounds that read
        # are often behind plain ones, where all are observed: those count that would have been anyway.
        counts = not self._is_known(regime) or self._known.teaches(result.load, self._round)
        if drafted and regime.speculates and self._round > regime.since + 1 and counts:
            regime.caught_up.add(result.catch_up_s, result.seconds)
