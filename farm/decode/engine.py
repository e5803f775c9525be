# B live rows, T tokens, K drafted tokens, H hidden, V vocabulary
"""The decode engine: requests join and leave slots between rounds of propose, verify, commit.

It knows tokens, not text. One engine serves one target with at most one draft; without a draft it decodes one token
a round. A request's tokens depend on its own prompt, settings and seed, never on its neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from farm.decode.propose import DraftProposal, Pending, propose, run_draft
from farm.decode.sampling import ACCEPT, NEXT, SamplingBatch, SamplingParams, distribution, draw
from farm.decode.stats import DecodeStats
from farm.decode.verify import Verdict, verify_greedy, verify_sampled
from farm.draft.lean import LeanDraft
from farm.draft.model import Draft, DraftHead
from farm.layers.cache import Rows, SlotCache
from farm.target.forward import TargetForward

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One sequence to decode: token ids of the whole prompt, and how to sample."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Completion:
    """A finished request. `tokens` includes the stop token; `features` [len(prompt + tokens) - 1, H] if captured."""

    request_id: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: DecodeStats
    features: Tensor | None


@dataclass(frozen=True)
class Output:
    """What one round did for one request: new tokens without the stop token, and the end if it came."""

    request_id: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    completion: Completion | None = None


@dataclass
class LiveRequest:
    """A request in a slot. The target's cache holds every token but the last."""

    request: Request
    tokens: list[int]
    rounds: int = 0
    stats: DecodeStats = field(default_factory=DecodeStats)
    features: list[Tensor] = field(default_factory=list)

    @property
    def num_new(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)


