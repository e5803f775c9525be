# B live rows, T tokens, K drafted tokens, H hidden, V vocabulary
"""One target, at most one draft and their caches: prefills prompts and runs rounds. Decides nothing about requests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farm.decode.control import Control, RoundResult
from farm.decode.penalties import Penalties, Said
from farm.decode.propose import DraftProposal, Pending, propose, run_draft
from farm.decode.sampling import ACCEPT, NEXT, SamplingBatch, distribution, draw
from farm.decode.scheduler import LiveRequest, Move, Prefill
from farm.decode.verify import Verdict, verify_greedy, verify_sampled
from farm.draft.lean import LeanDraft, LeanHead
from farm.draft.model import Draft, DraftHead
from farm.layers.cache import Rows, SlotCache
from farm.target.forward import TargetForward

CATCH_UP = 32  # committed tokens that a resting draft lets pile up before it reads them in one forward


@dataclass
class Seconds:
    """Where the time of an engine's steps went. `host` is what lies outside forwards and sampling."""

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    sample: float = 0.0
    host: float = 0.0


@dataclass(frozen=True)
class Round:
    """What a round committed: of row b `tokens[b][: accepted[b] + 1]`; hidden states [B, K + 1, H] of what it read."""

    tokens: list[list[int]]
    drafted: tuple[int, ...]
    accepted: list[int]
    hidden_BTH: Tensor
    result: RoundResult


