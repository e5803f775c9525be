# H hidden
"""The decode engine: requests join and leave slots between rounds of propose, verify, commit.

It knows tokens, not text. Its targets share slots: drafts run through one trunk, LoRA targets of one base through one
forward, full checkpoints in a group each. A target without a draft decodes one token a round. A request's random
numbers depend on its own seed and rounds, never on its neighbours.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from farm.decode.control import Control, Fixed
from farm.decode.logprobs import TokenLogprob
from farm.decode.routes import Route as Route
from farm.decode.runner import Round, Runner, Seconds
from farm.decode.scheduler import FinishReason as FinishReason
from farm.decode.scheduler import LiveRequest, Prefill, Scheduler, unknown_token
from farm.decode.scheduler import Request as Request
from farm.decode.stats import DecodeStats
from farm.decode.tree import TreeShape

PREFILL_TOKENS = 512
OFFLINE_PREFILL_TOKENS = 4096  # where nobody waits for the next token


@dataclass(frozen=True)
class Completion:
    """A finished request. `tokens` includes the stop token; `features` [len(prompt + tokens) - 1, H] if captured.

    `logprobs` are those of `tokens` if the request asked for them.
    """

    request_id: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: DecodeStats
    features: Tensor | None
    logprobs: tuple[TokenLogprob, ...] = ()


class Output(NamedTuple):
    """What one step did for one request: new tokens without the stop token, and the end if it came.

    `logprobs` are those of `tokens` if the request asked for them. The first `num_drafted` of the tokens were drafted;
    None where there was no round: the prefill gave the token.
    """

    request_id: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    completion: Completion | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    num_drafted: int | None = None


class Engine:
    """Decodes requests of its targets in `num_slots` slots of `max_length` positions each.

    Args:
        routes: the targets, at least one; more may be hosted later.
        k: most tokens that a round drafts.
        control: how many it does draft; None: always `k`.
        tree: drafted in place of a chain in every round for which the control's limit is above 0.
        prefill_tokens: prompt tokens processed in one step beside its round.
        buckets: forwards of rounds come in a few shapes, which on CUDA are captured as graphs; None: on CUDA.
        capture: keep the target's hidden states of every processed token.

    Raises ValueError when the targets cannot share an engine (see Routes.host), and for a tree beside a control that
    reads a draft's distributions.
    """

    def __init__(  # noqa: PLR0913 - the knobs of decoding, each with a name
        self,
        routes: Sequence[Route],
        *,
        num_slots: int,
        max_length: int,
        k: int,
        control: Control | None = None,
        tree: TreeShape | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        buckets: bool | None = None,
        capture: bool = False,
    ) -> None:
        self.capture = capture
        self.control = Fixed(k) if control is None else control
        if tree is not None and self.control.signal != "none":
            raise ValueError(
                f"{type(self.control).__name__} cuts chains by what it sees of them; it cannot cut trees"
            )
        like = routes[0].forward
        self.runner = Runner(
            like, num_slots=num_slots, max_length=max_length, max_drafted=k, tree=tree, buckets=buckets
        )
        hosted = self.runner.routes  # without a way back to the engine: who drops it frees its caches at once
        self.scheduler = Scheduler(
            lambda target: hosted[target].stop_ids, hosted.group_of,
            num_slots=num_slots, max_length=max_length, prefill_tokens=prefill_tokens,
        )  # fmt: skip
        for route in routes:
            self.runner.host(route)
        self.stats_of = defaultdict[str, DecodeStats](DecodeStats)  # of the targets that are hosted
        self._stats_of_dropped = DecodeStats()
        self._features: dict[str, list[Tensor]] = {}
        self._observed_s, self._unobserved = 0.0, 0  # what `observe` took, and rounds since

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def stats(self) -> DecodeStats:
        """Of all targets together, those that were dropped among them."""
        total = DecodeStats()
        for stats in (self._stats_of_dropped, *self.stats_of.values()):
            total.add(stats)
        return total

    @property
    def num_live(self) -> int:
        return len(self.scheduler.live)

    @property
    def seconds(self) -> Seconds:
        """Where the time of all steps went."""
        return self.runner.seconds

    def host(self, route: Route) -> None:
        """Adds a target between two steps. Raises ValueError when it cannot share this engine."""
        self.runner.host(route)

    def drop(self, target: str) -> None:
        """Forgets a target between two steps. Raises ValueError while a request still needs it."""
        if self.scheduler.uses(target):
            raise ValueError(f"target {target!r} still has requests; cancel them or let them end")
        self.runner.drop(target)
        self._stats_of_dropped.add(self.stats_of.pop(target, DecodeStats()))

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises ValueError when its target is not hosted, its prompt is empty, leaves no room for a token or has an id
        that the target does not know, or it limits the length of chains where trees are drafted.
        """
        if request.target not in self.runner.routes:
            raise ValueError(f"request {request.id}: target {request.target!r} is not hosted")
        if self.runner.tree is not None and request.params.max_drafted:
            raise ValueError(f"request {request.id}: max_drafted is for chains; with trees it can only be 0")
        vocab_size = self.runner.routes[request.target].forward.vocab_size
        stranger = unknown_token(request.prompt_ids, vocab_size)
        if stranger is not None:
            raise ValueError(
                f"request {request.id}: prompt token {stranger} is outside the target's {vocab_size} tokens"
            )
        self.scheduler.add(request)

    def cancel(self, request_id: str) -> None:
        """Forgets a request, waiting or live; its slot is free for the next step."""
        self.runner.regroup(self.scheduler.cancel(request_id))
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
            begun = time.perf_counter()
            done = self.runner.run(live, self.control)
            said, kept = self._commit(done)
            outputs += said
            ended = time.perf_counter()
            self._unobserved += 1
            if self.control.observes:
                # What observing takes is a part of rounds, too: of all since the last time, this one among them.
                whole_s = ended - begun - done.catch_up_s + self._observed_s / self._unobserved
                self.control.observe(done.result(kept, whole_s))
                self._observed_s, self._unobserved = time.perf_counter() - ended, 0
        self.seconds.host += time.perf_counter() - started - (self.seconds.on_tensors - on_tensors)
        return outputs

    def _prefill(self, prefill: Prefill) -> list[Output]:
        hidden_BTH, first, logprobs = self.runner.prefill(prefill)
        if self.capture:
            for b, (row, end) in enumerate(zip(prefill.rows, prefill.ends, strict=True)):
                kept_TH = hidden_BTH[b, : end - prefill.start].clone()
                self._features.setdefault(row.request.id, []).append(kept_TH)
        self.runner.regroup(self.scheduler.prefilled(prefill))
        if not first:
            return []
        slot_of = {id(row): slot for slot, row in enumerate(self.scheduler.live)}
        slots = [slot_of[id(row)] for row in prefill.rows]
        for slot, token in zip(slots, first, strict=True):
            self.scheduler.commit(slot, [token])
        for row, of_row in logprobs.items():
            prefill.rows[row].logprobs += of_row
        return self._emit(slots, [1] * len(first), [None] * len(first), behind_round=False)

    def _commit(self, done: Round) -> tuple[list[Output], list[int]]:
        """Outputs, and how many tokens each slot took."""
        kept = list[int]()
        for slot, sequence in enumerate(list(self.scheduler.live)):
            drafted, accepted = done.drafted[slot], len(done.tokens[slot]) - 1
            new = self.scheduler.commit(slot, done.tokens[slot])
            kept.append(len(new))
            if slot in done.logprobs:
                sequence.logprobs += done.logprobs[slot][: len(new)]
            for stats in (sequence.stats, self.stats_of[sequence.request.target]):
                stats.count(drafted, accepted, len(new))
            if self.capture:
                self._features[sequence.request.id].append(done.hidden_BTH[slot, : len(new)].clone())
        accepted_B = [len(tokens) - 1 for tokens in done.tokens]
        return self._emit(range(len(kept)), kept, accepted_B, behind_round=True), kept

    def _emit(
        self,
        slots: Sequence[int],
        num_kept: Sequence[int],
        num_accepted: Sequence[int | None],
        *,
        behind_round: bool,
    ) -> list[Output]:
        """Outputs of the slots, each for its last tokens; sequences at their end leave."""
        outputs, ended = [], []
        for slot, kept, accepted in zip(slots, num_kept, num_accepted, strict=True):
            sequence, reason = self.scheduler.live[slot], self.scheduler.finish_reason(slot)
            new = sequence.tokens[len(sequence.tokens) - kept :]
            visible = tuple(new[:-1] if reason == "stop" else new)
            completion = None if reason is None else self._complete(sequence, reason)
            first = len(sequence.logprobs) - kept
            logprobs = tuple(sequence.logprobs[first : first + len(visible)]) if sequence.logprobs else ()
            drafted = None if accepted is None else min(accepted, len(visible))
            outputs.append(Output(sequence.request.id, visible, reason, completion, logprobs, drafted))
            if reason is not None:
                ended.append(slot)
        if ended:
            self.runner.regroup(self.scheduler.release(ended, behind_round=behind_round))
        return outputs

    def _complete(self, sequence: LiveRequest, reason: FinishReason) -> Completion:
        new = tuple(sequence.tokens[len(sequence.request.prompt_ids) :])
        kept = self._features.pop(sequence.request.id, None)
        features = torch.cat(kept) if kept else None
        logprobs = tuple(sequence.logprobs)
        return Completion(sequence.request.id, new, reason, sequence.stats, features, logprobs)
