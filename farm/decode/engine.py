# H hidden
"""The decode engine: requests join and leave slots between rounds of propose, verify, commit.

It knows tokens, not text. One engine serves one target with at most one draft; without a draft it decodes one token
a round. A request's random numbers depend on its own seed and rounds, never on its neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farm.decode.control import Control, Fixed
from farm.decode.runner import Round, Runner, Seconds, sampling_batch
from farm.decode.scheduler import FinishReason as FinishReason
from farm.decode.scheduler import LiveRequest, Move, Prefill, Scheduler
from farm.decode.scheduler import Request as Request
from farm.decode.stats import DecodeStats
from farm.draft.model import Draft
from farm.target.forward import TargetForward

PREFILL_TOKENS = 512
OFFLINE_PREFILL_TOKENS = 4096  # where nobody waits for the next token


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
    """What one step did for one request: new tokens without the stop token, and the end if it came."""

    request_id: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    completion: Completion | None = None


class Engine:
    """Decodes requests of one target in `num_slots` slots of `max_length` positions each.

    Args:
        target: the target's forward.
        stop_ids: tokens that end a request.
        draft: proposes tokens; None decodes plainly.
        k: most tokens that a round drafts.
        control: how many it does draft; None: always `k`.
        prefill_tokens: prompt tokens processed in one step beside its round.
        capture: keep the target's hidden states of every processed token.
    """

    def __init__(  # noqa: PLR0913 - the knobs of decoding, each with a name
        self,
        target: TargetForward,
        stop_ids: frozenset[int],
        draft: Draft | None,
        *,
        num_slots: int,
        max_length: int,
        k: int,
        control: Control | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        capture: bool = False,
    ) -> None:
        self.capture = capture
        self.control = Fixed(k) if control is None else control
        self.scheduler = Scheduler(
            stop_ids, num_slots=num_slots, max_length=max_length, prefill_tokens=prefill_tokens
        )
        self.runner = Runner(
            target, draft,
            num_slots=num_slots, max_length=max_length, max_drafted=k if draft is not None else 0,
        )  # fmt: skip
        self.stats = DecodeStats()
        self._features: dict[str, list[Tensor]] = {}

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def num_live(self) -> int:
        return len(self.scheduler.live)

    @property
    def seconds(self) -> Seconds:
        """Where the time of all steps went."""
        return self.runner.seconds

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError when its prompt is empty or leaves no room for a token."""
        self.scheduler.add(request)

    def cancel(self, request_id: str) -> None:
        """Forgets a request, waiting or live; its slot is free for the next step."""
        self._move(self.scheduler.cancel(request_id))
        self._features.pop(request_id, None)

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
        """Prefills waiting prompts (their first token comes from that), then one round for all that decode."""
        started, on_tensors = time.perf_counter(), self.seconds.on_tensors
        outputs: list[Output] = []
        for prefill in self.scheduler.prefills():
            outputs += self._prefill(prefill)
        live = self.scheduler.live
        if live:
            done = self.runner.run([s.tokens for s in live], sampling_batch(live), self.control)
            self.control.observe(done.result)
            outputs += self._commit(done)
        self.seconds.host += time.perf_counter() - started - (self.seconds.on_tensors - on_tensors)
        return outputs

    def _prefill(self, prefill: Prefill) -> list[Output]:
        hidden_BTH, first = self.runner.prefill(prefill)
        if self.capture:
            for b, (row, end) in enumerate(zip(prefill.rows, prefill.ends, strict=True)):
                kept_TH = hidden_BTH[b, : end - prefill.start].clone()
                self._features.setdefault(row.request.id, []).append(kept_TH)
        self._move(self.scheduler.prefilled(prefill))
        if not first:
            return []
        slots = range(len(self.scheduler.live) - len(first), len(self.scheduler.live))
        for slot, token in zip(slots, first, strict=True):
            self.scheduler.commit(slot, [token])
        return self._emit(slots, [1] * len(first))

    def _commit(self, done: Round) -> list[Output]:
        kept = []
        for slot, sequence in enumerate(list(self.scheduler.live)):
            drafted, accepted = done.result.drafted[slot], done.result.accepted[slot]
            new = self.scheduler.commit(slot, done.tokens[slot][: accepted + 1])
            kept.append(len(new))
            for stats in (sequence.stats, self.stats):
                stats.count(drafted, accepted, len(new))
            if self.capture:
                self._features[sequence.request.id].append(done.hidden_BTH[slot, : len(new)].clone())
        return self._emit(range(len(kept)), kept)

    def _emit(self, slots: Sequence[int], num_kept: Sequence[int]) -> list[Output]:
        """Outputs of the slots, each for its last tokens; sequences at their end leave."""
        outputs, ended = [], []
        for slot, kept in zip(slots, num_kept, strict=True):
            sequence, reason = self.scheduler.live[slot], self.scheduler.finish_reason(slot)
            new = sequence.tokens[len(sequence.tokens) - kept :]
            visible = tuple(new[:-1] if reason == "stop" else new)
            completion = None if reason is None else self._complete(sequence, reason)
            outputs.append(Output(sequence.request.id, visible, reason, completion))
            if reason is not None:
                ended.append(slot)
        for slot in reversed(ended):
            self._move(self.scheduler.release(slot))
        return outputs

    def _complete(self, sequence: LiveRequest, reason: FinishReason) -> Completion:
        new = tuple(sequence.tokens[len(sequence.request.prompt_ids) :])
        kept = self._features.pop(sequence.request.id, None)
        features = torch.cat(kept) if kept else None
        return Completion(sequence.request.id, new, reason, sequence.stats, features)

    def _move(self, move: Move | None) -> None:
        if move is not None:
            self.runner.move(move)
