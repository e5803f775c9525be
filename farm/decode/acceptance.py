"""What a control learns of drafts: how often tokens are accepted, by kind of row, position and largest probability."""

from __future__ import annotations

from collections import Counter

from farm.decode.control import Kind, Load, RoundResult
from farm.decode.costs import Ratio
from farm.decode.growth import bin_of


class AcceptanceByPeak:
    """Probability that a drafted token is accepted, by the largest probability of the distribution it came from.

    Until a bin has seen enough, it says what its peak says: a draft that is right about itself.
    """

    BINS, PRIOR, MEMORY = 16, 4.0, 500

    def __init__(self) -> None:
        self._bins = [Ratio((i + 0.5) / self.BINS, self.PRIOR, self.MEMORY) for i in range(self.BINS)]

    def at(self, peak: float) -> float:
        """Of one distribution."""
        return self._bins[bin_of(peak, self.BINS)].value

    def table(self) -> list[float]:
        """Of each bin, from the least certain on."""
        return [one.value for one in self._bins]

    def add(self, peak: float, hit: float) -> None:
        self._bins[bin_of(peak, self.BINS)].add(hit, 1.0)


class Acceptance:
    """What rows of one kind have taught: acceptance by the draft's largest probability, and by position."""

    def __init__(self, max_length: int) -> None:
        self.by_peak = AcceptanceByPeak()
        self.by_position = [Ratio(0.6, 2.0, memory=300) for _ in range(max_length)]
        self.rounds = 0  # that have taught

    def mean_survival(self) -> list[float]:
        """Probability that a row accepts all tokens up to each position."""
        survival, product = [], 1.0
        for ratio in self.by_position:
            product *= ratio.value
            survival.append(product)
        return survival


class Known(dict[Kind, Acceptance]):
    """What each kind of rows has taught; of more than MOST the one known for longest is forgotten."""

    MOST = 256
    NEW_ROUNDS, EVERY = 64, 4  # rounds that teach, every one and then one in so many: teaching costs time

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self._max_length = max_length

    def __missing__(self, kind: Kind) -> Acceptance:
        if len(self) >= self.MOST:
            del self[next(iter(self))]
        return self.setdefault(kind, Acceptance(self._max_length))

    def teaches(self, load: Load, number: int) -> bool:
        """Whether a round of that number is learned from: its outcome has no say, which would bias what is known."""
        return is_one_in(self.EVERY, number) or any(
            self[kind].rounds < self.NEW_ROUNDS for kind in load.distinct
        )

    def learn(self, result: RoundResult) -> None:
        """What was verified and not cut by a stop; of a position that was drafted and dropped what its peak says.

        Acceptance by position has to hold before a distribution is known, and the likely ones alone are verified.
        """
        load, forwards = result.load, len(result.signals)
        for kind in load.distinct:
            self[kind].rounds += 1
        rows = zip(load.kinds, load.limits, result.drafted, result.accepted, result.emitted, strict=True)
        for row, (kind, limit, drafted, accepted, emitted) in enumerate(rows):
            known = self[kind]
            for index in range(min(drafted, emitted)):
                hit = float(index < accepted)
                known.by_position[index].add(hit, 1.0)
                known.by_peak.add(result.signals[index][row], hit)
            if accepted == drafted < min(limit, forwards, emitted):
                known.by_position[drafted].add(known.by_peak.at(result.signals[drafted][row]), 1.0)

    def mean_survival(self, load: Load) -> list[float]:
        """Over the rows of a round; beyond its limit a row accepts nothing."""
        total = [0.0] * self._max_length
        survival_of = {kind: self[kind].mean_survival() for kind in load.distinct}
        for (kind, limit), rows in Counter(zip(load.kinds, load.limits, strict=True)).items():
            for index, survival in enumerate(survival_of[kind][:limit]):
                total[index] += rows * survival
        return [survival / load.num_rows for survival in total]


def is_one_in(every: int, number: int) -> bool:
    """Whether a round of that number is one of so many, as if by chance: in step with no rhythm that rounds may have.

    The mixing is that of splitmix32, whose bits pass for random ones.
    """
    mixed = number * 0x9E3779B9 & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 16) * 0x21F0AAAD & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 15) * 0x735A2D97 & 0xFFFFFFFF
    return (mixed ^ mixed >> 15) % every == 0
