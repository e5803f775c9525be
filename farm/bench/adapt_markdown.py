"""What `farm bench adapt` shows, as a page: every way, the default beside its rivals, the filter, the forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Final

from farm.bench.adapt import Row, grouped
from farm.bench.adapt_report import compare, spread, tau_after

# Losses with and without the filter: method and variant of each cell, a line a loss.
FILTERED: Final = {
    "kl": (("losses", "kl"), ("adaspec", "kl + adaspec")),
    "lk": (("losses", "lk"), ("adaspec", "lk + adaspec")),
}
Cells = Sequence[str]


def page(rows: Sequence[Row], command: str, commit: str) -> str:
    """Markdown of everything that was measured."""
    parts = [
        f"# Ways to adapt a draft\n\n`{command}` at commit {commit}; the machine is in adapt.json. Means over "
        "seeds, tau with its range."
    ]
    for title, lines in (
        ("Every way", _ways(rows)),
        ("The default beside its rivals", _rivals(rows)),
        ("Losses and the AdaSPEC filter: tau without it, with it", _filters(rows)),
        ("Cached and unrolled: tau at equal seconds", _forms(rows)),
    ):
        header, *body = lines
        if body:
            parts.append(f"## {title}\n\n{_table(header, body)}")
    return "\n\n".join(parts) + "\n"


def _table(header: Cells, body: Sequence[Cells]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *body))


def _ways(rows: Sequence[Row]) -> Iterator[Cells]:
    yield ("target", "method", "variant", "answers", "loss", "form", "tau", "seconds", "KiB trained")
    for (target, method, variant), seeds in grouped(rows).items():
        first = seeds[0]
        share = "" if first.data == "none" else f"{first.data}, {first.selection} {first.fraction:.0%}"
        seconds = sum(row.train_seconds for row in seeds) / len(seeds)
        size = f"{first.adapter_bytes / 1024:,.0f}" if first.adapter_bytes else ""
        tau = spread([row.tau for row in seeds])
        yield target, method, variant, share, first.loss, first.form, tau, f"{seconds:.1f}", size


def _rivals(rows: Sequence[Row]) -> Iterator[Cells]:
    yield (
        "target", "seed", "over converged full retraining", "its seconds over those to convergence",
        "over full retraining at equal seconds", "over eda", "bytes over full retraining",
    )  # fmt: skip
    for one in compare(rows):
        target, seed, *values = asdict(one).values()
        yield target, str(seed), *("" if value is None else f"{value:.2f}" for value in values)


def _filters(rows: Sequence[Row]) -> Iterator[Cells]:
    yield "target", "loss", "all positions", "AdaSPEC"
    found = grouped(rows)
    for target in dict.fromkeys(target for target, *_ in found):
        for loss, cells in FILTERED.items():
            taus = [[row.tau for row in found.get((target, *cell), ())] for cell in cells]
            if all(taus):
                yield target, loss, *map(spread, taus)


def _forms(rows: Sequence[Row]) -> Iterator[Cells]:
    """Each run after as many seconds as the shortest of its seed took."""
    yield "target", "form", "tau", "seconds"
    runs: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in rows:
        if row.method == "forms":
            runs.setdefault((row.target, row.seed), {}).setdefault(row.variant, []).append(row)
    taus: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (target, _), curves in runs.items():
        seconds = min(max(row.train_seconds for row in curve) for curve in curves.values())
        for variant, curve in curves.items():
            curve.sort(key=lambda row: row.train_seconds)
            taus.setdefault((target, variant), []).append((tau_after(curve, seconds), seconds))
    for (target, variant), found in taus.items():
        seconds = sum(each for _, each in found) / len(found)
        yield target, variant, spread([tau for tau, _ in found]), f"{seconds:.1f}"
