# B rows, K positions
"""When the chains of a batch grow, worked out before its round, so that a draft can follow it without asking back."""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """Over whole distributions: no drawn token nor its probability has a part in it.

    A row's survival is the product of what its distributions' largest probabilities promise. A position is verified
    where the rows' survival, summed, is above `verify_above`; the next one is drafted where their survival times what
    is `expected` of it is above `draft_above`.
    """

    accepted: Sequence[Sequence[float]]  # [B][bins]: acceptance by the bin of the largest probability
    expected: Sequence[Sequence[float]]  # [B][K]: acceptance by position, before its distribution is known
    verify_above: Sequence[float]  # [K]
    draft_above: Sequence[float]  # [K]

    @functools.cached_property
    def packed(self) -> tuple[array[float], ...]:
        """`accepted`, `expected`, `verify_above` and `draft_above`, each as doubles behind each other."""
        nested = (self.accepted, self.expected, (self.verify_above,), (self.draft_above,))
        return tuple(array("d", itertools.chain.from_iterable(rows)) for rows in nested)


@dataclass(frozen=True)
class Growth:
    """A rule for the rows of a round; beyond its limit a row survives no more."""

    limits: Sequence[int]  # [B]
    rule: Rule

    @classmethod
    def whole(cls, limits: Sequence[int], length: int) -> Growth:
        """To that length, whatever the distributions say."""
        rows, never = len(limits), [-1.0] * length
        return cls(limits, Rule([[1.0]] * rows, [[1.0] * length] * rows, never, never))


class Growing:
    """A round that follows a `Growth`; `chain` in farm/layers/cpu/decoder.h does the same, number by number."""

    def __init__(self, growth: Growth) -> None:
        self._growth, self._survival_B = growth, [1.0] * len(growth.limits)

    def keeps(self, index: int, peak_B: Sequence[float]) -> bool:
        """Whether position `index` is verified, by the largest probabilities of its distributions."""
        growth = self._growth
        rows = zip(self._survival_B, growth.limits, growth.rule.accepted, peak_B, strict=True)
        self._survival_B = [
            survival * table[bin_of(peak, len(table))] if index < limit else 0.0
            for survival, limit, table, peak in rows
        ]
        return sum(self._survival_B) > growth.rule.verify_above[index]

    def grows(self, index: int) -> bool:
        """Whether position `index`, of which nothing is known yet, is drafted at all."""
        growth = self._growth
        rows = zip(self._survival_B, growth.limits, growth.rule.expected, strict=True)
        hoped = [survival * table[index] if index < limit else 0.0 for survival, limit, table in rows]
        return sum(hoped) > growth.rule.draft_above[index]


def bin_of(peak: float, num: int) -> int:
    """Which of `num` equal bins a largest probability is in."""
    return min(num - 1, int(peak * num)) if peak > 0 else 0  # a nan is no number to trust
