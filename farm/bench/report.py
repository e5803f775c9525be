"""What a benchmark of decoding shows: paired ratios in a table, a plot, and every row as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from farm.bench.arms import TREES
from farm.bench.decode import Row
from farm.bench.floor import Floor
from farm.evaluate.provenance import git_sha, hardware, versions

Key = tuple[str, int, str, str, str, str]  # target, batch, workload, engine, control, draft


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios over repeats, and their 5 % and 95 % quantiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, paired: Sequence[float]) -> Ratio:
        """Of the ratio that each repeat gave."""
        low, high = np.quantile(paired, [0.05, 0.95])
        return cls(statistics.median(paired), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def key_of(row: Row) -> Key:
    return row.target, row.batch, row.workload, row.engine, row.control, row.draft


def grouped(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """Rows of each arm, by repeat, arms in the order of their first row."""
    arms: dict[Key, list[Row]] = {}
    for row in rows:
        arms.setdefault(key_of(row), []).append(row)
    return arms


def ratio(rows: Sequence[Row], reference: Sequence[Row]) -> Ratio:
    """Speed of an arm over another's in the same repeats."""
    return Ratio.of([a.tokens_per_s / b.tokens_per_s for a, b in zip(rows, reference, strict=True)])


def against(arms: dict[Key, list[Row]], key: Key, engine: str) -> Ratio | None:
    """An arm over the plain arm of `engine` at the same target, batch and workload; None if that was not run."""
    target, batch, workload = key[:3]
    reference = arms.get((target, batch, workload, engine, "off", "none"))
    return None if reference is None else ratio(arms[key], reference)


def predicted(rows: Sequence[Row], plain: Sequence[Row]) -> float | None:
    """tau / (k c + v): the speed-up that drafting and verifying alone would leave, times of the same run."""
    if not rows[0].rounds or rows[0].tau is None:
        return None
    spent = [(r.draft_s or 0) + (r.verify_s or 0) for r in rows]
    rounds = [r.rounds or 1 for r in rows]
    step = statistics.median((r.verify_s or 0) / (r.rounds or 1) for r in plain)
    tau = statistics.median(r.tau or 0.0 for r in rows)
    return tau * step / statistics.median(s / n for s, n in zip(spent, rounds, strict=True))


def table(rows: Sequence[Row]) -> Table:
    """An arm a line: speed, tau, ratios over `generate` and over plain decoding, share of the time in the host."""
    arms = grouped(rows)
    out = Table(caption="medians over repeats; ratios within a repeat, with their 5 % and 95 % quantiles")
    for heading in ("target", "batch", "engine", "control", "draft"):
        out.add_column(heading)
    for heading in ("tokens/s", "tau", "over generate", "over plain", "predicted", "host"):
        out.add_column(heading, justify="right")
    before: tuple[str, int, str] | None = None
    for key, measured in arms.items():
        target, batch, workload, engine, control, draft = key
        if before not in (None, key[:3]):
            out.add_section()
        before = key[:3]
        speed = statistics.median(row.tokens_per_s for row in measured)
        tau = measured[0].tau and statistics.median(row.tau or 0.0 for row in measured)
        plain = arms.get((target, batch, workload, "farm", "off", "none"))
        expected = predicted(measured, plain) if plain and draft != "none" and batch == 1 else None
        out.add_row(
            target, str(batch) if workload == "equal" else f"{batch}, {workload}", engine, control, draft,
            f"{speed:,.1f}", f"{tau:.2f}" if tau and draft != "none" else "",
            str(against(arms, key, "transformers") or ""), str(against(arms, key, "farm") or ""),
            "" if expected is None else f"{expected:.2f}", _host_share(measured),
        )  # fmt: skip
    return out


def beside_best_fixed(rows: Sequence[Row]) -> list[str]:
    """A line for each target and workload that ran `cost`: its speed over plain decoding and the best fixed length."""
    arms = grouped(rows)
    over_plain = {key: found for key in arms if (found := against(arms, key, "farm")) is not None}
    lines = []
    for key in [key for key in over_plain if key[4] == "cost"]:
        target, batch, workload, _, _, draft = key
        alike = [other for other in over_plain if other[:4] == key[:4] and other[5] == draft]
        fixed = [other for other in alike if other[4].startswith("fixed-")]
        if fixed:
            best = max(fixed, key=lambda other: over_plain[other].median)
            share = over_best(arms[key], [arms[other] for other in fixed])
            lines.append(
                f"{target}, batch {batch}, {workload}: cost is {over_plain[key].median:.2f} of plain decoding and "
                f"{share.median:.2f} of the best fixed length ({best[4]})"
            )
    return lines


