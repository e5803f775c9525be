# B rows, C draft vocabulary, H hidden
"""Weights of the drafts as a batch needs them: one trunk, and of every row the private expert, changes and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from farm.decode.remembered import remembered
from farm.decode.routes import Group, Routes, arrange
from farm.draft.delta import TrunkDelta, with_delta
from farm.draft.expert import Expert
from farm.draft.lean import LeanDraft, LeanExpert, LeanHead, LeanTrunk, Own
from farm.draft.model import Draft, DraftHead
from farm.draft.routed import ExpertStack, FlatExpert, RoutedDeltas, RoutedExperts
from farm.layers.lora import Lora, stack_loras
from farm.target.model import TargetModel

KEPT_STACKS = 4  # mixtures of experts whose weights stay stacked in memory
KEPT_TRUNKS = 2  # trunks with one target's changes in them, for batches of that target alone
KEPT_BATCHES = 2  # that of a round, and rows of it that catch up
# Of a target alone, before its changes are put into a trunk: what a mixture leaves behind ends sooner.
ROUNDS_BY_ROW = 32


@dataclass(frozen=True)
class MixedHeads:
    """The embeddings and heads of several forwards, each for its own rows; like `LeanHead`."""

    heads: tuple[LeanHead, ...]
    groups: tuple[Group, ...]

    @property
    def vocabulary_C(self) -> Tensor | None:  # noqa: N802 - named as LeanHead's
        return self.heads[0].vocabulary_C

    @property
    def vocab_size(self) -> int:
        return self.heads[0].vocab_size

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, ..., H] of token ids [B, ...]."""
        pairs = zip(self.heads, self.groups, strict=True)
        return torch.cat([head.embed(tokens[group.first : group.last]) for head, group in pairs])

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, ..., C] of hidden states [B, ..., H]."""
        pairs = zip(self.heads, self.groups, strict=True)
        return torch.cat([head.logits(hidden[group.first : group.last]) for head, group in pairs])

    def token_ids(self, columns: Tensor) -> Tensor:
        """Token ids of columns of `logits`."""
        return self.heads[0].token_ids(columns)


Bound = tuple[LeanDraft, LeanHead | MixedHeads]


class Drafts:
    """Every draft of `routes` over one trunk; weights that are not fused yet are when a batch first needs them.

    A row without a draft of its own runs with the expert of `first`; nothing that it proposes is verified.
    """

    def __init__(self, first: Draft, routes: Routes) -> None:
        self._routes, self._trunk, self._spare = routes, LeanTrunk.of(first.trunk), first.expert
        self._device = first.trunk.fc.weight.device
        self._experts: dict[int, LeanExpert] = {}
        self._flats: dict[tuple[int, int], FlatExpert] = {}
        self._heads: dict[int, LeanHead] = {}
        self._loras: dict[int, Lora] = {}
        self._stack = remembered(KEPT_STACKS, self._stack_anew)
        self._stack_deltas = remembered(KEPT_STACKS, self._stack_deltas_anew)
        self._changed = remembered(KEPT_TRUNKS, self._changed_anew)
        self._made = WeakValueDictionary[TrunkDelta, LeanTrunk]()  # those of them that somebody still has
        self._bind = remembered(KEPT_BATCHES, self._bind_anew)  # a batch stays the same for many rounds
        self._alone: TrunkDelta | None = None  # what all rows of the last round changed
        self._num_alone = 0  # rounds in a row

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin of every position that drafts know."""
        return self._trunk.tables

    def bind(self, targets: tuple[str, ...], in_mixture: bool = False) -> Bound:
        """The trunk with each row's expert, and each row's head; asked for in every round.

        Rows of one target have its changes put into the trunk where the kernels cannot take them by row, and where it
        pays: when a trunk has them already, or many rounds were this target's alone. Rows that catch up are
        `in_mixture` where their round has other targets too.
        """
        return self._bind(targets, self._trunk.alone is None or (not in_mixture and self._stays(targets)))

    def folded(self, draft: LeanDraft) -> object | None:
        """The trunk of a draft that was bound, if one target's changes are in it: of these, KEPT_TRUNKS stay."""
        trunk = draft.parts[0]
        return None if trunk is self._trunk else trunk

    def _stays(self, targets: tuple[str, ...]) -> bool:
        """Whether these rows change the trunk all alike, and have for long enough; takes note that they do."""
        drafts = [self._routes[name].draft for name in set(targets)]
        deltas = {None if draft is None else draft.delta for draft in drafts}
        alone = deltas.pop() if len(deltas) == 1 else None
        self._num_alone = self._num_alone + 1 if alone is self._alone else 1
        self._alone = alone
        return alone is not None and (alone in self._made or self._num_alone > ROUNDS_BY_ROW)

    def _bind_anew(self, targets: tuple[str, ...], folds: bool) -> Bound:
        """As `bind`; with `folds` the changes of rows that have the same are put into the trunk."""
        groups = self._routes.groups(targets)
        heads = tuple(self._head(group.forward) for group in groups)
        head = heads[0] if len(heads) == 1 else MixedHeads(heads, groups)
        drafts = [self._routes[name].draft for name in targets]
        experts = [self._spare if draft is None else draft.expert for draft in drafts]
        deltas = [None if draft is None else draft.delta for draft in drafts]
        if len(set(experts)) == 1 and len(set(deltas)) == 1 and (deltas[0] is None or folds):
            (delta,) = set(deltas)
            trunk = self._trunk if delta is None else self._changed(delta)
            return LeanDraft(trunk, self._lean(experts[0])), head
        if self._trunk.alone is not None:
            return LeanDraft(self._trunk, self._own(experts, deltas)), head
        present, which = arrange(experts)
        mixed = RoutedExperts.of(self._stack(present), which)
        present_deltas, which = arrange(deltas)
        if not present_deltas:
            return LeanDraft(self._trunk, mixed), head
        routed = RoutedDeltas(self._stack_deltas(present_deltas), which, self._device)
        return LeanDraft(self._trunk, mixed, routed), head

    def forget(self) -> None:
        """Drops what was made for targets that are hosted no more."""
        forwards = {id(route.forward) for route in self._routes}
        experts = {id(route.draft.expert) for route in self._routes if route.draft is not None}
        experts.add(id(self._spare))
        self._bind.cache_clear()
        self._stack.cache_clear()
        self._stack_deltas.cache_clear()
        self._changed.cache_clear()
        self._alone = None
        deltas = {id(route.draft.delta) for route in self._routes if route.draft is not None}
        self._loras = {key: lora for key, lora in self._loras.items() if key in deltas}
        self._heads = {key: head for key, head in self._heads.items() if key in forwards}
        self._experts = {key: expert for key, expert in self._experts.items() if key in experts}
        self._flats = {key: flat for key, flat in self._flats.items() if key[0] in experts}

    def _own(self, experts: Sequence[Expert], deltas: Sequence[TrunkDelta | None]) -> Own:
        """Each row's, read where it lies: nothing is put side by side."""
        present, which = arrange(deltas)
        return Own(tuple(map(self._lean, experts)), tuple(map(self._lora, present)), which)

    def _lean(self, expert: Expert) -> LeanExpert:
        if expert.fused is not None:
            alone: LeanExpert = expert.fused.lean
            return alone
        if id(expert) not in self._experts:
            self._experts[id(expert)] = LeanExpert.of(expert)
        return self._experts[id(expert)]

    def _lora(self, delta: TrunkDelta) -> Lora:
        if id(delta) not in self._loras:
            self._loras[id(delta)] = delta.lora()
        return self._loras[id(delta)]

    def _changed_anew(self, delta: TrunkDelta) -> LeanTrunk:
        made = self._made.get(delta)
        if made is None:
            made = LeanTrunk.made_of(with_delta(self._trunk.trunk, delta), self._trunk.tables)
            self._made[delta] = made
        return made

    def _stack_deltas_anew(self, present: tuple[TrunkDelta, ...]) -> Lora:
        return stack_loras(list(map(self._lora, present)))

    def _stack_anew(self, present: tuple[Expert, ...]) -> ExpertStack:
        width = max(expert.gate_proj.weight.shape[0] for expert in present)
        return ExpertStack([self._flat(expert, width) for expert in present])

    def _flat(self, expert: Expert, width: int) -> FlatExpert:
        if expert.fused is not None and width == expert.gate_proj.weight.shape[0]:
            beside: FlatExpert = expert.fused.flat
            return beside
        if (id(expert), width) not in self._flats:
            self._flats[id(expert), width] = FlatExpert.of(expert, width)
        return self._flats[id(expert), width]

    def _head(self, forward: TargetModel) -> LeanHead:
        if id(forward) not in self._heads:
            pruned = DraftHead.of(forward.embedding, forward.head_weight, self._trunk.trunk.vocabulary_C)
            self._heads[id(forward)] = LeanHead(pruned, forward.head)
        return self._heads[id(forward)]
