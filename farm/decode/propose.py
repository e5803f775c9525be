# B rows, T pending tokens, K drafted tokens, H hidden, C draft vocabulary, V vocabulary
"""Propose: a draft extends each row by a chain of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from farm.decode.control import Control, Signal
from farm.decode.sampling import DRAFT, SamplingBatch, distribution, draw
from farm.draft.lean import LeanDraft
from farm.draft.model import Draft
from farm.layers.cache import Rows, SlotCache


class Head(Protocol):
    """Embedding and head of the rows' targets as a draft uses them; the head may be pruned to a draft vocabulary."""

    @property
    def vocabulary_C(self) -> Tensor | None:  # noqa: N802 - a tensor's name carries its shape
        """Token id of each column of the logits; None: all."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, ..., H] of token ids [B, ...]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, ..., C] of hidden states [B, ..., H]."""
        ...

    def token_ids(self, columns: Tensor) -> Tensor:
        """Token ids of columns of `logits`."""
        ...


@dataclass(frozen=True)
class Pending:
    """Committed tokens that the draft has not seen: x_{t+1} beside the target's h_t, `count[b]` of them real.

    Rows that `drafts` leaves out are read but not extended.
    """

    tokens_BT: Tensor
    hidden_BTH: Tensor
    rows: Rows
    count: tuple[int, ...]
    drafts: tuple[bool, ...]


@dataclass(frozen=True)
class DraftProposal:
    """Drafted chains of K columns, of which row b has `lengths[b]`; the rest of a row is padding.

    `q_BKV` are the distributions that sampled tokens were drawn from, over the full vocabulary. `forwards` counts the
    draft forwards, 0 when the draft has read nothing.
    """

    tokens_BK: Tensor
    q_BKV: Tensor | None
    lengths: tuple[int, ...]
    forwards: int

    @classmethod
    def none(cls, num_rows: int, device: torch.device) -> DraftProposal:
        """Nothing drafted and nothing read."""
        return cls(torch.empty(num_rows, 0, dtype=torch.int64, device=device), None, (0,) * num_rows, 0)


def run_draft(
    draft: Draft | LeanDraft,
    head: Head,
    tokens_BT: Tensor,
    hidden_BTH: Tensor,
    rows: Rows,
    cache: SlotCache,
) -> Tensor:
    """Predicted hidden states [B, T, H]; the draft's cache is extended at the rows' positions."""
    window = cache.window(rows, tokens_BT.shape[1])
    group = draft.config.num_heads // draft.config.num_kv_heads
    mask_B1TS = window.mask(group, hidden_BTH.dtype)

    def remember(kv_BTPD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return *window.write(0, kv_BTPD), mask_B1TS

    predicted: Tensor = draft(head.embed(tokens_BT), hidden_BTH, window.positions_BT, remember)
    return predicted


@torch.inference_mode()
def propose(
    draft: Draft | LeanDraft,
    head: Head,
    pending: Pending,
    cache: SlotCache,
    limit: int,
    control: Control,
    batch: SamplingBatch,
) -> DraftProposal:
    """A chain of at most `limit` tokens a row, as long as `control` lets it grow.

    Entries that the chain writes into `cache` come from predicted hidden states; the next round's pending tokens
    overwrite them with true ones.
    """
    predicted_BTH = run_draft(draft, head, pending.tokens_BT, pending.hidden_BTH, pending.rows, cache)
    last_B = torch.tensor(pending.count, device=predicted_BTH.device) - 1
    hidden_BH = predicted_BTH[torch.arange(len(pending.count)), last_B]
    starts = [start + count - 1 for start, count in zip(pending.rows.starts, pending.count, strict=True)]
    chain = _Chain(head, control, batch, pending.drafts)
    forwards = 1
    for index in range(limit):
        if index:
            if not control.more(index):
                break
            rows = Rows([start + index for start in starts], pending.rows.first)
            hidden_BH = run_draft(draft, head, chain.tokens[-1][:, None], hidden_BH[:, None], rows, cache)[
                :, 0
            ]
            forwards += 1
        if not chain.extend(head.logits(hidden_BH)):
            break
    return chain.proposal(forwards, hidden_BH.device)


class _Chain:
    """Tokens drafted so far; a row that stopped gets padding while others go on."""

    def __init__(self, head: Head, control: Control, batch: SamplingBatch, drafts: Sequence[bool]) -> None:
        self._head, self._control, self._batch = head, control, batch
        self._lengths, self._going = [0] * len(drafts), list(drafts)
        self.tokens: list[Tensor] = []
        self._probabilities: list[Tensor] = []

    def extend(self, logits_BC: Tensor) -> bool:
        """Adds a position to the rows that keep it; False when none does. What stops a row is seen before drawing."""
        index, batch = len(self.tokens), self._batch
        if batch.penalties is not None:
            drafted = torch.stack(self.tokens, dim=1).tolist() if self.tokens else [[]] * len(self._lengths)
            vocabulary_C = self._head.vocabulary_C
            logits_BC = batch.penalties.apply(logits_BC[:, None], drafted, index, vocabulary_C)[:, 0]
        q_BC = None if batch.greedy else distribution(logits_BC, batch)
        if self._control.signal != "none":
            kept = self._control.keep(index, _signal(logits_BC, q_BC, batch, self._control.signal))
            self._going = [going and keep for going, keep in zip(self._going, kept, strict=True)]
            if not any(self._going):
                return False
        self._lengths = [length + going for length, going in zip(self._lengths, self._going, strict=True)]
        if q_BC is None:
            self.tokens.append(self._head.token_ids(logits_BC.argmax(dim=-1)))
        else:
            self.tokens.append(self._head.token_ids(draw(q_BC, batch.uniform(index, DRAFT))))
            self._probabilities.append(expand(q_BC, self._head))
        return True

    def proposal(self, forwards: int, device: torch.device) -> DraftProposal:
        if not self.tokens:
            return replace(DraftProposal.none(len(self._lengths), device), forwards=forwards)
        q_BKV = torch.stack(self._probabilities, dim=1) if self._probabilities else None
        return DraftProposal(torch.stack(self.tokens, dim=1), q_BKV, tuple(self._lengths), forwards)


def _signal(logits_BC: Tensor, q_BC: Tensor | None, batch: SamplingBatch, what: Signal) -> list[float]:
    """Of each row's distribution: its entropy in nats, or its largest probability.

    A greedy row's is the draft's own at temperature 1: the point mass that is proposed would never stop it.
    """
    if q_BC is None:
        q_BC = logits_BC.float().softmax(dim=-1)
    elif bool((batch.temperature_B == 0).any()):
        hot_B1 = (batch.temperature_B > 0).to(q_BC.device)[:, None]
        q_BC = torch.where(hot_B1, q_BC, logits_BC.float().softmax(dim=-1))
    values_B = q_BC.amax(dim=-1) if what == "peak" else torch.special.entr(q_BC).sum(dim=-1)
    values: list[float] = values_B.tolist()
    return values


def expand(q_BC: Tensor, head: Head) -> Tensor:
    """q over the full vocabulary: 0 for every token outside the draft vocabulary."""
    if head.vocabulary_C is None:
        return q_BC
    full_BV = q_BC.new_zeros(q_BC.shape[0], head.vocab_size)
    return full_BV.index_copy_(1, head.vocabulary_C, q_BC)
