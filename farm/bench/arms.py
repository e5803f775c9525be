"""The ways to decode that `farm bench decode` compares: those of a quick and of a full run, and more beside them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from farm.bench.vllm_engine import CONTROLS as VLLM_CONTROLS
from farm.decode.tree import TreeShape

Workload = Literal["equal", "ragged"]
TREES = ("tree-2x4", "tree-4x5-12")
RAGGED_SLOTS = 8


@dataclass(frozen=True)
class Arm:
    """One way to decode. `batch` counts requests side by side."""

    engine: Literal["transformers", "transformers-assisted", "farm", "vllm"]
    control: str  # of the draft length, or a tree's name; ngram: vLLM drafts by looking its context up
    draft: Literal["none", "base", "adapted"]
    batch: int
    workload: Workload = "equal"

    @property
    def label(self) -> str:
        """batch/workload/engine/control/draft, by which arms are chosen."""
        return f"{self.batch}/{self.workload}/{self.engine}/{self.control}/{self.draft}"


def quick_arms() -> list[Arm]:
    """Batch 1 and 8: `generate`, plain decoding, both drafts at a fixed length, the adapted one with each control."""
    return [arm for batch in (1, 8) for arm in _arms(batch, ["fixed-4"], ["fixed-4", "adaedl", "cost"])]


def full_arms() -> list[Arm]:
    """Every batch size, every control and the ragged workload."""
    controls = [
        *TREES,
        "fixed-1",
        "fixed-2",
        "fixed-3",
        "fixed-4",
        "fixed-6",
        "adaedl",
        "adaedl-published",
        "cost",
    ]
    arms = [arm for batch in (1, 2, 4, 8, 16) for arm in _arms(batch, ["fixed-4"], controls)]
    arms.insert(1, Arm("transformers-assisted", "off", "none", 1))
    kinds: list[tuple[Any, str, Any]] = [
        ("transformers", "off", "none"), ("farm", "off", "none"), ("farm", "fixed-2", "adapted"),
        ("farm", "fixed-4", "adapted"), ("farm", "cost", "adapted"),
    ]  # fmt: skip
    return arms + [Arm(engine, control, draft, RAGGED_SLOTS, "ragged") for engine, control, draft in kinds]


def _arms(batch: int, base: Sequence[str], adapted: Sequence[str]) -> list[Arm]:
    return [
        Arm("transformers", "off", "none", batch),
        Arm("farm", "off", "none", batch),
        *(Arm("farm", control, "base", batch) for control in base),
        *(Arm("farm", control, "adapted", batch) for control in adapted),
    ]


def chosen(arms: Sequence[Arm], pattern: str) -> list[Arm]:
    """The arms whose label the regular expression matches. Raises ValueError when it matches none, or is none."""
    try:
        found = [arm for arm in arms if re.search(pattern, arm.label)]
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    if not found:
        raise ValueError(f"{pattern!r} matches no arm; they are {', '.join(arm.label for arm in arms)}")
    return found


def with_vllm(arms: Sequence[Arm]) -> list[Arm]:
    """The arms, and behind those of each batch size and workload vLLM's, plain and with its n-gram proposer."""
    return _beside(
        arms, lambda batch, workload: [Arm("vllm", one, "none", batch, workload) for one in VLLM_CONTROLS]
    )


def _beside(arms: Sequence[Arm], more: Callable[[int, Workload], list[Arm]]) -> list[Arm]:
    """The arms, and behind those of each batch size and workload some more that are not among them yet."""
    out: list[Arm] = []
    for (batch, workload), group in itertools.groupby(arms, key=lambda arm: (arm.batch, arm.workload)):
        out += group
        out += [arm for arm in more(batch, workload) if arm not in out]
    return out


def with_trees(arms: Sequence[Arm], names: Sequence[str]) -> list[Arm]:
    """The arms, and behind those of each batch size and workload one for each tree of the adapted draft.

    Raises ValueError for a name that is no tree's.
    """
    for name in names:
        if TreeShape.named(name) is None:
            raise ValueError(f"{name!r} is no tree: tree-WxD-N or tree-sampled-WxD-N, N nodes or W D of them")
    return _beside(
        arms, lambda batch, workload: [Arm("farm", name, "adapted", batch, workload) for name in names]
    )
