# B rows, T tokens, H hidden, V vocabulary, C draft vocabulary
"""The forwards of a round: the target's over what was proposed, the draft's over a chain.

`EagerSteps` computes each in its own shape, `StaticSteps` in one of a few, which a CUDA graph can repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from farm.decode.buckets import Buckets
from farm.decode.drafts import Drafts, MixedHeads
from farm.decode.graphs import Step, StepGraphs, Tensors
from farm.decode.growth import Growth
from farm.decode.proposal import ToVerify
from farm.decode.propose import Pending, Reader, Told, chain_reader, run_draft
from farm.decode.routes import Group
from farm.draft.lean import Ends, LeanDraft
from farm.layers.cache import Branches, Rows, SlotCache, StaticRows
from farm.target.model import Reading


class Steps(Protocol):
    """How forwards are run."""

    def verify(self, group: Group, read: ToVerify, starts: Sequence[int], cache: SlotCache) -> Reading:
        """What the target says of a group's rows, each from its start on."""
        ...

    def chain_reader(
        self, drafts: Drafts, targets: tuple[str, ...], pending: Pending, cache: SlotCache, limit: int
    ) -> Reader:
        """The drafts of `targets`, one a row, which have read what is pending; for chains of at most `limit` tokens."""
        ...

    def forget(self) -> None:
        """Drops what was made for weights that may go."""
        ...


class EagerSteps:
    """Every forward in its own shape."""

    def verify(self, group: Group, read: ToVerify, starts: Sequence[int], cache: SlotCache) -> Reading:
        """See Steps."""
        loras = group.lora_rows(read.tokens_BT.shape[1])
        return group.forward.read(read.tokens_BT, Rows(starts, group.first, read.branches), cache, loras)

    def chain_reader(
        self, drafts: Drafts, targets: tuple[str, ...], pending: Pending, cache: SlotCache, limit: int
    ) -> Reader:
        """See Steps."""
        return chain_reader(*drafts.bind(targets), pending, cache, limit - 1)

    def forget(self) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class StaticSteps:
    """Forwards in shapes of a few sizes: calls are padded, and cut to what was asked for.

    Rows that only pad work at `spare`, a position behind all that any slot's sequence keeps. Trees keep the number of
    their nodes; the draft reads them as EagerSteps does. Of rows with LoRAs, drafts or heads that differ no graph is
    made: it would hold which row has which, of which there are more ways than shapes, and their stacked weights.
    """

    buckets: Buckets
    graphs: StepGraphs
    spare: int

    def verify(self, group: Group, read: ToVerify, starts: Sequence[int], cache: SlotCache) -> Reading:
        """See Steps. A model whose code may wait for the host runs as it is, and so do rows whose LoRAs differ."""
        if not group.forward.capturable or not group.alike:
            return EagerSteps().verify(group, read, starts, cache)
        num_rows, num_tokens = read.tokens_BT.shape
        padded = self._padded(group)
        more = padded.last - group.last
        width = num_tokens if read.branches is not None else self.buckets.tokens(num_tokens)
        context = self.buckets.context(max(starts) + width, cache.capacity)
        inputs = [_pad(read.tokens_BT, more, width), self._starts(starts, more, cache)]
        if read.branches is not None:
            inputs += [_pad_rows(read.branches.depths_BT, more), _pad_rows(read.branches.seen_BTE, more)]
        shape = (len(inputs[0]), width, context, read.branches is not None)
        key = ("verify", id(group.forward), *map(id, group.members), group.first, *shape)
        outputs = self.graphs.run(key, lambda: _verify(padded, width, context, cache), tuple(inputs))
        return Reading(*(output[:num_rows, :num_tokens] for output in outputs))

    def chain_reader(
        self, drafts: Drafts, targets: tuple[str, ...], pending: Pending, cache: SlotCache, limit: int
    ) -> Reader:
        """See Steps."""
        more = self.buckets.rows(len(targets)) - len(targets)
        draft, head = drafts.bind(targets + targets[-1:] * more)
        num_tokens = self.buckets.tokens(pending.tokens_BT.shape[1])
        starts, counts = pending.rows.starts, pending.count
        reached = max(start + count for start, count in zip(starts, counts, strict=True)) + limit
        context = self.buckets.context(max(reached, max(starts) + num_tokens), cache.capacity)
        starts_B = self._starts(starts, more, cache)
        counts_B = _pad_rows(torch.tensor(counts, device=starts_B.device), more, 1)
        at_work = _StaticDraft(self.graphs, draft, head, cache, context, drafts.folded(draft))
        tokens_BT = _pad(pending.tokens_BT, more, num_tokens)
        hidden_BTH = functional.pad(
            pending.hidden_BTH, (0, 0, 0, num_tokens - pending.hidden_BTH.shape[1], 0, more)
        )
        first = at_work.read(tokens_BT, hidden_BTH, starts_B, counts_B - 1)
        return StaticChainReader(at_work, pending.limits, first, starts_B + counts_B)

    def forget(self) -> None:
        """Drops captured steps."""
        self.graphs.forget()

    def _padded(self, group: Group) -> Group:
        num = self.buckets.rows(group.last - group.first, group.first)
        which = group.which + group.which[-1:] * (num - len(group.which))
        return replace(group, last=group.first + num, which=which)

    def _starts(self, starts: Sequence[int], more: int, cache: SlotCache) -> Tensor:
        device = cache.buffer.device
        return torch.tensor([*starts, *[self.spare] * more], dtype=torch.int64, device=device)


