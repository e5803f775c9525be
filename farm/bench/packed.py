"""`farm bench packed`: targets adapted in one Ray Train run beside the same targets in runs of their own.

A pack pays once for starting a run's processes and its group, runs of their own pay each. What it may cost beyond its
training loops is bounded. Cost is measured here, not quality: one family's data can stand for more targets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from rich.table import Table

from farm.config import Manifest

TARGETS, QUICK_TARGETS = 16, 4
BOUND_S: Final = 45.0  # that a packed run may take beyond its training loops


@dataclass(frozen=True)
class Trained:
    """One target of a side, as its artifact tells."""

    name: str
    data: str  # the onboarded target whose answers it was trained on
    seed: int
    steps: int
    positions: int
    loop_s: float  # caching, reference and steps
    seconds: float  # of its whole run; in a pack, from its begin to its last checkpoint


@dataclass(frozen=True)
class Side:
    """All targets, adapted one way."""

    kind: Literal["packed", "runs"]
    num_runs: int
    at_once: int  # runs side by side
    workers: int  # of a run
    threads: int  # of a worker
    wall_s: float  # from asking for the first run to the last artifact: processes start and end in it
    trained: tuple[Trained, ...]

    @property
    def loops_s(self) -> float:
        """Summed seconds of the training loops."""
        return sum(one.loop_s for one in self.trained)

    @property
    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "loops_s": self.loops_s}


@dataclass(frozen=True)
class Cost:
    """Both sides, of the same targets."""

    packed: Side
    runs: Side

    @property
    def ratio(self) -> float:
        """Wall clock of the pack over that of runs of their own."""
        return self.packed.wall_s / self.runs.wall_s

    @property
    def beyond_loops_s(self) -> float:
        """What the pack took in all, less its training loops."""
        return self.packed.wall_s - self.packed.loops_s

    @property
    def around_s(self) -> float:
        """Of that, what passed before the pack's first target and after its last one."""
        return self.packed.wall_s - sum(one.seconds for one in self.packed.trained)

    @property
    def within_bound(self) -> bool:
        return self.beyond_loops_s <= BOUND_S


def quick(manifest: Manifest) -> Manifest:
    """One epoch a target: few steps in the same runs."""
    short = manifest.adapt.model_copy(update={"epochs": 1, "cached_epochs": 1, "tokens": None})
    return manifest.model_copy(update={"adapt": short})


def table(cost: Cost) -> Table:
    """A side a line."""
    out = Table(caption="wall: start and end of processes included; loops: summed over targets")
    out.add_column("targets")
    for heading in ("runs", "at once", "threads", "steps", "wall, s", "loops, s", "wall - loops, s"):
        out.add_column(heading, justify="right")
    for side in (cost.packed, cost.runs):
        # Loops that run side by side take more seconds together than pass.
        beyond = f"{side.wall_s - side.loops_s:.1f}" if side.at_once == 1 else ""
        out.add_row(
            "in one run" if side.kind == "packed" else "in runs of their own",
            str(side.num_runs), str(side.at_once), str(side.workers * side.threads),
            f"{sum(one.steps for one in side.trained):,}", f"{side.wall_s:.1f}", f"{side.loops_s:.1f}", beyond,
        )  # fmt: skip
    return out


def lines(cost: Cost) -> list[str]:
    """What the table comes to, and whose data were used more than once."""
    count, verdict = len(cost.packed.trained), "met" if cost.within_bound else "missed"
    found = [
        f"{count} targets in one run take {cost.ratio:.2f} of the time of {cost.runs.num_runs} runs of their own",
        f"beyond its loops the packed run took {cost.beyond_loops_s:.1f} s: at most {BOUND_S:.0f} s is {verdict}",
        f"of these, {cost.around_s:.1f} s are its start and end, the rest is between the loops of its targets",
    ]
    return [*found, *repeated(cost.packed.trained)]


def repeated(trained: Sequence[Trained]) -> list[str]:
    """A line where there are fewer targets' data than targets; none else."""
    names, seeds = {one.data for one in trained}, {one.seed for one in trained}
    if len(names) == len(trained):
        return []
    return [
        f"the data of {', '.join(sorted(names))} were used in turn under {len(seeds)} seeds: this is cost, not quality"
    ]


def write(folder: Path, cost: Cost, model: str, source: dict[str, Any]) -> Path:
    """packed.json; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        **source, "model": model, "targets": len(cost.packed.trained), "repeated": repeated(cost.packed.trained),
        "ratio": cost.ratio, "beyond_loops_s": cost.beyond_loops_s, "around_s": cost.around_s, "bound_s": BOUND_S,
        "within_bound": cost.within_bound, "packed": cost.packed.record, "runs": cost.runs.record,
    }  # fmt: skip
    (folder / "packed.json").write_text(json.dumps(record, indent=1) + "\n")
    return folder / "packed.json"
