"""What `farm bench adapt` shows: a table, how the default compares with its rivals, three plots, every row as JSON."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from rich.table import Table

import farm
from farm.bench import adapt_plots
from farm.bench.adapt import Row, grouped

PLATEAU: Final = 0.99  # a run has converged where it is first within 1 % of its best
FILE: Final = "adapt.json"
SAME: Final = (
    "code",
    "adapt",
    "evaluate",
    "dtype",
    "trunk",
)  # of a run that goes on with an earlier one's rows


@dataclass(frozen=True)
class Comparison:
    """The default beside its rivals on one target and seed; None where a rival was not measured."""

    target: str
    seed: int
    of_converged_tau: float | None  # default's tau over that of full retraining, converged
    of_convergence_seconds: float | None  # its seconds over those of full retraining to convergence
    of_tau_at_equal_seconds: float | None  # its tau over that of full retraining after as many seconds
    of_eda: float | None  # its tau over that of eda
    of_bytes: float | None  # its trained bytes over those of full retraining


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """A record for each target and seed that the default was measured on."""
    out = []
    for default in (row for row in rows if row.method == "default" and row.progress == 1.0):
        near = [row for row in rows if (row.target, row.seed) == (default.target, default.seed)]
        full = sorted(
            (row for row in near if row.method == "full-retrain"), key=lambda row: row.train_seconds
        )
        eda = next((row for row in near if row.method == "eda"), None)
        converged = None
        if full:
            converged = next(row for row in full if row.tau >= PLATEAU * max(r.tau for r in full))
        out.append(
            Comparison(
                default.target, default.seed,
                None if converged is None else default.tau / max(row.tau for row in full),
                None if converged is None else default.train_seconds / converged.train_seconds,
                default.tau / tau_after(full, default.train_seconds) if full else None,
                None if eda is None else default.tau / eda.tau,
                default.adapter_bytes / full[-1].adapter_bytes if full else None,
            )
        )  # fmt: skip
    return out


def tau_after(curve: Sequence[Row], seconds: float) -> float:
    """Tau of a run after some seconds, on straight lines between its measured points."""
    before = [row for row in curve if row.train_seconds <= seconds]
    after = [row for row in curve if row.train_seconds > seconds]
    if not before or not after:
        return (before[-1] if before else after[0]).tau
    left, right = before[-1], after[0]
    share = (seconds - left.train_seconds) / (right.train_seconds - left.train_seconds)
    return left.tau + share * (right.tau - left.tau)


def table(rows: Sequence[Row]) -> Table:
    """A variant a line, means over seeds."""
    out = Table(caption="means over seeds, tau with its spread; seconds of caching, reference and steps")
    for heading in ("target", "method", "variant", "data", "rows", "loss", "form"):
        out.add_column(heading)
    for heading in ("tau", "alpha", "seconds", "positions", "GFLOP", "KiB"):
        out.add_column(heading, justify="right")
    target = ""
    for (of, method, variant), seeds in grouped(rows).items():
        if target not in ("", of):
            out.add_section()
        target, first = of, seeds[0]
        share = "" if first.data == "none" else f"{first.selection} {first.fraction:.0%}"
        out.add_row(
            of, method, variant, first.data, share, first.loss, first.form,
            spread([row.tau for row in seeds]), f"{_mean(seeds, 'alpha'):.3f}",
            f"{_mean(seeds, 'train_seconds'):.1f}", f"{_mean(seeds, 'train_tokens'):,.0f}",
            f"{_mean(seeds, 'train_flops') / 1e9:,.0f}", f"{first.adapter_bytes / 1024:,.0f}",
        )  # fmt: skip
    return out


def comparison_table(found: Sequence[Comparison]) -> Table:
    """The default over its rivals, a line a target and seed."""
    out = Table(caption="the default over its rivals; full retraining: best of three learning rates")
    for heading in (
        "target", "seed", "converged tau", "seconds to converge", "tau at equal seconds", "tau of eda", "bytes",
    ):  # fmt: skip
        out.add_column(heading, justify="right")
    for one in found:
        values = list(asdict(one).values())
        out.add_row(one.target, str(one.seed), *("" if v is None else f"{v:.2f}" for v in values[2:]))
    return out


def spread(values: Sequence[float]) -> str:
    """Mean, and the range where there are several."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def write(folder: Path, rows: Sequence[Row], source: dict[str, Any]) -> list[Path]:
    """adapt.json and the plots; returns their paths."""
    paths = [keep(folder, rows, source)]
    for name, plot in (
        ("seconds", adapt_plots.seconds),
        ("fraction", adapt_plots.fraction),
        ("survival", adapt_plots.survival),
    ):
        figure = plot(rows)
        if figure is not None:
            paths.append(folder / f"adapt-{name}.png")
            figure.savefig(paths[-1], dpi=130)
    return paths


def keep(folder: Path, rows: Sequence[Row], source: dict[str, Any]) -> Path:
    """adapt.json with the rows so far."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        **source,
        "comparison": [asdict(one) for one in compare(rows)],
        "rows": [asdict(row) for row in rows],
    }
    part = folder / f".{FILE}.part"
    part.write_text(json.dumps(record, indent=1) + "\n")
    return part.replace(folder / FILE)


def kept(folder: Path, model: str, source: dict[str, Any]) -> list[Row]:
    """The rows of an earlier run of this model by the same code, settings and trunk, which need not be measured again.

    Those of a target are kept as long as it has the same answers.
    """
    path = folder / FILE
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    names = {one.name for one in fields(Row)}
    if any(record.get(name) != source.get(name) for name in SAME):
        return []
    if any(set(row) != names for row in record["rows"]):
        return []
    rows = [Row(**{**row, "survival": tuple(row["survival"])}) for row in record["rows"]]
    before, now = (one.get("answers", {}) for one in (record, source))
    return [row for row in rows if row.model == model and before.get(row.target) == now.get(row.target)]


def code_digest() -> str:
    """Names the library's source files: a commit does not say what was changed since."""
    digest, root = hashlib.sha256(), Path(farm.__path__[0])
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _mean(rows: Sequence[Row], name: str) -> float:
    return statistics.mean(getattr(row, name) for row in rows)