class StaticChainReader:
    """As ChainReader, over padded rows: a drafted token a row at a time, each in a step of one shape."""

    def __init__(
        self, draft: _StaticDraft, limits: tuple[int, ...], first: tuple[Tensor, Tensor], next_B: Tensor
    ) -> None:
        """`first` is what came of the pending tokens; `next_B` are the positions of the first drafted ones."""
        self.head, self.limits, self.forwards = draft.head, limits, 1
        self._draft, self._next_B = draft, next_B
        self._hidden_BH, self._logits_BC = first

    def read(self, tokens_B: Tensor) -> None:
        """Reads the next drafted token of each row."""
        tokens_BT = _pad(tokens_B[:, None], len(self._next_B) - len(tokens_B), 1)
        hidden_BTH, none_B = self._hidden_BH[:, None], torch.zeros_like(self._next_B)
        self._hidden_BH, self._logits_BC = self._draft.read(tokens_BT, hidden_BTH, self._next_B, none_B)
        self._next_B = self._next_B + 1
        self.forwards += 1

    @property
    def told(self) -> Told:
        """What follows what was read last."""
        return Told(self._logits_BC[: len(self.limits)])

    def whole(self, growth: Growth | None) -> None:
        """Graphs go token by token."""


@dataclass(frozen=True)
class _StaticDraft:
    """The draft of a padded batch, whose attention reads `context` entries."""

    graphs: StepGraphs
    draft: LeanDraft
    head: Ends
    cache: SlotCache
    context: int
    folded: object | None  # see Drafts

    def read(
        self, tokens_BT: Tensor, hidden_BTH: Tensor, starts_B: Tensor, last_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predicted hidden states [B, H] and logits [B, C] after index `last_B[b]` of row b."""
        inputs = (tokens_BT, hidden_BTH, starts_B, last_B)
        weights = (*map(id, self.draft.parts), id(self.head))
        key = ("draft", *weights, *tokens_BT.shape, self.context)
        # What routes rows is made anew for every batch: a graph of it would never be run again.
        by_row = self.draft.changed_by_row or isinstance(self.head, MixedHeads)
        graphs = StepGraphs(None) if by_row else self.graphs
        hidden_BH, logits_BC = graphs.run(key, lambda: self._step, inputs, self.folded)
        return hidden_BH, logits_BC

    def _step(self, tokens_BT: Tensor, hidden_BTH: Tensor, starts_B: Tensor, last_B: Tensor) -> Tensors:
        rows = StaticRows(starts_B, self.context)
        predicted_BTH = run_draft(self.draft, self.head, tokens_BT, hidden_BTH, rows, self.cache)
        at_B1H = last_B[:, None, None].expand(-1, 1, predicted_BTH.shape[2])
        hidden_BH = predicted_BTH.gather(1, at_B1H)[:, 0]
        return hidden_BH, self.head.logits(hidden_BH)


def _verify(group: Group, num_tokens: int, context: int, cache: SlotCache) -> Step:
    loras = group.lora_rows(num_tokens)

    def step(tokens_BT: Tensor, starts_B: Tensor, *tree: Tensor) -> Tensors:
        rows = StaticRows(starts_B, context, group.first, Branches(*tree) if tree else None)
        hidden_BTH = group.forward.forward(tokens_BT, rows, cache, loras)
        return hidden_BTH, group.forward.logits(hidden_BTH)

    return step


def _pad(tokens_BT: Tensor, more: int, num_tokens: int) -> Tensor:
    return functional.pad(tokens_BT, (0, num_tokens - tokens_BT.shape[1], 0, more))


def _pad_rows(x: Tensor, more: int, value: int = 0) -> Tensor:
    return functional.pad(x, (0, 0) * (x.dim() - 1) + (0, more), value=value)
