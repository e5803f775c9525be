"""The few sizes that static steps come in, so that a captured step serves many rounds."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_CONTEXT = 128


@dataclass(frozen=True)
class Buckets:
    """Powers of two: of rows up to the slots, of drafted tokens up to what a round may draft, of positions read."""

    num_slots: int
    max_drafted: int

    def rows(self, num: int, first: int = 0) -> int:
        """Rows of a call for `num` of them from slot `first` on."""
        return min(_power(num), self.num_slots - first)

    def tokens(self, num: int) -> int:
        """Tokens a row of a call for `num` of them, the first of which is not drafted."""
        return 1 + min(_power(num - 1), self.max_drafted) if num > 1 else 1

    def context(self, end: int, capacity: int) -> int:
        """Entries that attention reads of slots of `capacity` when it needs `end` of them."""
        return min(max(_power(end), LEAST_CONTEXT), capacity)


def _power(num: int) -> int:
    """The least power of two that is at least `num` > 0."""
    return 1 << (num - 1).bit_length()
