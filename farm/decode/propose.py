# B rows, T pending tokens, K drafted tokens, H hidden, C draft vocabulary, V vocabulary
"""Propose: a draft extends each row by a chain of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from farm.decode.chain import ChainProposal
from farm.decode.control import Control, Signal
from farm.decode.sampling import DRAFT, SamplingBatch, distribution, draw
from farm.draft.lean import LeanDraft
from farm.layers.cache import AnyRows, Rows, SlotCache


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

    Row b is extended by at most `limits[b]` tokens; with 0 it is read all the same.
    """

    tokens_BT: Tensor
    hidden_BTH: Tensor
    rows: Rows
    count: tuple[int, ...]
    limits: tuple[int, ...]


class Reader(Protocol):
    """A draft at work on a batch of chains; it has read what was pending."""

    @property
    def head(self) -> Head: ...

    @property
    def limits(self) -> tuple[int, ...]:
        """Most tokens that each row may draft."""
        ...

    @property
    def forwards(self) -> int:
        """Draft forwards so far."""
        ...

    def read(self, tokens_B: Tensor) -> None:
        """Reads the next drafted token of each row."""
        ...

    def logits(self) -> Tensor:
        """[B, C] after what was read last."""
        ...


def run_draft(
    draft: LeanDraft,
    head: Head,
    tokens_BT: Tensor,
    hidden_BTH: Tensor,
    rows: AnyRows,
    cache: SlotCache,
) -> Tensor:
    """Predicted hidden states [B, T, H]; the draft's cache is extended at the rows' positions."""
    window = cache.window(rows, tokens_BT.shape[1])
    site = window.site(draft.config.num_heads // draft.config.num_kv_heads)
    return draft(head.embed(tokens_BT), hidden_BTH, window.positions_BT, site)


class ChainReader:
    """The draft at work on a batch of chains; reads the pending tokens at once, then a drafted token a row at a time.

    Entries of drafted tokens come from predicted hidden states; the next round's pending tokens overwrite them with
    true ones. What the steps have in common is worked out once, for at most `num_steps` of them.
    """

    def __init__(
        self, draft: LeanDraft, head: Head, pending: Pending, cache: SlotCache, num_steps: int
    ) -> None:
        self.head, self.limits, self.forwards = head, pending.limits, 1
        self._draft = draft
        predicted_BTH = run_draft(draft, head, pending.tokens_BT, pending.hidden_BTH, pending.rows, cache)
        rows_B = torch.arange(len(pending.count), device=predicted_BTH.device)
        last_B = torch.tensor(pending.count, device=predicted_BTH.device) - 1
        self.hidden_BH = predicted_BTH[rows_B, last_B]
        if not num_steps:
            return
        starts = [start + count for start, count in zip(pending.rows.starts, pending.count, strict=True)]
        window = cache.window(Rows(starts, pending.rows.first), num_steps)
        self._rotations = draft.rotation(window.positions_BT).steps()
        self._sites = window.site(draft.config.num_heads // draft.config.num_kv_heads).steps()

    def read(self, tokens_B: Tensor) -> None:
        """Reads the next drafted token of each row; `hidden_BH` is then what follows it."""
        step = self.forwards - 1
        embedded_B1H, hidden_B1H = self.head.embed(tokens_B[:, None]), self.hidden_BH[:, None]
        read_B1H = self._draft.read(embedded_B1H, hidden_B1H, self._rotations[step], self._sites[step])
        self.hidden_BH = read_B1H[:, 0]
        self.forwards += 1

    def logits(self) -> Tensor:
        """[B, C] after what was read last."""
        return self.head.logits(self.hidden_BH)


@torch.inference_mode()
def propose(reader: Reader, limit: int, control: Control, batch: SamplingBatch) -> ChainProposal:
    """A chain of at most `limit` tokens a row behind what `reader` has read, as long as `control` lets it grow."""
    chain = _Chain(reader.head, control, batch, reader.limits)
    for index in range(limit):
        if index:
            if not control.more(index):
                break
            reader.read(chain.tokens[-1])
        logits_BC = reader.logits()
        if not chain.extend(logits_BC):
            break
    return chain.proposal(reader.forwards, logits_BC.device)


class _Chain:
    """Tokens drafted so far; a row that stopped gets padding while others go on."""

    def __init__(self, head: Head, control: Control, batch: SamplingBatch, limits: Sequence[int]) -> None:
        self._head, self._control, self._batch = head, control, batch
        self._limits, self._lengths, self._going = limits, [0] * len(limits), [True] * len(limits)
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
        best_B = None
        self._going = [going and index < most for going, most in zip(self._going, self._limits, strict=True)]
        if self._control.signal != "none":
            seen_BC = _seen(logits_BC, q_BC, batch)
            signal_B, best_B = _signal(seen_BC, self._control.signal)
            kept = self._control.keep(index, signal_B.tolist())
            self._going = [going and keep for going, keep in zip(self._going, kept, strict=True)]
            if not any(self._going):
                return False
        self._lengths = [length + going for length, going in zip(self._lengths, self._going, strict=True)]
        if q_BC is None:
            best_B = logits_BC.argmax(dim=-1) if best_B is None else best_B
            self.tokens.append(self._head.token_ids(best_B))
        else:
            self.tokens.append(self._head.token_ids(draw(q_BC, batch.uniform(index, DRAFT))))
            self._probabilities.append(expand(q_BC, self._head))
        return True

    def proposal(self, forwards: int, device: torch.device) -> ChainProposal:
        if not self.tokens:
            return replace(ChainProposal.none(len(self._lengths), device), forwards=forwards)
        q_BKV = torch.stack(self._probabilities, dim=1) if self._probabilities else None
        return ChainProposal(torch.stack(self.tokens, dim=1), q_BKV, tuple(self._lengths), forwards)


def _seen(logits_BC: Tensor, q_BC: Tensor | None, batch: SamplingBatch) -> Tensor:
    """The distributions that a control looks at.

    A greedy row's is the draft's own at temperature 1: the point mass that is proposed would never stop it.
    """
    if q_BC is None:
        return logits_BC.float().softmax(dim=-1)
    if bool((batch.temperature_B == 0).any()):
        hot_B1 = (batch.temperature_B > 0).to(q_BC.device)[:, None]
        return torch.where(hot_B1, q_BC, logits_BC.float().softmax(dim=-1))
    return q_BC


def _signal(seen_BC: Tensor, what: Signal) -> tuple[Tensor, Tensor | None]:
    """Of each row's distribution: its entropy in nats; or its largest probability, and the column that has it."""
    if what == "peak":
        peak_B, best_B = seen_BC.max(dim=-1)
        return peak_B, best_B
    return torch.special.entr(seen_BC).sum(dim=-1), None


def expand(q_BC: Tensor, head: Head) -> Tensor:
    """q over the full vocabulary: 0 for every token outside the draft vocabulary."""
    if head.vocabulary_C is None:
        return q_BC
    full_BV = q_BC.new_zeros(q_BC.shape[0], head.vocab_size)
    return full_BV.index_copy_(1, head.vocabulary_C, q_BC)
