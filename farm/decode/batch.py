# B rows
"""The rows of a round: what stays the same of them until a request joins or leaves, and what they may draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from farm.decode.control import Load
from farm.decode.logprobs import rows_that_ask
from farm.decode.routes import Group, Routes
from farm.decode.sampling import SamplingParams
from farm.decode.scheduler import LiveRequest


@dataclass(frozen=True, eq=False)
class Batch:
    """Requests that decode side by side. `load` has the limits of rows that have room for all that they may draft."""

    most_B: tuple[int, ...]  # tokens that each row ends with at the latest
    params: tuple[SamplingParams, ...]
    groups: tuple[Group, ...]
    asked: dict[int, int]  # alternatives that rows want beside the log-probabilities of their tokens
    load: Load
    in_trees: bool  # they are drafted whole, or not at all
    penalised: bool  # some of them

    @classmethod
    def of(cls, rows: Sequence[LiveRequest], routes: Routes, most: int, in_trees: bool) -> Batch:
        """Of requests for targets of `routes`, where a round drafts at most `most` tokens a row."""
        targets = tuple(row.request.target for row in rows)
        params = tuple(row.request.params for row in rows)
        groups = routes.groups(targets)
        wanted = (most if one.max_drafted is None else min(most, one.max_drafted) for one in params)
        pairs = zip(wanted, routes.drafted(targets), strict=True)
        limits = tuple(limit if drafted else 0 for limit, drafted in pairs)
        sampled = tuple(one.temperature > 0 for one in params)
        load = Load(targets, limits, len(groups), sampled)
        most_B, penalised = tuple(row.most for row in rows), any(one.penalised for one in params)
        return cls(most_B, params, groups, rows_that_ask(params), load, in_trees, penalised)

    def load_at(self, lengths: Sequence[int]) -> Load:
        """With rows of so many tokens: a verification adds one to what it accepts, and there is to be room for all."""
        longest = max(self.load.limits)
        if not longest:
            return self.load
        room_B = [most - length - 1 for most, length in zip(self.most_B, lengths, strict=True)]
        if min(room_B) >= longest:
            return self.load
        if self.in_trees:
            room_B = [longest if room else 0 for room in room_B]
        return replace(self.load, limits=tuple(map(min, self.load.limits, room_B)))
