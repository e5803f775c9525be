"""What the commands share: the app, the console, common options, bars for long work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()

ManifestPath = Annotated[Path, typer.Argument(help="The family's manifest.yaml.", metavar="MANIFEST")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="a.b=value, or name=value for ${name}.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and its cost; run nothing.")]
StorePath = Annotated[str, typer.Option("--store", help="The store's folder or URI.")]


@contextmanager
def training_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each model on a terminal; elsewhere a line at each model's start and at each quarter."""
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, object] = {}

        def show(what: str, step: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(f"training {what}", total=of)
            bars.update(tasks[what], completed=step)  # type: ignore[arg-type]
            if not console.is_terminal and (step == 1 or step % max(1, of // 4) == 0):
                console.print(f"training {what}: step {step} of {of}", highlight=False)

        yield show


def store_uri(value: str) -> str:
    return value if "://" in value else Path(value).expanduser().resolve().as_uri()
