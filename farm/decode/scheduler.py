"""Which request runs where: slots, admissions, limits and ends. Holds no tensors.

Sequences that decode are in slots 0..D-1, those of one group side by side, so that a forward reads caches through
views. Where one ends and another request waits, that takes its slot, so that nobody has to move. A prompt longer than
a step's prefill budget is worked off in chunks in the top slot, while the others go on decoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from farm.decode.logprobs import TokenLogprob
from farm.decode.sampling import SamplingParams
from farm.decode.stats import DecodeStats

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One sequence to decode: token ids of the whole prompt, and how to sample."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    target: str = ""  # which of the engine's targets answers


@dataclass(eq=False)
class LiveRequest:
    """A request in a slot. The target's cache holds every token but the last once its prompt is prefilled."""

    request: Request
    tokens: list[int]
    most: int  # tokens that it ends with at the latest, the prompt's among them
    stop_ids: frozenset[int] = frozenset()  # its target's and its own
    rounds: int = 0
    stats: DecodeStats = field(default_factory=DecodeStats)
    # Of every new token, or empty if not asked for.
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def num_new(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def room(self) -> int:
        """For so many tokens more."""
        return self.most - len(self.tokens)


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
    """Copy the first `length` positions of the slots `sources` to `destinations`, all at once."""

    sources: tuple[int, ...]
    destinations: tuple[int, ...]
    length: int


def unknown_token(ids: Sequence[int], vocab_size: int) -> int | None:
    """The first token id that an embedding of this size has no row for: reading it would end the engine for all."""
    return next((token for token in ids if not 0 <= token < vocab_size), None)


class Scheduler:
    """Slots and queues of one engine.

    Args:
        stop_ids: the tokens that end a request, by its target.
        group_of: what the targets have in common that are verified together.
        prefill_tokens: prompt tokens that one step may process beside its decoding, at least one prompt's chunk.
    """

    def __init__(
        self,
        stop_ids: Callable[[str], frozenset[int]],
        group_of: Callable[[str], Hashable],
        *,
        num_slots: int,
        max_length: int,
        prefill_tokens: int,
    ) -> None:
        self._stop_ids, self._group_of = stop_ids, group_of
        self.num_slots, self.max_length, self.prefill_tokens = num_slots, max_length, prefill_tokens
        self.live: list[LiveRequest] = []  # decoding; the sequence in slot b is live[b]
        self._waiting: deque[Request] = deque()
        self._placed: LiveRequest | None = None  # among `live`, its prompt not yet processed
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
        if self._placed is not None and self._placed.request.id == request_id:
            self._placed = None
        return self.release([slot for slot, one in enumerate(self.live) if one.request.id == request_id])

    def uses(self, target: str) -> bool:
        """Whether a request for the target waits or is in a slot."""
        busy = [*self.live, *([self._chunked] if self._chunked else [])]
        return any(r.target == target for r in (*self._waiting, *(one.request for one in busy)))

    def prefills(self) -> Iterator[Prefill]:
        """What of the waiting prompts this step processes: the next chunk of a long one, and whole short ones.

        Each is to be processed and reported to `prefilled` before the next is asked for.
        """
        budget = self.prefill_tokens
        if self._placed is not None:
            row, length = self._placed, len(self._placed.tokens)
            budget -= length
            yield Prefill(self.live.index(row), (row,), 0, (length,))
        elif self._chunked is None and self._waiting and self._is_long(self._waiting[0]) and self._room() > 0:
            self._chunked, self._num_chunked = self._admit(), 0
        if self._chunked is not None:
            start = self._num_chunked
            end = min(start + budget, len(self._chunked.tokens))
            budget -= end - start
            yield Prefill(self.num_slots - 1, (self._chunked,), start, (end,))
        while rows := self._next_rows(budget):
            ends = tuple(len(row.tokens) for row in rows)
            budget -= len(rows) * max(ends)
            yield Prefill(len(self.live), tuple(rows), 0, ends)

    def _next_rows(self, budget: int) -> list[LiveRequest]:
        """Short prompts from the queue's head that are of one group and fit, padded, into the budget."""
        rows, widest = list[LiveRequest](), 0
        while self._waiting and self._room() > len(rows) and not self._is_long(self._waiting[0]):
            request = self._waiting[0]
            widest = max(widest, len(request.prompt_ids))
            other = rows and self._group_of(request.target) != self._group_of(rows[0].request.target)
            if other or widest * (len(rows) + 1) > budget:
                break
            rows.append(self._admit())
        return rows

    def _admit(self) -> LiveRequest:
        request = self._waiting.popleft()
        ids, params = list(request.prompt_ids), request.params
        most = min(len(ids) + params.max_new_tokens, self.max_length)
        return LiveRequest(request, ids, most, self._stop_ids(request.target) | params.stop_ids)

    def prefilled(self, prefill: Prefill) -> Move | None:
        """Takes note of a processed prefill: its sequences decode from now on, or its next chunk is due."""
        if not prefill.completes:
            self._num_chunked = prefill.ends[0]
            return None
        if prefill.rows[0] is self._placed:
            self._placed = None
            return None
        if prefill.rows[0] is self._chunked:
            self._chunked = None
        slots = [*range(len(self.live)), *range(prefill.first, prefill.first + len(prefill.rows))]
        self.live += prefill.rows
        return self._regroup(slots)

    def commit(self, slot: int, tokens: Sequence[int]) -> list[int]:
        """Appends what a round committed, up to a stop token, the request's limit or the slot's end; what was kept."""
        sequence = self.live[slot]
        kept = list(tokens[: sequence.room])
        if not sequence.stop_ids.isdisjoint(kept):
            end = next(index for index, token in enumerate(kept) if token in sequence.stop_ids)
            del kept[end + 1 :]
        sequence.tokens += kept
        sequence.rounds += 1
        return kept

    def finish_reason(self, slot: int) -> FinishReason | None:
        """Why the sequence in `slot` is at its end, or None."""
        sequence = self.live[slot]
        if sequence.tokens[-1] in sequence.stop_ids:
            return "stop"
        return None if sequence.room else "length"

    def release(self, slots: Sequence[int], *, behind_round: bool = False) -> Move | None:
        """Frees slots; the last decoding sequences move into them.

        Behind a round the next request takes the slot, if it is only one: it is read before the next round. Several are
        better read at once, which takes slots side by side.
        """
        if behind_round and len(slots) == 1 and self._fits_into(slots[0]):
            self.live[slots[0]] = row = self._admit()
            self._placed = row
            return None
        sources = list(range(len(self.live)))
        for slot in sorted(slots, reverse=True):
            self.live[slot], sources[slot] = self.live[-1], sources[-1]
            self.live.pop()
            sources.pop()
        return self._regroup(sources)

    def _fits_into(self, slot: int) -> bool:
        """Whether the next request is of the group of the one in a slot, and read as a whole in the next step."""
        if not self._waiting or self._chunked is not None or self._is_long(self._waiting[0]):
            return False
        target, before = self._waiting[0].target, self.live[slot].request.target
        return self._group_of(target) == self._group_of(before)

    def _regroup(self, sources: list[int]) -> Move | None:
        """Puts sequences of one group side by side, few of them moving; `sources[b]` is where live[b] is now."""
        groups = [self._group_of(one.request.target) for one in self.live]
        order = {group: index for index, group in enumerate(dict.fromkeys(groups))}
        wanted = sorted(order[group] for group in groups)
        misplaced = [slot for slot, group in enumerate(groups) if order[group] != wanted[slot]]
        # Among the misplaced, the k-th smallest group belongs into the k-th slot.
        taken = sorted(misplaced, key=lambda slot: order[groups[slot]])
        moved = {
            slot: (self.live[source], sources[source]) for slot, source in zip(misplaced, taken, strict=True)
        }
        for slot, (sequence, source) in moved.items():
            self.live[slot], sources[slot] = sequence, source
        pairs = [(source, slot) for slot, source in enumerate(sources) if source != slot]
        if not pairs:
            return None
        length = max(len(self.live[slot].tokens) for _, slot in pairs)
        return Move(*(tuple(column) for column in zip(*pairs, strict=True)), length)

    def _is_long(self, request: Request) -> bool:
        return len(request.prompt_ids) > self.prefill_tokens

    def _room(self) -> int:
        return self.num_slots - len(self.live) - (self._chunked is not None)