def over_best(rows: Sequence[Row], others: Sequence[Sequence[Row]]) -> Ratio:
    """Speed of an arm over the fastest of `others`, which in each repeat is the one that all the other repeats name.

    The best of several noisy medians is too good in the repeats that chose it.
    """
    paired = []
    for repeat, row in enumerate(rows):
        unseen = [[one.tokens_per_s for one in other if one.repeat != row.repeat] for other in others]
        medians = [statistics.median(speeds) if speeds else 0.0 for speeds in unseen]
        paired.append(row.tokens_per_s / others[medians.index(max(medians))][repeat].tokens_per_s)
    return Ratio.of(paired)


def _host_share(rows: Sequence[Row]) -> str:
    shares = []
    for row in rows:
        parts = (row.draft_s, row.verify_s, row.sample_s, row.host_s)
        if None in parts:
            return ""
        shares.append((row.host_s or 0.0) / sum(part or 0.0 for part in parts))
    return f"{statistics.median(shares):.1%}"


def write(folder: Path, rows: Sequence[Row], floors: dict[str, Floor], source: dict[str, Any]) -> list[Path]:
    """decode.json and, with something to draw, decode.png; returns their paths.

    `source` is the `origin` taken when the run began.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        **source,
        "floors": {
            name: {**asdict(floor), "seconds": floor.seconds, "share": _floor_share(rows, name, floor)}
            for name, floor in floors.items()
        },
        "rows": [asdict(row) for row in rows],
    }
    (folder / "decode.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(folder / "decode.png", rows)
    return [path for path in (folder / "decode.json", folder / "decode.png") if path.exists()]


def origin(command: str) -> dict[str, Any]:
    """Where a benchmark's file comes from: the command, the commit, the libraries, the machine."""
    return {"command": command, "git_sha": git_sha(), "versions": versions(), "hardware": hardware()}


def _floor_share(rows: Sequence[Row], target: str, floor: Floor) -> float | None:
    """Floor over the measured time of a plain step with one row."""
    steps = [
        (row.verify_s or 0) / (row.rounds or 1)
        for row in rows
        if (row.target, row.engine, row.control, row.batch) == (target, "farm", "off", 1)
    ]
    return floor.seconds / statistics.median(steps) if steps else None


def plot(path: Path, rows: Sequence[Row]) -> None:
    """A panel a target: speed of every arm over `generate`, by batch size, of the workload of the first row.

    Where `generate` was not among the arms there is nothing to draw, and no file.
    """
    from matplotlib.figure import Figure

    workload = rows[0].workload
    arms = grouped(row for row in rows if row.workload == workload)
    arms = {key: found for key, found in arms.items() if against(arms, key, "transformers") is not None}
    targets = list(dict.fromkeys(key[0] for key in arms))
    if not targets:
        path.unlink(missing_ok=True)
        return
    figure = Figure(figsize=(4.4 * len(targets), 4.2), layout="constrained")
    panels = figure.subplots(1, len(targets), squeeze=False, sharey=True)[0]
    for panel, target in zip(panels, targets, strict=True):
        lines = dict.fromkeys((key[3], key[4], key[5]) for key in arms if key[0] == target)
        for engine, control, draft in lines:
            points = [
                (batch, against(arms, (target, batch, workload, engine, control, draft), "transformers"))
                for batch in sorted({key[1] for key in arms})
                if (target, batch, workload, engine, control, draft) in arms
            ]
            measured = [(batch, found.median) for batch, found in points if found is not None]
            style = {"marker": "o", "markersize": 3.5, "label": _label(engine, control, draft)}
            panel.plot(*zip(*measured, strict=True), **style, **_style(engine, control, draft))
        panel.set_xscale("log", base=2)
        ticks = sorted({key[1] for key in arms})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set(title=target, xlabel="requests side by side")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("tokens/s over transformers generate")
    panels[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=130)


def _label(engine: str, control: str, draft: str) -> str:
    if engine != "farm":
        return engine if control == "off" else f"{engine}, {control}"
    return "plain" if draft == "none" else f"{control}, {draft} draft"


def _style(engine: str, control: str, draft: str) -> dict[str, Any]:
    """The same for an arm in every plot: a colour a family, fixed lengths from light to dark, what is odd dashed."""
    from matplotlib import colormaps

    odd = (
        engine.endswith("assisted") or control in ("ngram", "adaedl-published", TREES[-1]) or draft == "base"
    )
    family = engine if engine != "farm" else "plain" if draft == "none" else control.partition("-")[0]
    colors = {
        "transformers": "0.6", "transformers-assisted": "0.6", "vllm": "tab:purple", "plain": "black",
        "adaedl": "tab:orange", "cost": "tab:red", "tree": "tab:green", "fixed": "tab:blue",
    }  # fmt: skip
    color = colors[family]
    if family == "fixed" and draft == "adapted":
        color = colormaps["Blues"](0.3 + 0.1 * min(7, int(control.partition("-")[2])))
    width = 2.2 if family in ("cost", "plain") else 1.3
    return {"color": color, "linestyle": "--" if odd else "-", "linewidth": width}
