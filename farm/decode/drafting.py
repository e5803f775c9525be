# B live rows, T tokens, H hidden, N slots, P positions, M = B T
"""Drafts at work beside their targets: their cache, and what they have to read.

A draft reads when it is about to propose, never before: a sequence that is decoded plainly costs it nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from farm.decode.steps import EagerSteps, Steps
from farm.decode.tree import TreeShape
from farm.decode.tree_reader import TreeReader
from farm.layers.cache import Rows, SlotCache

KEPT_NOTES = 64
READ_TOKENS = 256  # of a row that one forward reads at most when a draft has fallen behind


def buffered(capacity: int) -> int:
    """Positions that a draft keeps of a sequence of at most `capacity`.

    Reading for all rows at once runs past the end of those that have less to read.
    """
    return capacity + min(READ_TOKENS, capacity)


class Note(NamedTuple):
    """Tokens and the hidden states before them that stand from the rows' starts on."""

    tokens_BT: Tensor
    hidden_BTH: Tensor
    rows: Rows


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
        self._cache = SlotCache(1, num_slots, capacity, shape, like.dtype, like.device)
        # At position t of a slot: x_{t+1} and the target's h_t. The draft has read the first `_read[slot]` positions.
        self._read, self._capacity = [0] * num_slots, capacity
        self._tokens_NP = torch.zeros(num_slots, capacity, dtype=torch.int64, device=like.device)
        # What rounds committed and nothing has asked for yet: mostly the next proposal reads it from here.
        self._notes: list[Note] = []
        self._hidden_NPH = torch.zeros(
            num_slots, capacity, like.hidden_size, dtype=like.dtype, device=like.device
        )

    @property
    def num_bytes(self) -> int:
        """Of the cache and of what may have to be read; weights are the draft's."""
        return self._cache.num_bytes + self._tokens_NP.nbytes + self._hidden_NPH.nbytes

    def forget(self) -> None:
        """Drops what was made for targets that are hosted no more."""
        self._drafts.forget()

    def prefilled(
        self, tokens_BT: Tensor, hidden_BTH: Tensor, last_B: Tensor, next_B: Tensor, rows: Rows
    ) -> None:
        """Takes note of prefilled positions, row b's up to index `last_B[b]`, after which `next_B[b]` comes."""
        shifted_BT = tokens_BT.roll(-1, dims=1).scatter(1, last_B[:, None], next_B[:, None])
        self._store()
        self._keep(Note(shifted_BT, hidden_BTH, rows))
        if rows.starts[0] == 0:
            self._read[rows.first : rows.first + len(next_B)] = [0] * len(next_B)

    def committed(self, tokens_BT: Tensor, hidden_BTH: Tensor, lengths: Sequence[int]) -> None:
        """Takes note of what a round committed behind the `lengths` tokens of each row, and of padding behind that."""
        self._notes.append(Note(tokens_BT, hidden_BTH, Rows([length - 1 for length in lengths])))
        # What a graph has put out is written over by its next run.
        if len(self._notes) > KEPT_NOTES or not isinstance(self._steps, EagerSteps):
            self._store()

    def catch_up(self, load: Load, lengths: Sequence[int]) -> None:
        """Reads for the rows that may draft until a proposal can read the rest along."""
        while True:
            of_rows = zip(lengths, self._read[: len(lengths)], load.limits, strict=True)
            unread = [length - 1 - read if limit else 0 for length, read, limit in of_rows]
            behind = [row for row, count in enumerate(unread) if count > self.max_drafted + 1]
            if not behind:
                return
            some = slice(behind[0], behind[-1] + 1)
            counts = [min(max(count - 1, 0), READ_TOKENS) for count in unread[some]]
            rows = Rows(self._read[some], some.start, counts=counts)
            tokens_BT, hidden_BTH = self._kept(rows, max(counts))
            run_draft(*self._drafts.bind(load.targets[some]), tokens_BT, hidden_BTH, rows, self._cache)
            self._read[some] = [read + count for read, count in zip(self._read[some], counts, strict=True)]

    def propose(
        self, load: Load, lengths: Sequence[int], limit: int, control: Control, batch: SamplingBatch
    ) -> Proposal:
        """Reads what is unread and extends rows of `lengths` tokens by at most `limit` > 0 tokens each, or a tree."""
        pending = self._pending(load, lengths)
        if self._tree is not None:
            reader = TreeReader(*self._drafts.bind(load.targets), pending, self._cache)
            return propose_tree(reader, self._tree, batch)
        chains = self._steps.chain_reader(self._drafts, load.targets, pending, self._cache, limit)
        return propose(chains, limit, control, batch)

    def _pending(self, load: Load, lengths: Sequence[int]) -> Pending:
        """What is unread, and counted as read from now on; of a row that drafts nothing the last token, for company."""
        of_rows = zip(lengths, self._read[: len(lengths)], load.limits, strict=True)
        starts = [read if limit else length - 2 for length, read, limit in of_rows]
        counts = tuple(length - 1 - start for length, start in zip(lengths, starts, strict=True))
        for row, (length, limit) in enumerate(zip(lengths, load.limits, strict=True)):
            if limit:
                self._read[row] = length - 1
        rows, width = Rows(starts), max(counts)
        if len(self._notes) == 1 and self._notes[0].rows.starts == starts and all(load.limits):
            note = self._notes.pop()  # all that is unread, and never asked for again
            return Pending(note.tokens_BT[:, :width], note.hidden_BTH[:, :width], rows, counts, load.limits)
        return Pending(*self._kept(rows, width), rows, counts, load.limits)

    def move(self, move: Move) -> None:
        """Copies sequences to other slots."""
        self._store()
        sources, destinations, length = list(move.sources), list(move.destinations), move.length
        self._cache.move(sources, destinations, length)
        self._tokens_NP[destinations, :length] = self._tokens_NP[sources, :length]
        self._hidden_NPH[destinations, :length] = self._hidden_NPH[sources, :length]
        read = [self._read[source] for source in sources]
        for destination, count in zip(destinations, read, strict=True):
            self._read[destination] = count

    def _store(self) -> None:
        """Keeps what was noted, in the order of the rounds: each writes over the padding of the one before."""
        for note in self._notes:
            self._keep(note)
        self._notes.clear()

    def _keep(self, note: Note) -> None:
        at_M = self._positions(note.rows, note.tokens_BT.shape[1])
        self._tokens_NP.view(-1).index_copy_(0, at_M, note.tokens_BT.reshape(-1))
        self._hidden_NPH.flatten(0, 1).index_copy_(0, at_M, note.hidden_BTH.flatten(0, 1))

    def _kept(self, rows: Rows, num_tokens: int) -> tuple[Tensor, Tensor]:
        """[B, T] tokens and [B, T, H] hidden states from the rows' starts on."""
        self._store()
        at_M, size = self._positions(rows, num_tokens), (len(rows.starts), num_tokens)
        tokens_M = self._tokens_NP.view(-1).index_select(0, at_M)
        return tokens_M.view(size), self._hidden_NPH.flatten(0, 1).index_select(0, at_M).view(*size, -1)

    def _positions(self, rows: Rows, num_tokens: int) -> Tensor:
        """Where in a flat buffer the rows' next `num_tokens` positions lie, [M]."""
        device = self._tokens_NP.device
        slots_B1 = torch.arange(rows.first, rows.first + len(rows.starts), device=device)[:, None]
        return (slots_B1 * self._capacity + rows.entries(num_tokens, device)).view(-1)
