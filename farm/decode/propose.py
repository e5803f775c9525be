# B rows, T pending tokens, K drafted tokens, H hidden, C draft vocabulary, V vocabulary
"""Propose: a draft extends each row by a chain of tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from farm.decode.chain import ChainProposal
from farm.decode.control import Control, Signal
from farm.decode.growth import Growth
from farm.decode.sampling import DRAFT, SamplingBatch, distribution, draw
from farm.decode.verify import prefix_length
from farm.draft.lean import Ends, LeanDraft
from farm.layers.cache import AnyRows, Rows, SlotCache
from farm.layers.foreteller import Chain, Foreteller


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


class Told(NamedTuple):
    """What follows the last token that each row of a draft has read."""

    logits_BC: Tensor
    best_B: Tensor | None = None  # token id of the largest logit, where it came with them


class Reader(Protocol):
    """A draft at work on a batch of chains; it has read what was pending."""

    @property
    def head(self) -> Ends: ...

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

    @property
    def told(self) -> Told:
        """What follows what was read last."""
        ...

    def whole(self, growth: Growth | None) -> Chain | None:
        """The likeliest chains in one call, by a rule or to the limit; None where it goes token by token."""
        ...


def run_draft(
    draft: LeanDraft,
    head: Ends,
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
        self, draft: LeanDraft, head: Ends, pending: Pending, cache: SlotCache, num_steps: int
    ) -> None:
        self.head, self.limits, self.forwards = head, pending.limits, 1
        self._draft, self._group = draft, draft.config.num_heads // draft.config.num_kv_heads
        read_BTH = run_draft(draft, head, pending.tokens_BT, pending.hidden_BTH, pending.rows, cache)
        rows_B = torch.arange(len(pending.count), device=read_BTH.device)
        self._hidden_BH = read_BTH[rows_B, torch.tensor(pending.count, device=read_BTH.device) - 1]
        if not num_steps:
            return
        starts = [start + count for start, count in zip(pending.rows.starts, pending.count, strict=True)]
        window = cache.window(Rows(starts, pending.rows.first), num_steps)
        self._rotations = draft.rotation(window.positions_BT).steps()
        self._sites = window.site(self._group).steps()

    def read(self, tokens_B: Tensor) -> None:
        """Reads the next drafted token of each row."""
        step, embedded_B1H = self.forwards - 1, self.head.embed(tokens_B[:, None])
        hidden_B1H, rotation = self._hidden_BH[:, None], self._rotations[step]
        self._hidden_BH = self._draft.read(embedded_B1H, hidden_B1H, rotation, self._sites[step])[:, 0]
        self.forwards += 1

    @property
    def told(self) -> Told:
        """What follows what was read last."""
        return Told(self.head.logits(self._hidden_BH))

    def whole(self, growth: Growth | None) -> None:
        """Operators go token by token."""


class FusedChainReader:
    """As ChainReader, every token a row in one call of the kernels, or all of them."""

    def __init__(self, foreteller: Foreteller, head: Ends, pending: Pending) -> None:
        self.head, self.limits, self.forwards = head, pending.limits, 0
        self._foreteller, self._pending = foreteller, pending

    def whole(self, growth: Growth | None) -> Chain:
        """The likeliest chains in one call."""
        pending = self._pending
        chain = self._foreteller.chain(
            pending.tokens_BT, pending.hidden_BTH, pending.rows, pending.count, growth
        )
        self.forwards = chain.forwards
        return chain

    def read(self, tokens_B: Tensor) -> None:
        """Reads the next drafted token of each row."""
        self._foreteller.step(tokens_B)
        self.forwards += 1

    @property
    def told(self) -> Told:
        """What follows what was read last."""
        if not self.forwards:
            pending, self.forwards = self._pending, 1
            self._foreteller.begin(pending.tokens_BT, pending.hidden_BTH, pending.rows, pending.count)
        return Told(self._foreteller.logits_BC, self._foreteller.best_B)


def chain_reader(
    draft: LeanDraft, head: Ends, pending: Pending, cache: SlotCache, num_steps: int
) -> ChainReader | FusedChainReader:
    """The draft at work on a batch of chains, as fast as this machine has it."""
    foreteller = draft.foreteller(head, cache, num_steps)
    if foreteller is None:
        return ChainReader(draft, head, pending, cache, num_steps)
    return FusedChainReader(foreteller, head, pending)


@torch.inference_mode()
def propose(reader: Reader, limit: int, control: Control, batch: SamplingBatch) -> ChainProposal:
    """A chain of at most `limit` tokens a row behind what `reader` has read, as long as `control` lets it grow."""
    if batch.greedy and batch.penalties is None and (control.signal == "none" or control.growth is not None):
        whole = reader.whole(control.growth)
        if whole is not None:
            lengths = tuple(min(most, whole.tokens_BK.shape[1]) for most in reader.limits)
            return ChainProposal(whole.tokens_BK, None, lengths, whole.forwards, whole.peaks)
    chain = _Chain(reader.head, control, batch, reader.limits)
    for index in range(limit):
        if index:
            if not control.more(index):
                break
            reader.read(chain.tokens[-1])
        told = reader.told
        if not chain.extend(told):
            break
    return chain.proposal(reader.forwards, told.logits_BC.device)


class _Chain:
    """Tokens drafted so far; a row that stopped gets padding while others go on."""

    def __init__(self, head: Ends, control: Control, batch: SamplingBatch, limits: Sequence[int]) -> None:
        self._head, self._control, self._batch = head, control, batch
        self._limits, self._lengths, self._going = limits, [0] * len(limits), [True] * len(limits)
        self.tokens: list[Tensor] = []
        self._signals: list[list[float]] = []
        self._probabilities: list[Tensor] = []
        self._sound: list[Tensor] = []

    @functools.cached_property
    def _luck(self) -> Tensor:
        """u [B, K] that the tokens are drawn by: of a whole chain at once, since few numbers cost as much as many."""
        return self._batch.uniforms(max(self._limits), DRAFT)

    def extend(self, told: Told) -> bool:
        """Adds a position to the rows that keep it; False when none does. What stops a row is seen before drawing."""
        index, batch, logits_BC = len(self.tokens), self._batch, told.logits_BC
        if batch.penalties is not None:
            told = Told(logits_BC)
            drafted = torch.stack(self.tokens, dim=1).tolist() if self.tokens else [[]] * len(self._lengths)
            vocabulary_C = self._head.vocabulary_C
            logits_BC = batch.penalties.apply(logits_BC[:, None], drafted, index, vocabulary_C)[:, 0]
        q_BC = None if batch.greedy else self._trusted(distribution(logits_BC, batch))
        best_B = told.best_B if batch.greedy else None
        self._going = [going and index < most for going, most in zip(self._going, self._limits, strict=True)]
        if self._control.signal != "none":
            signal_B = _signal(_seen(logits_BC, q_BC, batch), self._control.signal)
            self._signals.append(signal_B.tolist())
            kept = self._control.keep(index, self._signals[-1])
            self._going = [going and keep for going, keep in zip(self._going, kept, strict=True)]
            if not any(self._going):
                return False
        self._lengths = [length + going for length, going in zip(self._lengths, self._going, strict=True)]
        if q_BC is None:
            self.tokens.append(self._head.token_ids(logits_BC.argmax(dim=-1)) if best_B is None else best_B)
        else:
            self.tokens.append(self._head.token_ids(draw(q_BC, self._luck[:, index])))
            self._probabilities.append(expand(q_BC, self._head))
        return True

    def _trusted(self, q_BC: Tensor) -> Tensor:
        """q, and anything in place of what is no number: such a row ends before it, and what it draws is padding."""
        sound_B1 = q_BC.isfinite().all(dim=-1, keepdim=True)
        self._sound.append(sound_B1)
        return torch.where(sound_B1, q_BC, 1 / q_BC.shape[1])

    def proposal(self, forwards: int, device: torch.device) -> ChainProposal:
        if not self.tokens:
            none = ChainProposal.none(len(self._lengths), device)
            return replace(none, forwards=forwards, signals=self._signals)
        q_BKV = torch.stack(self._probabilities, dim=1) if self._probabilities else None
        lengths = self._lengths
        if self._sound:  # asked once a chain, since asking waits for the device
            lengths = list(map(min, lengths, prefix_length(torch.cat(self._sound, dim=1)).tolist()))
        tokens_BK = torch.stack(self.tokens, dim=1)
        return ChainProposal(tokens_BK, q_BKV, tuple(lengths), forwards, self._signals)


def _seen(logits_BC: Tensor, q_BC: Tensor | None, batch: SamplingBatch) -> Tensor:
    """The distributions that a control looks at.

    A greedy row's is the draft's own at temperature 1: the point mass that is proposed would never stop it.
    """
    if q_BC is None:
        return logits_BC.float().softmax(dim=-1)
    if bool((batch.columns.temperature_B == 0).any()):
        hot_B1 = (batch.columns.temperature_B > 0).to(q_BC.device)[:, None]
        return torch.where(hot_B1, q_BC, logits_BC.float().softmax(dim=-1))
    return q_BC


def _signal(seen_BC: Tensor, what: Signal) -> Tensor:
    """Of each row's distribution: its largest probability, or its entropy in nats."""
    return seen_BC.amax(dim=-1) if what == "peak" else torch.special.entr(seen_BC).sum(dim=-1)


def expand(q_BC: Tensor, head: Ends) -> Tensor:
    """q over the full vocabulary: 0 for every token outside the draft vocabulary."""
    if head.vocabulary_C is None:
        return q_BC
    full_BV = q_BC.new_zeros(q_BC.shape[0], head.vocab_size)
    return full_BV.index_copy_(1, head.vocabulary_C, q_BC)