class Engine:
    """Decodes requests of one target in `num_slots` slots of `max_length` positions each.

    Args:
        target: the target's forward.
        stop_ids: tokens that end a request.
        draft: proposes `k` tokens a round; None decodes plainly.
        capture: keep the target's hidden states of every processed token.
    """

    def __init__(
        self,
        target: TargetForward,
        stop_ids: frozenset[int],
        draft: Draft | None,
        *,
        num_slots: int,
        max_length: int,
        k: int,
        capture: bool = False,
    ) -> None:
        if max_length > target.max_positions:
            raise ValueError(f"max_length {max_length} exceeds the target's {target.max_positions} positions")
        self.target, self.stop_ids, self.capture = target, stop_ids, capture
        self.draft = None if draft is None else LeanDraft(draft)
        self.num_slots, self.max_length = num_slots, max_length
        self.k = k if draft is not None else 0
        vocabulary_C = None if self.draft is None else self.draft.vocabulary_C
        self.head = DraftHead.of(target.embedding, target.head_weight, vocabulary_C)
        capacity = max_length + self.k + 1  # a verification may write k tokens past the last one it keeps
        self.cache = target.new_cache(num_slots, capacity)
        self.draft_cache = None if draft is None else _draft_cache(draft, target, num_slots, capacity)
        self.stats = DecodeStats()
        self._waiting: deque[Request] = deque()
        self._live: list[LiveRequest] = []  # the sequence in slot b is _live[b]
        self._pending_count: list[int] = []  # committed tokens of slot b that the draft has not seen
        size = (num_slots, self.k + 1)
        self._pending_NT = torch.zeros(size, dtype=torch.int64, device=target.device)
        self._pending_NTH = torch.zeros(*size, target.hidden_size, dtype=target.dtype, device=target.device)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._live)

    @property
    def num_live(self) -> int:
        return len(self._live)

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError when its prompt is empty or leaves no room for a token."""
        if not request.prompt_ids:
            raise ValueError(f"request {request.id}: the prompt is empty")
        if len(request.prompt_ids) >= self.max_length:
            raise ValueError(
                f"request {request.id}: {len(request.prompt_ids)} prompt tokens leave no room in {self.max_length}"
            )
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Forgets a request, waiting or live; its slot is free for the next round."""
        self._waiting = deque(r for r in self._waiting if r.id != request_id)
        for slot, sequence in enumerate(self._live):
            if sequence.request.id == request_id:
                self._release(slot)
                return

    def run(self, requests: Iterable[Request]) -> list[Completion]:
        """Decodes all requests to their end, in the order given."""
        order = []
        for request in requests:
            self.add(request)
            order.append(request.id)
        finished = {}
        while self.has_work:
            for output in self.step():
                if output.completion is not None:
                    finished[output.request_id] = output.completion
        return [finished[request_id] for request_id in order]

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Admits waiting requests into free slots (their first token comes from the prefill), then one round."""
        outputs = self._admit()
        if not self._live:
            return outputs
        batch = SamplingBatch.of([s.request.params for s in self._live], [s.rounds for s in self._live])
        drafted = self._propose(batch)
        hidden_BTH, verdict = self._verify(drafted, batch)
        return outputs + self._commit(drafted.tokens_BK, verdict, hidden_BTH)

    def _admit(self) -> list[Output]:
        room = min(self.num_slots - len(self._live), len(self._waiting))
        if room == 0:
            return []
        requests = [self._waiting.popleft() for _ in range(room)]
        prompts = [request.prompt_ids for request in requests]
        rows = Rows([0] * room, first=len(self._live))
        tokens_BT = _pad(prompts, self.target.device)
        hidden_BTH = self.target.forward(tokens_BT, rows, self.cache)
        last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.target.device)
        last_BH = hidden_BTH[torch.arange(room), last_B]
        batch = SamplingBatch.of([request.params for request in requests], [0] * room)
        first_B = self._sample(self.target.logits(last_BH), batch)
        if self.draft is not None and self.draft_cache is not None:
            shifted_BT = tokens_BT.roll(-1, dims=1).scatter(1, last_B[:, None], first_B[:, None])
            run_draft(self.draft, self.head, shifted_BT, hidden_BTH, rows, self.draft_cache)
        self._pending_NT[rows.first : rows.first + room, 0] = first_B
        self._pending_NTH[rows.first : rows.first + room, 0] = last_BH
        self._pending_count += [1] * room
        for b, (request, first) in enumerate(zip(requests, first_B.tolist(), strict=True)):
            sequence = LiveRequest(request, [*request.prompt_ids, first], rounds=1)
            if self.capture:
                sequence.features.append(hidden_BTH[b, : len(request.prompt_ids)].clone())
            self._live.append(sequence)
        return self._emit([1] * room, first=len(self._live) - room)

    def _sample(self, logits_BV: Tensor, batch: SamplingBatch) -> Tensor:
        if batch.greedy:
            return logits_BV.argmax(dim=-1)
        return draw(distribution(logits_BV, batch), batch.uniform(0, NEXT))

    def _propose(self, batch: SamplingBatch) -> DraftProposal:
        if self.draft is None or self.draft_cache is None or self.k == 0:
            empty_B0 = torch.empty(len(self._live), 0, dtype=torch.int64, device=self.target.device)
            return DraftProposal(empty_B0, None)
        num_rows, width = len(self._live), max(self._pending_count)
        starts = [len(s.tokens) - 1 - count for s, count in zip(self._live, self._pending_count, strict=True)]
        pending = Pending(
            tokens_BT=self._pending_NT[:num_rows, :width],
            hidden_BTH=self._pending_NTH[:num_rows, :width],
            rows=Rows(starts),
            count=tuple(self._pending_count),
        )
        return propose(self.draft, self.head, pending, self.draft_cache, self.k, batch)

    def _verify(self, drafted: DraftProposal, batch: SamplingBatch) -> tuple[Tensor, Verdict]:
        last_B1 = torch.tensor([[s.tokens[-1]] for s in self._live], device=self.target.device)
        rows = Rows([len(s.tokens) - 1 for s in self._live])
        hidden_BTH = self.target.forward(torch.cat((last_B1, drafted.tokens_BK), dim=1), rows, self.cache)
        logits_BTV = self.target.logits(hidden_BTH)
        if batch.greedy:
            return hidden_BTH, verify_greedy(drafted.tokens_BK, logits_BTV.argmax(dim=-1))
        p_BTV = distribution(logits_BTV.flatten(0, 1), batch.repeat(logits_BTV.shape[1])).view_as(logits_BTV)
        k = drafted.tokens_BK.shape[1]
        q_BKV = p_BTV[:, :0] if drafted.q_BKV is None else drafted.q_BKV
        accept_BK = torch.stack([batch.uniform(i, ACCEPT) for i in range(k)], dim=1) if k else p_BTV[:, :0, 0]
        return hidden_BTH, verify_sampled(drafted.tokens_BK, p_BTV, q_BKV, accept_BK, batch.uniform(k, NEXT))

    def _commit(self, drafted_BK: Tensor, verdict: Verdict, hidden_BTH: Tensor) -> list[Output]:
        num_rows, accepted = len(self._live), verdict.num_accepted_B.tolist()
        committed_BT = torch.cat((drafted_BK, verdict.next_B[:, None]), dim=1)
        committed_BT.scatter_(1, verdict.num_accepted_B[:, None], verdict.next_B[:, None])
        self._pending_NT[:num_rows], self._pending_NTH[:num_rows] = committed_BT, hidden_BTH
        self._pending_count = [num + 1 for num in accepted]
        num_kept = []
        for slot, (sequence, committed) in enumerate(zip(self._live, committed_BT.tolist(), strict=True)):
            new = self._cut(sequence, committed[: accepted[slot] + 1])
            sequence.tokens += new
            sequence.rounds += 1
            num_kept.append(len(new))
            for stats in (sequence.stats, self.stats):
                stats.count(drafted_BK.shape[1], accepted[slot], len(new))
            if self.capture:
                sequence.features.append(hidden_BTH[slot, : len(new)].clone())
        return self._emit(num_kept)

    def _cut(self, sequence: LiveRequest, new: list[int]) -> list[int]:
        """The new tokens up to a stop token, the request's limit or the slot's end."""
        room = min(
            sequence.request.params.max_new_tokens - sequence.num_new, self.max_length - len(sequence.tokens)
        )
        new = new[:room]
        for index, token in enumerate(new):
            if token in self.stop_ids:
                return new[: index + 1]
        return new

    def _emit(self, num_kept: Sequence[int], first: int = 0) -> list[Output]:
        """Outputs of the slots from `first` on, each for its last `num_kept` tokens; ended ones leave their slot."""
        outputs, ended = [], []
        for slot, kept in enumerate(num_kept, start=first):
            sequence = self._live[slot]
            new, reason = sequence.tokens[len(sequence.tokens) - kept :], self._finish_reason(sequence)
            visible = tuple(new[:-1] if reason == "stop" else new)
            completion = None if reason is None else _complete(sequence, reason)
            outputs.append(Output(sequence.request.id, visible, reason, completion))
            if reason is not None:
                ended.append(slot)
        for slot in reversed(ended):
            self._release(slot)
        return outputs

    def _finish_reason(self, sequence: LiveRequest) -> FinishReason | None:
        if sequence.tokens[-1] in self.stop_ids:
            return "stop"
        full = len(sequence.tokens) >= self.max_length
        return "length" if full or sequence.num_new >= sequence.request.params.max_new_tokens else None

    def _release(self, slot: int) -> None:
        """Frees a slot by moving the last live sequence into it, so that live slots stay contiguous."""
        last = len(self._live) - 1
        if slot != last:
            length = len(self._live[last].tokens)
            self.cache.move(last, slot, length)
            if self.draft_cache is not None:
                self.draft_cache.move(last, slot, length)
            self._live[slot], self._pending_count[slot] = self._live[last], self._pending_count[last]
            self._pending_NT[slot], self._pending_NTH[slot] = self._pending_NT[last], self._pending_NTH[last]
        self._live.pop()
        self._pending_count.pop()


def _draft_cache(draft: Draft, target: TargetForward, num_slots: int, capacity: int) -> SlotCache:
    shape = (draft.config.num_kv_heads, draft.config.head_dim)
    return SlotCache(1, num_slots, capacity, shape, target.dtype, target.device)


def _complete(sequence: LiveRequest, reason: FinishReason) -> Completion:
    new = tuple(sequence.tokens[len(sequence.request.prompt_ids) :])
    features = torch.cat(sequence.features) if sequence.features else None
    return Completion(sequence.request.id, new, reason, sequence.stats, features)


def _pad(prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    width = max(len(prompt) for prompt in prompts)
    return torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device)
