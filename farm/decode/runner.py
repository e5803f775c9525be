# B live rows, T tokens, K drafted tokens, H hidden, V vocabulary
"""Targets, drafts and their caches: prefills prompts and runs rounds. Decides nothing about requests."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from farm.decode.batch import Batch
from farm.decode.buckets import Buckets
from farm.decode.chain import ChainProposal
from farm.decode.control import Control, Load, RoundResult
from farm.decode.drafting import Drafting
from farm.decode.graphs import StepGraphs
from farm.decode.logprobs import TokenLogprob, committed_logprobs
from farm.decode.penalties import Penalties, Said
from farm.decode.proposal import Proposal, ToVerify
from farm.decode.routes import Group, Route, Routes
from farm.decode.sampling import NEXT, SamplingBatch, distribution, draw
from farm.decode.scheduler import LiveRequest, Move, Prefill
from farm.decode.steps import EagerSteps, StaticSteps, Steps
from farm.decode.tree import TreeShape
from farm.layers.cache import Rows
from farm.sections import LONGEST_CHAIN
from farm.target.model import Reading, TargetModel


@dataclass
class Seconds:
    """Where the time of an engine's steps went. `host` is what lies outside forwards and sampling."""

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    sample: float = 0.0
    host: float = 0.0

    @property
    def on_tensors(self) -> float:
        return self.prefill + self.draft + self.verify + self.sample


@dataclass(frozen=True)
class Round:
    """What a round decided, `tokens[b]` of row b, and the hidden states of what it read.

    `logprobs` has the rows that ask for them. Row b had drafted `drafted[b]` tokens; seconds are as in RoundResult.
    """

    tokens: list[list[int]]
    hidden_BTH: Tensor
    logprobs: dict[int, list[TokenLogprob]]
    load: Load
    drafted: tuple[int, ...]
    proposal: Proposal
    draft_s: float
    catch_up_s: float

    def result(self, emitted: Sequence[int], whole_s: float) -> RoundResult:
        """For the control: of `tokens` row b kept `emitted[b]`, and the round took `whole_s` without catching up."""
        accepted = tuple(len(tokens) - 1 for tokens in self.tokens)
        return RoundResult(
            self.load, self.drafted, accepted, tuple(emitted), self.proposal.forwards,
            self.draft_s, whole_s - self.draft_s, self.proposal.signals, self.catch_up_s,
        )  # fmt: skip


class Prefilled(NamedTuple):
    """Hidden states of processed prompt positions; where prompts end, their next tokens and what was asked of those."""

    hidden_BTH: Tensor
    first: list[int]
    logprobs: dict[int, list[TokenLogprob]]


