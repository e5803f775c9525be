# B live rows, T tokens, H hidden, M entries of all places
"""Drafts at work beside their targets: their cache, and what they have to read.

A draft reads when it is about to propose, never before: a sequence that is decoded plainly costs it nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farm.decode.control import Control, Load
from farm.decode.drafts import Drafts
from farm.decode.proposal import Proposal
from farm.decode.propose import Pending, propose, run_draft
from farm.decode.propose_tree import propose_tree
from farm.decode.routes import Route, Routes
from farm.decode.sampling import SamplingBatch
from farm.decode.scheduler import Move
from farm.decode.steps import Steps
from farm.decode.tree import TreeShape
from farm.decode.tree_reader import TreeReader
from farm.draft.trunk import MAX_POSITIONS
from farm.layers.cache import Rows, SlotCache

KEPT_ROUNDS = 64  # whose hidden states lie as they came, before they are put in place together
READ_TOKENS = 256  # of a row that one forward reads at most when a draft has fallen behind


def longest_drafted(max_drafted: int) -> int:
    """Tokens of the longest sequence that a draft can follow, of which a round drafts at most `max_drafted`."""
    return MAX_POSITIONS - READ_TOKENS - max_drafted - 1


def buffered(capacity: int) -> int:
    """Positions that a draft keeps of a sequence of at most `capacity`.

    Reading for all rows at once runs past the end of those that have less to read.
    """
    return capacity + min(READ_TOKENS, capacity)


@dataclass
class Noted:
    """Hidden states of a round's tokens, or of plain rounds behind each other; behind what was kept is padding.

    Row b's first token stands at `starts[b]` of `places[b]`; a row whose place somebody else has since joined is void.
    """

    hidden: list[Tensor]  # of each round [B, T, H]; of more than one round T = 1
    places: tuple[int, ...]
    starts: list[int]
    number: int

    @property
    def width(self) -> int:
        """T."""
        return self.hidden[0].shape[1]


class Drafting:
    """The drafts of `routes` for `num_slots` sequences of at most `capacity` positions; memory is taken here, once.

    `first` is the first route that has a draft; all others' are over its trunk. With a `tree` that is what they
    propose, else chains.
    """

    def __init__(
        self,
        first: Route,
        routes: Routes,
        *,
        num_slots: int,
        capacity: int,
        max_drafted: int,
        steps: Steps,
        tree: TreeShape | None = None,
    ) -> None:
        self.max_drafted, self._tree, self._steps = max_drafted, tree, steps
        assert first.draft is not None
        self._drafts = Drafts(first.draft, routes)
        like, config = first.forward, first.draft.config
        shape = (config.num_kv_heads, config.head_dim)
        capacity = buffered(capacity)
        if capacity > (known := len(self._drafts.tables[0])):
            raise ValueError(f"drafts know {known} positions, {capacity} are wanted: lower max_length")
        self._cache = SlotCache(1, num_slots, capacity, shape, like.dtype, like.device)
        # At position t of a slot the target's h_t. The draft has read the first `_read[slot]`, each beside x_{t+1}.
        self._read, self._capacity = [0] * num_slots, capacity
        self._places = tuple(range(num_slots))  # whose `capacity` entries are kept for each slot's sequence
        self._joined = [0] * num_slots  # rounds there had been when who has that place joined
        self._number = 0  # of rounds so far
        # What rounds left and nothing has asked for yet: mostly the next proposal reads it from here.
        self._notes: list[Noted] = []
        self._goes_on = False  # whether the next round's plain tokens follow the last note's, row by row
        size = (num_slots * capacity, like.hidden_size)
        self._flat_MH = torch.zeros(size, dtype=like.dtype, device=like.device)

    @property
    def num_bytes(self) -> int:
        """Of the cache and of what may have to be read; weights are the draft's."""
        return self._cache.num_bytes + self._flat_MH.nbytes

    def forget(self) -> None:
        """Drops what was made for targets that are hosted no more."""
        self._drafts.forget()

    def prefilled(self, hidden_BTH: Tensor, rows: Rows) -> None:
        """Takes note of prefilled positions; behind the real ones of a row is padding."""
        places = self._places[rows.first : rows.first + len(rows)]
        for place in places:
            self._joined[place] = self._number
        self._goes_on = False
        self._keep(hidden_BTH.flatten(0, 1), self._entries(places, rows.starts, hidden_BTH.shape[1]))
        if rows.starts[0] == 0:
            self._read[rows.first : rows.first + len(rows)] = [0] * len(rows)

    def committed(self, hidden_BTH: Tensor, lengths: Sequence[int]) -> None:
        """Takes note of the hidden states of what a round read behind all but the last of each row's tokens."""
        self._number += 1
        num_rows, num_tokens = hidden_BTH.shape[:2]
        follows = self._goes_on and bool(self._notes) and num_tokens == 1
        if follows and num_rows == len(self._notes[-1].starts):
            self._notes[-1].hidden.append(hidden_BTH)
        else:
            starts = [length - 1 for length in lengths]
            self._notes.append(Noted([hidden_BTH], self._places[:num_rows], starts, self._number))
        self._goes_on = num_tokens == 1
        if self._number % KEPT_ROUNDS == 0:
            self._store()

    def catch_up(self, load: Load, sequences: Sequence[Sequence[int]]) -> None:
        """Reads for the rows that may draft until a proposal can read the rest along; `sequences` are all tokens."""
        while True:
            unread = [
                len(tokens) - 1 - read if limit else 0
                for tokens, read, limit in zip(sequences, self._read, load.limits, strict=False)
            ]
            behind = [row for row, count in enumerate(unread) if count > self.max_drafted + 1]
            if not behind:
                return
            some = slice(behind[0], behind[-1] + 1)
            counts = [min(max(count - 1, 0), READ_TOKENS) for count in unread[some]]
            rows = Rows(self._read[some], some.start, counts=counts)
            tokens_BT = self._tokens(sequences[some], rows.starts, counts)
            hidden_BTH = self._kept(rows, max(counts))
            bound = self._drafts.bind(load.targets[some], len(set(load.targets)) > 1)
            run_draft(*bound, tokens_BT, hidden_BTH, rows, self._cache)
            self._read[some] = [read + count for read, count in zip(self._read[some], counts, strict=True)]

    def propose(
        self,
        load: Load,
        sequences: Sequence[Sequence[int]],
        limit: int,
        control: Control,
        batch: SamplingBatch,
    ) -> Proposal:
        """Reads what is unread and extends rows of `sequences` by at most `limit` > 0 tokens each, or a tree."""
        pending = self._pending(load, sequences)
        if self._tree is not None:
            reader = TreeReader(*self._drafts.bind(load.targets), pending, self._cache)
            return propose_tree(reader, self._tree, batch)
        chains = self._steps.chain_reader(self._drafts, load.targets, pending, self._cache, limit)
        return propose(chains, limit, control, batch)

    def _pending(self, load: Load, sequences: Sequence[Sequence[int]]) -> Pending:
        """What is unread, and counted as read from now on; of a row that drafts nothing the last token, for company."""
        ends = [len(tokens) - 1 for tokens in sequences]
        of_rows = zip(ends, self._read, load.limits, strict=False)
        starts = [read if limit else end - 1 for end, read, limit in of_rows]
        counts = tuple(end - start for end, start in zip(ends, starts, strict=True))
        for row, (end, limit) in enumerate(zip(ends, load.limits, strict=True)):
            if limit:
                self._read[row] = end
        rows, width = Rows(starts), max(counts)
        tokens_BT = self._tokens(sequences, starts, counts)
        if all(load.limits) and self._is_all_noted(starts):
            (hidden_BTH,) = self._notes.pop().hidden  # never asked for again
            return Pending(tokens_BT, hidden_BTH[:, :width], rows, counts, load.limits)
        return Pending(tokens_BT, self._kept(rows, width), rows, counts, load.limits)

    def _is_all_noted(self, starts: Sequence[int]) -> bool:
        """Whether the only note is of one round, which has all that rows with these starts have not read."""
        if len(self._notes) != 1 or len(self._notes[0].hidden) != 1:
            return False
        note = self._notes[0]
        return note.starts == starts and note.places == self._places[: len(starts)] and not self._void(note)

    def _tokens(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], counts: Sequence[int]
    ) -> Tensor:
        """[B, T]: beside h_t the token x_{t+1}, for `counts[b]` positions from a row's start on; behind it padding."""
        width, of_rows = max(counts), zip(sequences, starts, counts, strict=True)
        padded = [
            [*tokens[start + 1 : start + 1 + count], *[0] * (width - count)]
            for tokens, start, count in of_rows
        ]
        return self._tensor(padded)

    def move(self, move: Move) -> None:
        """Sequences change slots: what they have read is copied, what they left to read stays in its place."""
        sources, destinations, places = list(move.sources), list(move.destinations), list(self._places)
        read = [self._read[source] for source in sources]
        if any(read):
            self._cache.move(sources, destinations, max(read))
        freed = [slot for slot in sources if slot not in destinations]
        spare = [places[slot] for slot in destinations if slot not in sources]
        for slot, place in zip(
            [*destinations, *freed], [*(places[slot] for slot in sources), *spare], strict=True
        ):
            places[slot] = place
        for slot, count in zip(destinations, read, strict=True):
            self._read[slot] = count
        self._places, self._goes_on = tuple(places), False

    def _store(self) -> None:
        """Keeps what was noted, in the order of the rounds: each writes over the padding of the one before.

        Plain rounds have none, and go together: a draft that rests is to cost next to nothing.
        """
        for is_plain, run in itertools.groupby(self._notes, lambda note: note.width == 1):
            for notes in [list(run)] if is_plain else ([note] for note in run):
                self._keep_noted(notes)
        self._notes.clear()

    def _keep_noted(self, notes: Sequence[Noted]) -> None:
        hidden_MTH = torch.cat([hidden_BTH for note in notes for hidden_BTH in note.hidden])
        entries = [entry for note in notes for entry in self._entries_of(note)]
        needed = [index for index, entry in enumerate(entries) if entry is not None]
        hidden_MH = hidden_MTH.flatten(0, 1)
        if len(needed) < len(entries):
            hidden_MH = hidden_MH[self._tensor(needed)]
        self._keep(hidden_MH, [entry for entry in entries if entry is not None])

    def _entries_of(self, note: Noted) -> list[int | None]:
        """None for what nobody needs any more."""
        of_first, void = self._entries(note.places, note.starts, note.width), self._void(note)
        needed = [place not in void for place in note.places for _ in range(note.width)]
        return [
            entry + later if is_needed else None
            for later in range(len(note.hidden))
            for entry, is_needed in zip(of_first, needed, strict=True)
        ]

    def _void(self, note: Noted) -> set[int]:
        """Places of it that have somebody else by now."""
        return {place for place in note.places if self._joined[place] >= note.number}

    def _keep(self, hidden_MH: Tensor, entries: Sequence[int]) -> None:
        self._flat_MH.index_copy_(0, self._tensor(entries), hidden_MH)

    def _kept(self, rows: Rows, num_tokens: int) -> Tensor:
        """[B, T, H] hidden states from the rows' starts on."""
        self._store()
        entries = self._entries(self._places[rows.first :], rows.starts, num_tokens)
        return self._flat_MH.index_select(0, self._tensor(entries)).view(len(rows), num_tokens, -1)

    def _entries(self, places: Sequence[int], starts: Sequence[int], num_tokens: int) -> list[int]:
        """Of `num_tokens` positions from each start on, row by row."""
        firsts = [place * self._capacity + start for place, start in zip(places, starts, strict=False)]
        return [first + index for first in firsts for index in range(num_tokens)]

    def _tensor(self, ids: Sequence[Any]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._flat_MH.device)
