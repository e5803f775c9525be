"""A made-up engine: rounds of made-up seconds for a control to decide, with rows that end and are replaced or not.

Seconds are in those of a plain round of eight rows. What a control sees of them is noisy; what it is judged by is not.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from farm.decode.control import Control, Fixed, Load, RoundResult

SLOTS, MOST_DRAFTED, PROMPT = 8, 8, 32


@dataclass(frozen=True)
class Machine:
    """What a round takes: `*_round` whatever its rows, `*_token` for each token that is read."""

    verify_round: float
    verify_token: float
    draft_round: float  # of one forward
    draft_token: float
    caught_up_token: float = 0.003  # of what a draft has not read when a round begins
    changed: float = (
        1.08  # times as long: the first round that drafts after plain ones, and the other way round
    )
    noise: float = 0.1  # standard deviation of the logarithm of a round's seconds
    outliers: float = 0.01  # share of the rounds that take three times as long
    control: float = 0.01  # a round, of a control that decides


@dataclass(frozen=True)
class Work:
    """Requests that come in heaps: a heap begins when the one before it has ended, and fills the slots till it ends."""

    lengths: tuple[int, int]  # fewest and most tokens of an answer
    num_requests: int  # of a heap


@dataclass
class Answer:
    """One request: how often a token is accepted at all, tokens to go, and those the draft has not read."""

    alpha: float
    left: int
    unread: int = PROMPT


@dataclass
class Draftable:
    """How well a draft knows answers: acceptance around `alpha` over tokens, and over answers.

    The largest probability is right about half of what makes tokens differ, and too sure of all.
    """

    alpha: float
    spread: float = 0.5  # standard deviation, in logits, among answers

    def answer(self, rng: random.Random, length: int) -> Answer:
        """One of that length."""
        odds = self.alpha / (1 - self.alpha) * rng.lognormvariate(0, self.spread)
        return Answer(odds / (1 + odds), length)


@dataclass
class Clock:
    """What was decoded in how many seconds."""

    tokens: int = 0
    seconds: float = 0.0
    drafted: list[tuple[int, int]] = field(default_factory=list)  # rows and longest chain by round

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


class Player:
    """Decodes heap after heap under a control; the seconds that it reports are those without noise."""

    def __init__(
        self, control: Control, machine: Machine, work: Work, draft: Draftable, seed: int, group: str = ""
    ) -> None:
        self.control, self._machine, self._work, self._draft = control, machine, work, draft
        self._luck, self._noise = random.Random(seed), random.Random(seed + 1000)
        self._group, self._drafted = group, False

    def play(self, seconds: float) -> Clock:
        """Whole heaps until that time has passed."""
        clock = Clock()
        while clock.seconds < seconds:
            self._heap(clock)
        return clock

    def _heap(self, clock: Clock) -> None:
        waiting = [
            self._draft.answer(self._luck, self._luck.randint(*self._work.lengths))
            for _ in range(self._work.num_requests)
        ]
        live: list[Answer] = []
        while live or waiting:
            while waiting and len(live) < SLOTS:
                live.append(waiting.pop())
            self._round(live, clock)
            live = [one for one in live if one.left > 0]

    def _round(self, live: list[Answer], clock: Clock) -> None:
        rows, control = len(live), self.control
        load = Load((self._group,) * rows, tuple(min(MOST_DRAFTED, max(one.left - 1, 0)) for one in live))
        limit = min(control.limit(load), max(load.limits)) if any(load.limits) else 0
        peaks, hits = self._chain(live, load, limit)
        kept = max((len(of_row) for of_row in hits), default=0)
        accepted = [next((i for i, hit in enumerate(of_row) if not hit), len(of_row)) for of_row in hits]
        emitted = [min(n + 1, one.left) for n, one in zip(accepted, live, strict=True)]
        result = self._timed(live, load, hits, accepted, emitted, peaks, limit > 0)
        clock.tokens += sum(emitted)
        clock.seconds += self._true_s
        clock.drafted.append((rows, kept))
        for one, n in zip(live, emitted, strict=True):
            one.left -= n
            one.unread = n if limit else one.unread + n
        if control.observes:
            control.observe(result)

    def _chain(
        self, live: list[Answer], load: Load, limit: int
    ) -> tuple[list[list[float]], list[list[bool]]]:
        """The peaks of each forward, and by row whether each drafted token is right."""
        control, rng, peaks = self.control, self._luck, list[list[float]]()
        hits: list[list[bool]] = [[] for _ in live]
        for index in range(limit):
            if index and not control.more(index):
                break
            # A token is easy or hard, which the peak half tells.
            right = [one.alpha ** rng.choice((0.25, 2.0)) for one in live]
            peaks.append([(0.5 * (p + one.alpha)) ** 0.7 for p, one in zip(right, live, strict=True)])
            if not any(control.keep(index, peaks[-1])):
                break
            for row, (p, most) in enumerate(zip(right, load.limits, strict=True)):
                if index < most:
                    hits[row].append(rng.random() < p)
        return peaks, hits

    def _timed(
        self,
        live: list[Answer],
        load: Load,
        hits: list[list[bool]],
        accepted: list[int],
        emitted: list[int],
        peaks: list[list[float]],
        drafts: bool,
    ) -> RoundResult:
        machine, rows, lengths = self._machine, len(live), [len(of_row) for of_row in hits]
        forwards, rng = len(peaks), self._noise
        change = machine.changed if drafts != self._drafted else 1.0
        self._drafted = drafts
        unread = max(one.unread for one in live)
        behind = drafts and unread > MOST_DRAFTED + 1
        catch_up_s = machine.draft_round + machine.caught_up_token * rows * unread if behind else 0.0
        draft_s = change * forwards * (machine.draft_round + machine.draft_token * rows)
        rest_s = change * (machine.verify_round + machine.verify_token * rows * (1 + max(lengths)))
        rest_s += 0.0 if isinstance(self.control, Fixed) else machine.control
        self._true_s = catch_up_s + draft_s + rest_s
        slow = rng.lognormvariate(0, machine.noise) * (3 if rng.random() < machine.outliers else 1)
        return RoundResult(
            load, tuple(lengths), tuple(accepted), tuple(emitted), forwards,
            slow * draft_s, slow * rest_s, peaks, slow * catch_up_s,
        )  # fmt: skip


def rates_of_fixed(
    machine: Machine, work: Work, draft: Draftable, seconds: float, seed: int
) -> Iterator[float]:
    """Tokens a second of each fixed length, from 0 on."""
    for length in range(MOST_DRAFTED + 1):
        yield Player(Fixed(length), machine, work, draft, seed).play(seconds).rate


# Eight rows fill the processor, as they do on two cores: a verified token costs nearly what a decoded one does.
BUSY = Machine(0.5, 0.0625, 0.02, 0.006)
# Weights are read once for all: tokens cost little beside a round, as on a GPU.
IDLE = Machine(0.88, 0.015, 0.08, 0.004)
EQUAL, RAGGED = Work((64, 64), 8), Work((16, 128), 48)