class Runner:
    """Tensors of `num_slots` sequences of at most `max_length` tokens; all memory is taken here, once."""

    def __init__(
        self,
        target: TargetForward,
        draft: Draft | None,
        *,
        num_slots: int,
        max_length: int,
        max_drafted: int,
    ) -> None:
        if max_length > target.max_positions:
            raise ValueError(f"max_length {max_length} exceeds the target's {target.max_positions} positions")
        self.target, self.max_drafted = target, max_drafted
        self.draft = None if draft is None else LeanDraft(draft)
        self.head: LeanHead | None = None
        # A verification may write past the last token it keeps, a catch-up past the last one a row has.
        capacity = max_length + max_drafted + 1
        self.cache = target.new_cache(num_slots, capacity)
        self.draft_cache: SlotCache | None = None
        if self.draft is not None and draft is not None:
            pruned = DraftHead.of(target.embedding, target.head_weight, self.draft.vocabulary_C)
            self.head = LeanHead(pruned, target.head)
            shape = (draft.config.num_kv_heads, draft.config.head_dim)
            draft_capacity = capacity + CATCH_UP
            self.draft_cache = SlotCache(1, num_slots, draft_capacity, shape, target.dtype, target.device)
        # Committed tokens that the draft has not seen, beside the hidden states before them.
        self._pending_count = [0] * num_slots
        size = (num_slots, CATCH_UP + max_drafted + 1)
        self._pending_NT = torch.zeros(size, dtype=torch.int64, device=target.device)
        self._pending_NTH = torch.zeros(*size, target.hidden_size, dtype=target.dtype, device=target.device)
        self.seconds = Seconds()

    @property
    def num_bytes(self) -> int:
        """Of caches and pending hidden states; weights are the target's and the draft's."""
        draft = 0 if self.draft_cache is None else self.draft_cache.num_bytes
        return self.cache.num_bytes + draft + self._pending_NTH.nbytes + self._pending_NT.nbytes

    def prefill(self, prefill: Prefill) -> tuple[Tensor, list[int]]:
        """Processes prompt positions: their hidden states [B, T, H], and the next token of each prompt that ends."""
        started = time.perf_counter()
        num_rows, start = len(prefill.rows), prefill.start
        chunks = [row.tokens[start:end] for row, end in zip(prefill.rows, prefill.ends, strict=True)]
        rows = Rows([start] * num_rows, first=prefill.first)
        tokens_BT = _pad(chunks, self.target.device)
        hidden_BTH = self.target.forward(tokens_BT, rows, self.cache)
        last_B = torch.tensor([len(chunk) - 1 for chunk in chunks], device=self.target.device)
        last_BH = hidden_BTH[torch.arange(num_rows), last_B]
        if prefill.completes:
            next_B = self._first_tokens(last_BH, sampling_batch(prefill.rows))
        else:
            (row,), (end,) = prefill.rows, prefill.ends
            next_B = torch.tensor([row.tokens[end]], device=self.target.device)
        if self.draft is not None and self.head is not None and self.draft_cache is not None:
            shifted_BT = tokens_BT.roll(-1, dims=1).scatter(1, last_B[:, None], next_B[:, None])
            run_draft(self.draft, self.head, shifted_BT, hidden_BTH, rows, self.draft_cache)
        slots = slice(prefill.first, prefill.first + num_rows)
        self._pending_NT[slots, 0], self._pending_NTH[slots, 0] = next_B, last_BH
        self._pending_count[slots] = [1] * num_rows
        self.seconds.prefill += time.perf_counter() - started
        return hidden_BTH, next_B.tolist() if prefill.completes else []

    def run(self, tokens: Sequence[Sequence[int]], batch: SamplingBatch, control: Control) -> Round:
        """One round for the sequences in slots 0..B-1: propose, verify, and remember what the draft has to read next.

        `tokens` holds each whole sequence; the caches hold all of it but the last token.
        """
        times = [time.perf_counter()]
        lengths = [len(row) for row in tokens]
        limit = 0 if self.draft is None else min(self.max_drafted, control.limit(len(tokens)))
        drafted = self._propose(lengths, limit, control, batch)
        times.append(time.perf_counter())
        last_B1 = torch.tensor([[row[-1]] for row in tokens], device=self.target.device)
        rows = Rows([length - 1 for length in lengths])
        hidden_BTH = self.target.forward(torch.cat((last_B1, drafted.tokens_BK), dim=1), rows, self.cache)
        logits_BTV = self.target.logits(hidden_BTH)
        times.append(time.perf_counter())
        verdict = self._decide(drafted, logits_BTV, batch)
        committed_BT = torch.cat((drafted.tokens_BK, verdict.next_B[:, None]), dim=1)
        committed_BT.scatter_(1, verdict.num_accepted_B[:, None], verdict.next_B[:, None])
        committed, accepted = committed_BT.tolist(), verdict.num_accepted_B.tolist()
        times.append(time.perf_counter())
        self._remember(committed_BT, hidden_BTH, accepted, appended=drafted.forwards == 0)
        times.append(time.perf_counter())
        draft_s, verify_s, sample_s, host_s = (b - a for a, b in zip(times, times[1:], strict=False))
        self._count(draft_s, verify_s, sample_s, host_s)
        result = RoundResult(
            drafted.lengths, tuple(accepted), drafted.forwards, draft_s, verify_s + sample_s + host_s
        )
        return Round(committed, drafted.lengths, accepted, hidden_BTH, result)

    def move(self, move: Move) -> None:
        """Copies a sequence to another slot."""
        source, destination = move.source, move.destination
        self.cache.move(source, destination, move.length)
        if self.draft_cache is not None:
            self.draft_cache.move(source, destination, move.length)
        self._pending_count[destination] = self._pending_count[source]
        self._pending_NT[destination] = self._pending_NT[source]
        self._pending_NTH[destination] = self._pending_NTH[source]

    def _first_tokens(self, last_BH: Tensor, batch: SamplingBatch) -> Tensor:
        logits_BV = self.target.logits(last_BH)
        if batch.penalties is not None:
            logits_BV = batch.penalties.apply(logits_BV[:, None], [[]] * len(last_BH))[:, 0]
        if batch.greedy:
            return logits_BV.argmax(dim=-1)
        return draw(distribution(logits_BV, batch), batch.uniform(0, NEXT))

    def _propose(
        self, lengths: Sequence[int], limit: int, control: Control, batch: SamplingBatch
    ) -> DraftProposal:
        if self.draft is None or self.head is None or self.draft_cache is None:
            return DraftProposal.none(len(lengths), self.target.device)
        counts = self._pending_count[: len(lengths)]
        if limit == 0 and max(counts) < CATCH_UP:
            return DraftProposal.none(len(lengths), self.target.device)
        pending = Pending(
            tokens_BT=self._pending_NT[: len(lengths), : max(counts)],
            hidden_BTH=self._pending_NTH[: len(lengths), : max(counts)],
            rows=Rows([length - 1 - count for length, count in zip(lengths, counts, strict=True)]),
            count=tuple(counts),
        )
        return propose(self.draft, self.head, pending, self.draft_cache, limit, control, batch)

    def _decide(self, drafted: DraftProposal, logits_BTV: Tensor, batch: SamplingBatch) -> Verdict:
        lengths_B = torch.tensor(drafted.lengths, device=logits_BTV.device)
        if batch.penalties is not None:
            logits_BTV = batch.penalties.apply(logits_BTV, drafted.tokens_BK.tolist())
        if batch.greedy:
            return verify_greedy(drafted.tokens_BK, logits_BTV.argmax(dim=-1), lengths_B)
        p_BTV = distribution(logits_BTV.flatten(0, 1), batch.repeat(logits_BTV.shape[1])).view_as(logits_BTV)
        k = drafted.tokens_BK.shape[1]
        q_BKV = p_BTV[:, :0] if drafted.q_BKV is None else drafted.q_BKV
        accept_BK = torch.stack([batch.uniform(i, ACCEPT) for i in range(k)], dim=1) if k else p_BTV[:, :0, 0]
        next_B = batch.uniform(0, NEXT)
        return verify_sampled(drafted.tokens_BK, p_BTV, q_BKV, accept_BK, next_B, lengths_B)

    def _remember(
        self, committed_BT: Tensor, hidden_BTH: Tensor, accepted: Sequence[int], *, appended: bool
    ) -> None:
        """Committed tokens and the hidden states before them replace what the draft has read, or pile up behind it."""
        if self.draft is None:
            return
        num_rows, width = committed_BT.shape
        if not appended:
            self._pending_NT[:num_rows, :width], self._pending_NTH[:num_rows, :width] = (
                committed_BT,
                hidden_BTH,
            )
            self._pending_count[:num_rows] = [num + 1 for num in accepted]
            return
        rows = torch.arange(num_rows, device=committed_BT.device)
        at = torch.tensor(self._pending_count[:num_rows], device=committed_BT.device)
        self._pending_NT[rows, at], self._pending_NTH[rows, at] = committed_BT[:, 0], hidden_BTH[:, 0]
        self._pending_count[:num_rows] = [count + 1 for count in self._pending_count[:num_rows]]

    def _count(self, draft_s: float, verify_s: float, sample_s: float, host_s: float) -> None:
        self.seconds.draft += draft_s
        self.seconds.verify += verify_s
        self.seconds.sample += sample_s
        self.seconds.host += host_s


def sampling_batch(rows: Sequence[LiveRequest]) -> SamplingBatch:
    """The settings of live requests for their next round."""
    params = [row.request.params for row in rows]
    said = [Said(row.tokens, len(row.request.prompt_ids)) for row in rows]
    return SamplingBatch.of(params, [row.rounds for row in rows], Penalties.of(params, said))


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
