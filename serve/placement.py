"""Which targets share a replica: packing by bytes, pure.

What targets can share is counted once a group: the process, the trunk, a checkpoint, the slots of a shape.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

GIB = 2**30


@dataclass(frozen=True)
class Need:
    """Bytes that a target takes in a replica, by what else may take the same ones."""

    target: str
    checkpoint: str
    checkpoint_bytes: int  # shared with the targets of the same checkpoint
    own_bytes: int  # its LoRA, its private experts
    shape: Hashable  # targets of one shape share an engine's slots
    cache_bytes: int  # of that engine
    # Of LoRAs and experts side by side for its batches, where this target is the largest.
    mixture_bytes: int = 0


@dataclass(frozen=True)
class Group:
    """Targets that the replicas of one deployment host together."""

    needs: tuple[Need, ...]
    shared_bytes: int  # of the process and the trunk

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(need.target for need in self.needs)

    @property
    def weight_bytes(self) -> int:
        """Of checkpoints, LoRAs and private experts."""
        checkpoints = {need.checkpoint: need.checkpoint_bytes for need in self.needs}
        return sum(checkpoints.values()) + sum(need.own_bytes for need in self.needs)

    @property
    def cache_bytes(self) -> int:
        return sum({need.shape: need.cache_bytes for need in self.needs}.values())

    @property
    def mixture_bytes(self) -> int:
        largest: dict[Hashable, int] = {}
        for need in self.needs:
            largest[need.shape] = max(need.mixture_bytes, largest.get(need.shape, 0))
        return sum(largest.values())

    @property
    def num_bytes(self) -> int:
        return self.shared_bytes + self.weight_bytes + self.cache_bytes + self.mixture_bytes

    def with_(self, needs: Sequence[Need]) -> Group:
        return Group((*self.needs, *needs), self.shared_bytes)


@dataclass
class Packed:
    """`refused`: targets that fit into no replica, each with the reason."""

    groups: list[Group] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def pack(needs: Sequence[Need], shared_bytes: int, budget_bytes: int | None) -> Packed:
    """Groups of at most `budget_bytes` each; None: one group for all.

    First fit, largest first. Targets of one checkpoint stay together while they fit into one replica; a checkpoint goes
    to a group of its shape before any other, since its slots are paid for there.
    """
    packed = Packed()
    units: dict[str, list[Need]] = {}
    for need in needs:
        alone = Group((need,), shared_bytes).num_bytes
        if budget_bytes is not None and alone > budget_bytes:
            packed.refused[need.target] = (
                f"{need.target} needs {alone / GIB:.3g} GiB in a replica, resources.serve.memory_gib is "
                f"{budget_bytes / GIB:.3g}; raise it, or lower serve.num_slots or serve.max_length"
            )
        else:
            units.setdefault(need.checkpoint, []).append(need)
    empty = Group((), shared_bytes)
    for unit in sorted(units.values(), key=lambda unit: -empty.with_(unit).num_bytes):
        parts = [unit] if _fits(empty.with_(unit), budget_bytes) else [[need] for need in unit]
        for part in parts:
            _place(packed.groups, part, empty, budget_bytes)
    return packed


def _place(groups: list[Group], part: Sequence[Need], empty: Group, budget_bytes: int | None) -> None:
    """Into the group that pays least more for it, the first of these; else into a new one."""
    rooms = [
        (group.with_(part).num_bytes - group.num_bytes, index)
        for index, group in enumerate(groups)
        if _fits(group.with_(part), budget_bytes)
    ]
    if rooms:
        _, index = min(rooms)
        groups[index] = groups[index].with_(part)
    else:
        groups.append(empty.with_(part))


def _fits(group: Group, budget_bytes: int | None) -> bool:
    return budget_bytes is None or group.num_bytes <= budget_bytes
