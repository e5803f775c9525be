# B live rows, T tokens, H hidden, N slots, P positions, M = B T
"""Drafts at work beside their targets: their cache, and what they have to read.

A draft reads when it is about to propose, never before: a sequence that is decoded plainly costs it nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

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

KEPT_NOTES = 64
READ_TOKENS = 256  # of a row that one forward reads at most when a draft has fallen behind


def longest_drafted(max_drafted: int) -> int:
    """Tokens of the longest sequence that a draft can follow, of which a round drafts at most `max_drafted`."""
    return MAX_POSITIONS - READ_TOKENS - max_drafted - 1


def buffered(capacity: int) -> int:
    """Positions that a draft keeps of a sequence of at most `capacity`.

    Reading for all rows at once runs past the end of those that have less to read.
    """
    return capacity + min(READ_TOKENS, capacity)


class Note(NamedTuple):
    """Hidden states of a round's tokens; behind what was kept is padding. Row b's first token was at `ends[b]` - 1."""

    hidden_BTH: Tensor
    ends: Sequence[int]

    @property
    def rows(self) -> Rows:
        return Rows([end - 1 for end in self.ends])


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
        # What rounds left and nothing has asked for yet: mostly the next proposal reads it from here.
        self._notes: list[Note] = []
        self._hidden_NPH = torch.zeros(
            num_slots, capacity, like.hidden_size, dtype=like.dtype, device=like.device
        )

    @property
    def num_bytes(self) -> int:
        """Of the cache and of what may have to be read; weights are the draft's."""
        return self._cache.num_bytes + self._hidden_NPH.nbytes

    def forget(self) -> None:
        """Drops what was made for targets that are hosted no more."""
        self._drafts.forget()

    def prefilled(self, hidden_BTH: Tensor, rows: Rows) -> None:
        """Takes note of prefilled positions; behind the real ones of a row is padding."""
        if rows.first == 0:
            self._notes.clear()  # sequences that decode are in the lowest slots: there are none any more
        self._store()
        self._keep(hidden_BTH, rows)
        if rows.starts[0] == 0:
            self._read[rows.first : rows.first + len(rows)] = [0] * len(rows)

    def committed(self, hidden_BTH: Tensor, lengths: Sequence[int]) -> None:
        """Takes note of the hidden states of what a round read behind all but the last of each row's tokens."""
        self._notes.append(Note(hidden_BTH, lengths))
        if len(self._notes) > KEPT_NOTES:
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
        if len(self._notes) == 1 and self._notes[0].rows.starts == starts and all(load.limits):
            note = self._notes.pop()  # all that is unread, and never asked for again
            return Pending(tokens_BT, note.hidden_BTH[:, :width], rows, counts, load.limits)
        return Pending(tokens_BT, self._kept(rows, width), rows, counts, load.limits)

    def _tokens(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], counts: Sequence[int]
    ) -> Tensor:
        """[B, T]: beside h_t the token x_{t+1}, for `counts[b]` positions from a row's start on; behind it padding."""
        width, of_rows = max(counts), zip(sequences, starts, counts, strict=True)
        padded = [
            [*tokens[start + 1 : start + 1 + count], *[0] * (width - count)]
            for tokens, start, count in of_rows
        ]
        return torch.tensor(padded, dtype=torch.int64, device=self._hidden_NPH.device)

    def move(self, move: Move) -> None:
        """Copies sequences to other slots."""
        self._store()
        sources, destinations, length = list(move.sources), list(move.destinations), move.length
        self._cache.move(sources, destinations, length)
        self._hidden_NPH[destinations, :length] = self._hidden_NPH[sources, :length]
        read = [self._read[source] for source in sources]
        for destination, count in zip(destinations, read, strict=True):
            self._read[destination] = count

    def _store(self) -> None:
        """Keeps what was noted, in the order of the rounds: each writes over the padding of the one before."""
        for note in _joined(self._notes):
            self._keep(note.hidden_BTH, note.rows)
        self._notes.clear()

    def _keep(self, hidden_BTH: Tensor, rows: Rows) -> None:
        at_M = self._positions(rows, hidden_BTH.shape[1])
        self._hidden_NPH.flatten(0, 1).index_copy_(0, at_M, hidden_BTH.flatten(0, 1))

    def _kept(self, rows: Rows, num_tokens: int) -> Tensor:
        """[B, T, H] hidden states from the rows' starts on."""
        self._store()
        at_M, size = self._positions(rows, num_tokens), (len(rows.starts), num_tokens)
        return self._hidden_NPH.flatten(0, 1).index_select(0, at_M).view(*size, -1)

    def _positions(self, rows: Rows, num_tokens: int) -> Tensor:
        """Where in a flat buffer the rows' next `num_tokens` positions lie, [M]."""
        device = self._hidden_NPH.device
        slots_B1 = torch.arange(rows.first, rows.first + len(rows.starts), device=device)[:, None]
        return (slots_B1 * self._capacity + rows.entries(num_tokens, device)).view(-1)


def _joined(notes: Sequence[Note]) -> Iterator[Note]:
    """The notes, those of plain rounds behind each other as one: a draft that rests is to cost next to nothing."""
    run: list[Note] = []
    for note in notes:
        if run and not _follows(note, run[-1]):
            yield _one(run)
            run = []
        run.append(note)
    if run:
        yield _one(run)


def _follows(note: Note, plain: Note) -> bool:
    """Whether a note is that of the round behind one of a token a row."""
    return plain.hidden_BTH.shape[1] == 1 and list(note.ends) == [end + 1 for end in plain.ends]


def _one(run: Sequence[Note]) -> Note:
    if len(run) == 1:
        return run[0]
    return Note(torch.cat([note.hidden_BTH for note in run], dim=1), run[0].ends)
