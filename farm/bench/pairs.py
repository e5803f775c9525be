"""Two ways to the same values, measured in turn within one run: what `farm bench operators` shows and writes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from farm.bench.report import Ratio


@dataclass(frozen=True)
class Pair:
    """Two ways to the same values. Either side makes `calls` calls and returns the last one's output."""

    operator: str
    case: str  # which weight or which setting
    inputs: str  # sizes of what is passed in
    dtype: str
    library: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    calls: int = 1
    rewind: Callable[[], None] = lambda: None  # to call, untimed, before `library`


@dataclass(frozen=True)
class OperatorRow:
    """One pair, measured. Seconds are of one call, medians over repeats; the ratio is taken within a repeat."""

    model: str
    operator: str
    case: str
    inputs: str
    dtype: str
    threads: int
    repeats: int
    library_s: float
    ours_s: float
    speedup: Ratio  # the library's seconds over ours
    difference: float  # largest of the outputs' differences over the largest output


@torch.inference_mode()
def measure(pair: Pair, model: str, repeats: int) -> OperatorRow:
    """Runs both sides once to warm up and compare them, then `repeats` times, the first side in turn."""
    pair.rewind()
    expected, found = pair.library().float(), pair.ours().float()
    difference = float((expected - found).abs().max() / expected.abs().max())
    library_s, ours_s = [], []
    for repeat in range(repeats):
        pair.rewind()
        if repeat % 2:
            ours_s.append(_seconds(pair.ours))
        library_s.append(_seconds(pair.library))
        if not repeat % 2:
            ours_s.append(_seconds(pair.ours))
    return OperatorRow(
        model, pair.operator, pair.case, pair.inputs, pair.dtype, torch.get_num_threads(), repeats,
        statistics.median(library_s) / pair.calls, statistics.median(ours_s) / pair.calls,
        Ratio.of([theirs / mine for theirs, mine in zip(library_s, ours_s, strict=True)]), difference,
    )  # fmt: skip


def _seconds(run: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    if run().is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def table(rows: Sequence[OperatorRow]) -> Table:
    """A pair a line: seconds of one call and how many times as fast ours is."""
    out = Table(caption="medians over repeats; ratios within a repeat, with their 5 % and 95 % quantiles")
    for heading in ("operator", "case", "inputs", "dtype"):
        out.add_column(heading)
    for heading in ("library µs", "ours µs", "library / ours", "difference"):
        out.add_column(heading, justify="right")
    for before, row in zip((None, *rows), rows, strict=False):
        if before is not None and (before.operator, before.case, before.dtype) != (
            row.operator,
            row.case,
            row.dtype,
        ):
            out.add_section()
        out.add_row(
            row.operator, row.case, row.inputs, row.dtype,
            f"{1e6 * row.library_s:,.1f}", f"{1e6 * row.ours_s:,.1f}", str(row.speedup), f"{row.difference:.0e}",
        )  # fmt: skip
    return out


def write(folder: Path, rows: Sequence[OperatorRow], source: dict[str, Any]) -> Path:
    """operators.json; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "operators.json"
    path.write_text(json.dumps({**source, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return path