class Runner:
    """Tensors of `num_slots` sequences of at most `max_length` tokens; what caches take is taken once."""

    def __init__(
        self,
        like: TargetModel,
        *,
        num_slots: int,
        max_length: int,
        max_drafted: int,
        tree: TreeShape | None = None,
        buckets: bool | None = None,
    ) -> None:
        """`like` is a forward of the shape that all have; targets are hosted by `host`.

        Drafts propose chains of at most `max_drafted` tokens, or where there is a `tree`, that. Forwards come in the
        shapes of `buckets` and, on CUDA, as graphs; None: on CUDA.
        """
        if max_length > like.max_positions:
            raise ValueError(f"max_length {max_length} exceeds the target's {like.max_positions} positions")
        self.routes = Routes()
        self.device, self.tree = like.device, tree
        if tree is not None:
            max_drafted = tree.num_entries
        elif max_drafted > LONGEST_CHAIN:
            raise ValueError(
                f"{max_drafted} drafted tokens a round (k): at most {LONGEST_CHAIN} are possible"
            )
        capacity = max_length + max_drafted + 1  # a verification may write past the last token it keeps
        self.cache = like.new_cache(num_slots, capacity)
        self._sizes = {"num_slots": num_slots, "capacity": capacity, "max_drafted": max_drafted}
        self.steps: Steps = EagerSteps()
        if like.device.type == "cuda" if buckets is None else buckets:
            self.steps = StaticSteps(
                Buckets(num_slots, max_drafted), StepGraphs.on(like.device), spare=max_length
            )
        self.drafting: Drafting | None = None
        self.seconds = Seconds()
        self._said: WeakKeyDictionary[LiveRequest, Said] = WeakKeyDictionary()  # of those with penalties
        self._batch: Batch | None = None  # until a request joins or leaves

    def host(self, route: Route) -> None:
        """Adds a target. Raises ValueError, and leaves it out, when it does not go with those that are hosted."""
        self.routes.check(route)
        if route.draft is not None and self.drafting is None:
            self.drafting = Drafting(route, self.routes, **self._sizes, steps=self.steps, tree=self.tree)
        self.routes.host(route)
        self._batch = None

    def drop(self, target: str) -> None:
        """Forgets a target that no sequence needs any more."""
        self.routes.drop(target)
        self._batch = None
        self.steps.forget()
        if all(route.draft is None for route in self.routes):
            self.drafting = None  # the next draft may be over another trunk
        if self.drafting is not None:
            self.drafting.forget()

    @property
    def num_bytes(self) -> int:
        """Of all that the sequences take; weights are the targets' and the drafts'."""
        return self.cache.num_bytes + (self.drafting.num_bytes if self.drafting else 0)

    def prefill(self, prefill: Prefill) -> Prefilled:
        """Processes prompt positions."""
        started = time.perf_counter()
        num_rows, start = len(prefill.rows), prefill.start
        chunks = [row.tokens[start:end] for row, end in zip(prefill.rows, prefill.ends, strict=True)]
        batch = self._batch_of(prefill.rows)
        (group,) = batch.groups  # the scheduler admits one group at a time
        rows = Rows([start] * num_rows, first=prefill.first, counts=[len(chunk) for chunk in chunks])
        tokens_BT = _pad(chunks, self.device)
        loras = group.lora_rows(tokens_BT.shape[1])
        hidden_BTH = group.forward.forward(tokens_BT, rows, self.cache, loras)
        last_B = torch.tensor([len(chunk) - 1 for chunk in chunks], device=self.device)
        first, logprobs = list[int](), dict[int, list[TokenLogprob]]()
        if prefill.completes:
            last_BH = hidden_BTH[torch.arange(num_rows), last_B]
            logits_BV = group.forward.logits(last_BH)
            first = _first_tokens(logits_BV, self._sampling_of(prefill.rows, batch)).tolist()
            if batch.asked:
                logprobs = committed_logprobs(logits_BV[:, None], [[token] for token in first], batch.asked)
        if self.drafting is not None:
            self.drafting.prefilled(hidden_BTH, rows)
        self.seconds.prefill += time.perf_counter() - started
        return Prefilled(hidden_BTH, first, logprobs)

    def run(self, rows: Sequence[LiveRequest], control: Control) -> Round:
        """One round for the sequences in slots 0..B-1: propose, verify, commit.

        The caches hold all tokens of a sequence but the last.
        """
        if self._batch is None:
            self._batch = self._batch_of(rows)
        batch = self._batch
        sampling = self._sampling_of(rows, batch)
        sequences = [row.tokens for row in rows]
        lengths = list(map(len, sequences))
        load = batch.load_at(lengths)
        limit = min(max(load.limits), control.limit(load)) if any(load.limits) else 0
        times = [time.perf_counter()]
        if self.drafting is not None and limit > 0:
            self.drafting.catch_up(load, sequences)
        times.append(time.perf_counter())
        proposal: Proposal
        if self.drafting is not None and limit > 0:
            proposal = self.drafting.propose(load, sequences, limit, control, sampling)
        else:
            proposal = ChainProposal.none(len(rows), self.device)
        times.append(time.perf_counter())
        last_B = torch.tensor([tokens[-1] for tokens in sequences], device=self.device)
        reading = self._verify(batch.groups, proposal.to_verify(last_B), lengths)
        times.append(time.perf_counter())
        settled = proposal.settle(reading, sampling)
        if settled.nodes_BT is not None:
            self.cache.keep(Rows([length - 1 for length in lengths]), settled.nodes_BT)
        logprobs = dict[int, list[TokenLogprob]]()
        if batch.asked:
            logprobs = committed_logprobs(reading.logits_BTV, settled.tokens, batch.asked, settled.nodes_BT)
        times.append(time.perf_counter())
        if self.drafting is not None:
            self.drafting.committed(settled.hidden_BTH, lengths)
        catch_up_s, draft_s, verify_s, sample_s = (b - a for a, b in itertools.pairwise(times))
        self.seconds.draft += catch_up_s + draft_s
        self.seconds.verify += verify_s
        self.seconds.sample += sample_s
        return Round(
            settled.tokens, settled.hidden_BTH, logprobs, load, settled.lengths, proposal, draft_s, catch_up_s
        )

    def _sampling_of(self, rows: Sequence[LiveRequest], batch: Batch) -> SamplingBatch:
        """The settings of live requests for their next round."""
        penalties = None
        if batch.penalised:
            penalties = Penalties.of(batch.params, list(map(self._said_by, rows)))
        return SamplingBatch(batch.params, tuple(row.rounds for row in rows), penalties)

    def _said_by(self, row: LiveRequest) -> Said | None:
        if not row.request.params.penalised:
            return None
        if row not in self._said:
            self._said[row] = Said(row.tokens, len(row.request.prompt_ids))
        return self._said[row]

    def _batch_of(self, rows: Sequence[LiveRequest]) -> Batch:
        return Batch.of(rows, self.routes, self._sizes["max_drafted"], self.tree is not None)

    def regroup(self, move: Move | None) -> None:
        """Requests have joined or left: copies sequences to other slots, where some have to move."""
        self._batch = None
        if move is None:
            return
        self.cache.move(list(move.sources), list(move.destinations), move.length)
        if self.drafting is not None:
            self.drafting.move(move)

    def _verify(self, groups: Sequence[Group], read: ToVerify, lengths: Sequence[int]) -> Reading:
        """What each row's target says of its last token and the drafted ones, group by group."""
        readings = []
        for group in groups:
            of_group = slice(group.first, group.last)
            starts = [length - 1 for length in lengths[of_group]]
            branches = None if read.branches is None else read.branches.of_rows(of_group)
            of_rows = ToVerify(read.tokens_BT[of_group], branches)
            readings.append(self.steps.verify(group, of_rows, starts, self.cache))
        if len(groups) == 1:
            return readings[0]
        hidden, logits, best = zip(*readings, strict=True)
        told = [one for one in best if one is not None]
        best_BT = torch.cat(told) if len(told) == len(groups) else None
        return Reading(torch.cat(hidden), torch.cat(logits), best_BT)


def _first_tokens(logits_BV: Tensor, batch: SamplingBatch) -> Tensor:
    if batch.penalties is not None:
        logits_BV = batch.penalties.apply(logits_BV[:, None], [[]] * len(logits_BV))[:, 0]
    if batch.greedy:
        return logits_BV.argmax(dim=-1)
    return draw(distribution(logits_BV, batch), batch.uniform(0, NEXT))


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
