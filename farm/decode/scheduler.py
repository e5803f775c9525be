"""Which request runs where: slots, admissions, limits and ends. Holds no tensors.

Sequences that decode are in slots 0..D-1, so that a round reads caches through views. A prompt longer than a step's
prefill budget is worked off in chunks in the top slot, while the others go on decoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from farm.decode.sampling import SamplingParams
from farm.decode.stats import DecodeStats

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One sequence to decode: token ids of the whole prompt, and how to sample."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams


@dataclass
class LiveRequest:
    """A request in a slot. The target's cache holds every token but the last once its prompt is prefilled."""

    request: Request
    tokens: list[int]
    rounds: int = 0
    stats: DecodeStats = field(default_factory=DecodeStats)

    @property
    def num_new(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)


@dataclass(frozen=True)
class Prefill:
    """Prompt positions to process: of row b in slot `first + b`, those from `start` up to `ends[b]`."""

    first: int
    rows: tuple[LiveRequest, ...]
    start: int
    ends: tuple[int, ...]

    @property
    def completes(self) -> bool:
        """Whether these prompts end here: rows of a prefill end together, or there is only one."""
        return self.ends[0] == len(self.rows[0].request.prompt_ids)


@dataclass(frozen=True)
class Move:
    """Copy the first `length` positions of slot `source` to slot `destination`."""

    source: int
    destination: int
    length: int


class Scheduler:
    """Slots and queues of one engine.

    Args:
        prefill_tokens: prompt tokens that one step may process beside its decoding, at least one prompt's chunk.
    """

    def __init__(
        self, stop_ids: frozenset[int], *, num_slots: int, max_length: int, prefill_tokens: int
    ) -> None:
        self.stop_ids, self.num_slots, self.max_length = stop_ids, num_slots, max_length
        self.prefill_tokens = prefill_tokens
        self.live: list[LiveRequest] = []  # decoding; the sequence in slot b is live[b]
        self._waiting: deque[Request] = deque()
        self._chunked: LiveRequest | None = None  # in the top slot, its prompt not yet processed
        self._num_chunked = 0  # prompt tokens of it that are

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self.live or self._chunked)

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError when its prompt is empty or leaves no room for a token."""
        if not request.prompt_ids:
            raise ValueError(f"request {request.id}: the prompt is empty")
        if len(request.prompt_ids) >= self.max_length:
            raise ValueError(
                f"request {request.id}: {len(request.prompt_ids)} prompt tokens leave no room in {self.max_length}"
            )
        self._waiting.append(request)

    def cancel(self, request_id: str) -> Move | None:
        """Forgets a request wherever it is; its slot is free for the next step."""
        self._waiting = deque(r for r in self._waiting if r.id != request_id)
        if self._chunked is not None and self._chunked.request.id == request_id:
            self._chunked = None
        for slot, sequence in enumerate(self.live):
            if sequence.request.id == request_id:
                return self.release(slot)
        return None

    def prefills(self) -> Iterator[Prefill]:
        """What of the waiting prompts this step processes: the next chunk of a long one, then whole short ones.

        Each is to be processed and reported to `prefilled` before the next is asked for.
        """
        budget = self.prefill_tokens
        if self._chunked is None and self._waiting and self._is_long(self._waiting[0]) and self._room() > 0:
            request = self._waiting.popleft()
            self._chunked, self._num_chunked = LiveRequest(request, list(request.prompt_ids)), 0
        if self._chunked is not None:
            start = self._num_chunked
            end = min(start + budget, len(self._chunked.tokens))
            budget -= end - start
            yield Prefill(self.num_slots - 1, (self._chunked,), start, (end,))
        rows, widest = list[LiveRequest](), 0
        while self._waiting and self._room() > len(rows) and not self._is_long(self._waiting[0]):
            widest = max(widest, len(self._waiting[0].prompt_ids))
            if widest * (len(rows) + 1) > budget:
                break
            request = self._waiting.popleft()
            rows.append(LiveRequest(request, list(request.prompt_ids)))
        if rows:
            ends = tuple(len(row.tokens) for row in rows)
            yield Prefill(len(self.live), tuple(rows), 0, ends)

    def prefilled(self, prefill: Prefill) -> Move | None:
        """Takes note of a processed prefill: its sequences decode from now on, or its next chunk is due."""
        if not prefill.completes:
            self._num_chunked = prefill.ends[0]
            return None
        move = None
        if prefill.rows[0] is self._chunked:
            self._chunked, slot = None, len(self.live)
            if slot != prefill.first:
                move = Move(prefill.first, slot, prefill.ends[0])
        self.live += prefill.rows
        return move

    def commit(self, slot: int, tokens: Sequence[int]) -> list[int]:
        """Appends what a round committed, up to a stop token, the request's limit or the slot's end; what was kept."""
        sequence = self.live[slot]
        room = min(
            sequence.request.params.max_new_tokens - sequence.num_new, self.max_length - len(sequence.tokens)
        )
        kept = list(tokens[:room])
        for index, token in enumerate(kept):
            if self._stops(sequence, token):
                kept = kept[: index + 1]
                break
        sequence.tokens += kept
        sequence.rounds += 1
        return kept

    def finish_reason(self, slot: int) -> FinishReason | None:
        """Why the sequence in `slot` is at its end, or None."""
        sequence = self.live[slot]
        if self._stops(sequence, sequence.tokens[-1]):
            return "stop"
        full = len(sequence.tokens) >= self.max_length
        return "length" if full or sequence.num_new >= sequence.request.params.max_new_tokens else None

    def release(self, slot: int) -> Move | None:
        """Frees a slot; the last decoding sequence moves into it."""
        last = len(self.live) - 1
        move = None if slot == last else Move(last, slot, len(self.live[last].tokens))
        self.live[slot] = self.live[last]
        self.live.pop()
        return move

    def _stops(self, sequence: LiveRequest, token: int) -> bool:
        return token in self.stop_ids or token in sequence.request.params.stop_ids

    def _is_long(self, request: Request) -> bool:
        return len(request.prompt_ids) > self.prefill_tokens

    def _room(self) -> int:
        return self.num_slots - len(self.live) - (self._chunked is not None)
