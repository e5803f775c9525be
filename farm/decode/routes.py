"""Which model decodes which request: the targets that an engine hosts, and a batch's rows by the forward they need."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from farm.decode.remembered import remembered
from farm.draft.model import Draft
from farm.layers.lora import Lora, LoraRows, stack_loras
from farm.target.model import TargetModel

Owner = TypeVar("Owner", bound=Hashable)
# Mixtures of LoRAs whose deltas stay side by side in memory, as many bytes as their LoRAs each.
KEPT_STACKS = 4
KEPT_BATCHES = 64  # whose division into groups is remembered, without any tensor


@dataclass(frozen=True)
class Route:
    """What decodes the requests for `target`: a forward, perhaps a LoRA over it, a draft or none, and its end tokens.

    Routes of one engine have forwards of the same shape, and drafts over the same trunk. Those that share a forward
    are verified together, whatever their LoRAs.
    """

    forward: TargetModel
    stop_ids: frozenset[int]
    draft: Draft | None = None
    lora: Lora | None = None
    target: str = ""


@dataclass(frozen=True)
class Group:
    """Neighbouring rows that one forward serves: rows `first` to `last` - 1 of the batch."""

    forward: TargetModel
    first: int
    last: int
    loras: Callable[[], Lora] | None  # of the group's targets side by side; None when none of them has one
    members: tuple[Lora, ...]  # the same each by itself
    which: tuple[int, ...]  # index of each row's LoRA in these, -1 for none

    @property
    def alike(self) -> bool:
        """Whether all rows have the same LoRA, or none has one."""
        return len(set(self.which)) <= 1

    def lora_rows(self, num_tokens: int) -> LoraRows | None:
        """The deltas of this group's rows with `num_tokens` tokens each."""
        if self.loras is None:
            return None
        return LoraRows(self.members, self.which, num_tokens, self.forward.device, self.loras)


class Routes:
    """The targets of one engine by name."""

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}
        self._stack = remembered(KEPT_STACKS, self._stack_anew)
        self.groups = remembered(KEPT_BATCHES, self._divide)
        self.drafted = remembered(KEPT_BATCHES, self._drafted_anew)

    def __getitem__(self, target: str) -> Route:
        return self._routes[target]

    def __contains__(self, target: str) -> bool:
        return target in self._routes

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes.values())

    def host(self, route: Route) -> None:
        """Adds a target. Raises ValueError as `check` does."""
        self.check(route)
        self._routes[route.target] = route

    def check(self, route: Route) -> None:
        """Raises ValueError when its name is taken, or its forward or its trunk differs from the others'."""
        if route.target in self._routes:
            raise ValueError(f"target {route.target!r} is hosted already; a new version takes a new name")
        for other in self._routes.values():
            if shape(other.forward) != shape(route.forward):
                raise ValueError(
                    f"target {route.target!r}: its forward has another shape than {other.target!r}'s"
                )
            if route.draft and other.draft and route.draft.trunk is not other.draft.trunk:
                raise ValueError(
                    f"target {route.target!r}: its draft has another trunk than {other.target!r}'s"
                )

    def drop(self, target: str) -> None:
        """Forgets a target that no request needs any more."""
        del self._routes[target]
        self._stack.cache_clear()
        self.groups.cache_clear()
        self.drafted.cache_clear()

    def group_of(self, target: str) -> int:
        """A number that targets of one forward share."""
        return id(self._routes[target].forward)

    def _divide(self, targets: tuple[str, ...]) -> tuple[Group, ...]:
        """Neighbouring rows of one forward together; `targets` names the target of every row."""
        found, first = list[Group](), 0
        for _, names in itertools.groupby(targets, self.group_of):
            rows = list(names)
            adapted = [name if self._routes[name].lora is not None else None for name in rows]
            present, which = arrange(adapted)
            loras = functools.partial(self._side_by_side, present) if present else None
            members, forward = tuple(map(self._lora, present)), self._routes[rows[0]].forward
            found.append(Group(forward, first, first + len(rows), loras, members, which))
            first += len(rows)
        return tuple(found)

    def _drafted_anew(self, targets: tuple[str, ...]) -> tuple[bool, ...]:
        """Whether each row's target has a draft."""
        return tuple(self._routes[target].draft is not None for target in targets)

    def _side_by_side(self, present: tuple[str, ...]) -> Lora:
        """The LoRAs of these targets, each of which has one; a single one needs no stack."""
        return self._lora(present[0]) if len(present) == 1 else self._stack(present)

    def _stack_anew(self, present: tuple[str, ...]) -> Lora:
        return stack_loras([self._lora(name) for name in present])

    def _lora(self, target: str) -> Lora:
        lora = self._routes[target].lora
        assert lora is not None
        return lora


def arrange(owners: Sequence[Owner | None]) -> tuple[tuple[Owner, ...], tuple[int, ...]]:
    """Whose weights to stack for rows with these owners, and each row's index in the stack, -1 for none.

    Where few rows share an owner each row has its own entry: rows in line with the stack need not be gathered. Else
    each owner is in it once.
    """
    present = tuple(dict.fromkeys(owner for owner in owners if owner is not None))
    if 1 < len(present) and len(owners) <= 2 * len(present) and None not in owners:
        return tuple(owner for owner in owners if owner is not None), tuple(range(len(owners)))
    index = {owner: i for i, owner in enumerate(present)}
    return present, tuple(-1 if owner is None else index[owner] for owner in owners)


def shape(forward: TargetModel) -> tuple[object, ...]:
    """What forwards must have in common to share the slots of one engine."""
    cache = (len(forward.layers), forward.num_kv_heads, forward.head_dim, forward.max_positions)
    return (*cache, forward.hidden_size, forward.vocab_size, forward.dtype, forward.device)
