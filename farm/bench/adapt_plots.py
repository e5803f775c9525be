"""The plots of `farm bench adapt`: a panel a target; one colour means the same in all panels of a figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Final

from farm.bench.adapt import Row, grouped

# Whose survival is shown.
DRAFTS: Final = ("base-draft", "default", "eda", "eda-original", "full-retrain", "lora")


def seconds(rows: Sequence[Row]) -> Any:
    """Tau against training seconds: a point a run, a line where one was measured on its way."""
    trained = [row for row in rows if row.train_seconds]
    figure, panels = _panels(_distinct(row.target for row in trained))
    colours = _colours(row.method for row in trained)
    for panel, target in panels:
        for (of, method, variant), seeds in grouped(trained).items():
            if of != target:
                continue
            for seed in (row.seed for row in seeds):
                run = (target, method, variant, seed)
                way = [r for r in trained if (r.target, r.method, r.variant, r.seed) == run]
                way.sort(key=lambda row: row.train_seconds)
                panel.plot(
                    [row.train_seconds for row in way], [row.tau for row in way],
                    color=colours[method], marker="o", markersize=4, label=method,
                )  # fmt: skip
        panel.set(xlabel="training seconds", ylabel="tau")
        panel.set_xscale("log")
    _legend(figure, panels)
    return figure


def fraction(rows: Sequence[Row]) -> Any:
    """Tau against the selected share of the rows, a line a selection; None where there is but one share."""
    chosen = [row for row in rows if row.method in ("selection", "default") and row.progress == 1.0]
    selected = [row for row in chosen if row.method == "selection"]
    if not selected:
        return None
    figure, panels = _panels(_distinct(row.target for row in selected))
    colours = _colours(row.selection for row in selected)
    for panel, target in panels:
        near = [row for row in chosen if row.target == target]
        for selection in _distinct(row.selection for row in near if row.method == "selection"):
            mine = [row for row in near if row.selection == selection or row.fraction == 1.0]
            shares = sorted({row.fraction for row in mine})
            taus = [statistics.mean(r.tau for r in mine if r.fraction == share) for share in shares]
            panel.plot(shares, taus, color=colours[selection], marker="o", markersize=4, label=selection)
        panel.set(xlabel="share of the rows", ylabel="tau")
    _legend(figure, panels)
    return figure


def survival(rows: Sequence[Row]) -> Any:
    """Share of rounds in which each drafted position was accepted, a line a variant of the main methods."""
    shown = [row for row in rows if row.method in DRAFTS]
    figure, panels = _panels(_distinct(row.target for row in shown))
    colours = _colours(row.variant for row in shown)
    for panel, target in panels:
        for (of, _, variant), seeds in grouped(shown).items():
            if of == target:
                means = [
                    statistics.mean(position) for position in zip(*(r.survival for r in seeds), strict=False)
                ]
                positions = range(1, len(means) + 1)
                panel.plot(positions, means, color=colours[variant], marker="o", markersize=4, label=variant)
        panel.set(xlabel="drafted position", ylabel="survival", ylim=(0, 1))
        panel.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, panels)
    return figure


def _panels(targets: Sequence[str]) -> tuple[Any, list[tuple[Any, str]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(targets) + 1.8, 4.2), layout="constrained")
    panels = list(zip(figure.subplots(1, len(targets), squeeze=False)[0], targets, strict=True))
    for panel, target in panels:
        panel.set(title=target)
        panel.grid(alpha=0.3)
    return figure, panels


def _legend(figure: Any, panels: Sequence[tuple[Any, str]]) -> None:
    """One for all panels, each name once."""
    lines = [line for panel, _ in panels for line in panel.get_lines()]
    named = {line.get_label(): line for line in reversed(lines)}
    names = _distinct(line.get_label() for line in lines)
    figure.legend([named[name] for name in names], names, fontsize=7, loc="outside right upper")


def _colours(names: Iterable[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    known = _distinct(names)
    table = colormaps["tab10" if len(known) <= 10 else "tab20"]
    return {name: table(index % table.N) for index, name in enumerate(known)}


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
