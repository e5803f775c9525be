"""Writing and showing the report of a run: `report.json`, `report.html`, the table of the terminal."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from farm.evaluate.page import render_page
from farm.evaluate.records import Decision, Report, Sampled, TargetRow, figure

__all__ = ["Report", "Sampled", "TargetRow", "read_report", "terminal_table", "write_report"]

DECISION_STYLES: Mapping[Decision, str] = {
    "promoted": "bold green",
    "kept": "yellow",
    "skipped": "cyan",
    "refused": "bold magenta",
    "failed": "bold red",
}


def write_report(folder: Path, report: Report) -> tuple[Path, Path]:
    """Write `report.json`, then `report.html`, into `folder` (made if absent); return their paths.

    Each file appears whole or not at all, and an earlier report in the folder is replaced. The figures go
    first: they are on disk even if the page cannot be drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    json_path, html_path = folder / "report.json", folder / "report.html"
    _write_whole(json_path, report.model_dump_json(indent=2) + "\n")
    _write_whole(html_path, render_page(report))
    return json_path, html_path


def read_report(path: Path) -> Report:
    """Load a `report.json` into a record equal to the written one. ValueError for any other file."""
    return Report.model_validate_json(path.read_text(encoding="utf-8"))


def _write_whole(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def terminal_table(report: Report) -> Table:
    """The targets as a rich table. Names and reasons are plain text: console markup in them has no effect."""
    setting = f"k = {report.k} · T = {report.temperature:g} · {report.prompts} prompts a target"
    table = Table(
        title=Text(f"run {report.run_id} · {setting}"),
        caption=Text("\n".join(_notes(report))),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("target", overflow="fold", min_width=8)
    table.add_column("decision", no_wrap=True)
    for heading in ("base", "adapted", "kept", "speed-up", "tok/s", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("version", no_wrap=True)
    for row in report.targets:
        retention = None if row.retention is None else 100 * row.retention
        table.add_row(
            Text(row.name),
            Text(row.decision, style=DECISION_STYLES[row.decision]),
            figure(row.tau_base_draft),
            figure(row.tau_adapted),
            figure(retention, 0, " %"),
            figure(row.speedup_adapted, suffix="×"),
            figure(row.tokens_per_s_adapted, 0),
            figure(row.total_seconds, 0),
            Text(row.adapter_version or "–"),
        )
    return table


def _notes(report: Report) -> list[str]:
    """Lines below the table: what its columns mean, and the reason of each decision."""
    base = figure(report.tau_base_on_base)
    return [
        f"tau of the base draft (on the base: {base}) and adapted; kept: base draft, of that",
        "speed-up: adapted draft over our plain decoding, batch 1; s: all stages",
        *(f"{row.name}: {row.reason}" for row in report.targets if row.reason),
    ]
