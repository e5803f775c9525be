# B live rows, T tokens, H hidden, N slots
"""Drafts at work beside their targets: their cache, and the committed tokens that they have not read yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farm.decode.control import Control, Load
from farm.decode.drafts import Drafts
from farm.decode.propose import ChainReader, DraftProposal, Pending, propose, run_draft
from farm.decode.propose_tree import TreeProposal, propose_tree
from farm.decode.routes import Route, Routes
from farm.decode.sampling import SamplingBatch
from farm.decode.scheduler import Move
from farm.decode.tree import TreeShape
from farm.decode.tree_reader import TreeReader
from farm.layers.cache import Rows, SlotCache

CATCH_UP = 32  # committed tokens that a resting draft lets pile up before it reads them in one forward


class Drafting:
    """The drafts of `routes` for `num_slots` sequences of at most `capacity` positions; caches are taken here, once.

    `first` is the first route that has a draft; all others' are over its trunk.
    """

    def __init__(
        self,
        first: Route,
        routes: Routes,
        *,
        num_slots: int,
        capacity: int,
        max_drafted: int,
    ) -> None:
        self.max_drafted = max_drafted
        assert first.draft is not None
        self._drafts = Drafts(first.draft, routes)
        like, config = first.forward, first.draft.config
        shape = (config.num_kv_heads, config.head_dim)
        # Reading for all rows at once runs past the last token of those that have less to read.
        self._cache = SlotCache(1, num_slots, capacity + CATCH_UP, shape, like.dtype, like.device)
        # x_{t+1} beside the target's h_t: the first `_unread[slot]` of a slot's entries are to be read. Sequences that
        # are older than the first draft have nothing to read; they have no draft either.
        self._unread = [1] * num_slots
        size = (num_slots, max(CATCH_UP, max_drafted + 1))
        self._tokens_NT = torch.zeros(size, dtype=torch.int64, device=like.device)
        self._hidden_NTH = torch.zeros(*size, like.hidden_size, dtype=like.dtype, device=like.device)

    @property
    def num_bytes(self) -> int:
        """Of the cache and of what is unread; weights are the draft's."""
        return self._cache.num_bytes + self._tokens_NT.nbytes + self._hidden_NTH.nbytes

    def forget(self) -> None:
        """Drops what was made for targets that are hosted no more."""
        self._drafts.forget()

    def read_prompts(
        self,
        targets: tuple[str, ...],
        tokens_BT: Tensor,
        hidden_BTH: Tensor,
        last_B: Tensor,
        next_B: Tensor,
        rows: Rows,
    ) -> None:
        """Reads prefilled positions, row b up to index `last_B[b]`, after which `next_B[b]` comes."""
        shifted_BT = tokens_BT.roll(-1, dims=1).scatter(1, last_B[:, None], next_B[:, None])
        run_draft(*self._drafts.bind(targets), shifted_BT, hidden_BTH, rows, self._cache)
        slots = slice(rows.first, rows.first + len(next_B))
        self._tokens_NT[slots, 0] = next_B
        self._hidden_NTH[slots, 0] = hidden_BTH[torch.arange(len(next_B)), last_B]
        self._unread[slots] = [1] * len(next_B)

    def catch_up(self, targets: tuple[str, ...], lengths: Sequence[int], *, drafts: bool) -> None:
        """Reads all but the last unread token of each row, where a proposal or the buffer would not hold them."""
        counts = self._unread[: len(lengths)]
        if max(counts) <= (self.max_drafted + 1 if drafts else CATCH_UP - 1):
            return
        width = max(counts) - 1
        unread = self._tokens_NT[: len(counts), :width], self._hidden_NTH[: len(counts), :width]
        run_draft(*self._drafts.bind(targets), *unread, self._unread_rows(lengths), self._cache)
        rows = torch.arange(len(counts), device=self._tokens_NT.device)
        last_B = torch.tensor(counts, device=rows.device) - 1
        self._tokens_NT[rows, 0] = self._tokens_NT[rows, last_B]
        self._hidden_NTH[rows, 0] = self._hidden_NTH[rows, last_B]
        self._unread[: len(counts)] = [1] * len(counts)

    def propose(
        self, load: Load, lengths: Sequence[int], limit: int, control: Control, batch: SamplingBatch
    ) -> DraftProposal:
        """Reads what is unread and extends each row, of `lengths` tokens, by at most `limit` > 0 tokens."""
        pending = self._pending(load, lengths)
        reader = ChainReader(*self._drafts.bind(load.targets), pending, self._cache, limit - 1)
        return propose(reader, limit, control, batch)

    def propose_tree(
        self, load: Load, lengths: Sequence[int], shape: TreeShape, batch: SamplingBatch
    ) -> TreeProposal:
        """Reads what is unread and extends each row, of `lengths` tokens, by a tree."""
        pending = self._pending(load, lengths)
        return propose_tree(TreeReader(*self._drafts.bind(load.targets), pending, self._cache), shape, batch)

    def _pending(self, load: Load, lengths: Sequence[int]) -> Pending:
        counts = self._unread[: len(lengths)]
        return Pending(
            tokens_BT=self._tokens_NT[: len(lengths), : max(counts)],
            hidden_BTH=self._hidden_NTH[: len(lengths), : max(counts)],
            rows=self._unread_rows(lengths),
            count=tuple(counts),
            limits=load.limits,
        )

    def remember(
        self, committed_BT: Tensor, hidden_BTH: Tensor, accepted: Sequence[int], *, was_read: bool
    ) -> None:
        """What a round committed replaces the unread tokens if they were read, or piles up behind them."""
        num_rows, width = committed_BT.shape
        if was_read:
            self._tokens_NT[:num_rows, :width] = committed_BT
            self._hidden_NTH[:num_rows, :width] = hidden_BTH
            self._unread[:num_rows] = [num + 1 for num in accepted]
            return
        rows = torch.arange(num_rows, device=committed_BT.device)
        at = torch.tensor(self._unread[:num_rows], device=committed_BT.device)
        self._tokens_NT[rows, at], self._hidden_NTH[rows, at] = committed_BT[:, 0], hidden_BTH[:, 0]
        self._unread[:num_rows] = [count + 1 for count in self._unread[:num_rows]]

    def move(self, move: Move) -> None:
        """Copies sequences to other slots."""
        sources, destinations = list(move.sources), list(move.destinations)
        self._cache.move(sources, destinations, move.length)
        self._tokens_NT[destinations] = self._tokens_NT[sources]
        self._hidden_NTH[destinations] = self._hidden_NTH[sources]
        unread = [self._unread[source] for source in sources]
        for destination, count in zip(destinations, unread, strict=True):
            self._unread[destination] = count

    def _unread_rows(self, lengths: Sequence[int]) -> Rows:
        pairs = zip(lengths, self._unread[: len(lengths)], strict=True)
        return Rows([length - 1 - count for length, count in pairs])
