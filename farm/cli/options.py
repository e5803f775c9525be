"""What the commands and the jobs share: common options, how a mistake ends them, what they show; the app itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic_core import to_json
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from farm.config import Manifest, load_manifest
from farm.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()
notes = Console(stderr=True)  # what is no result, where the result is for a program

ManifestPath = Annotated[Path, typer.Argument(help="The family's manifest.yaml.", metavar="MANIFEST")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="A field of the manifest, repeatable: a.b=value, or name=value for ${name}."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and its cost; run nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else.")]
StorePath = Annotated[str, typer.Option("--store", help="The store's folder or URI.")]
MeasuredTarget = Annotated[str, typer.Option("--target", help="A target's name, or `base`.")]
PromptsSource = Annotated[str, typer.Option("--prompts", help="JSONL, Parquet or a folder of prompts.")]
MeasuresPath = Annotated[Path, typer.Option("--out", help="JSON file for the measures.", dir_okay=False)]
ZOO = Path(".farm/zoo/manifest.yaml")
SHOWN = ("tau_base_draft", "tau_adapted", "tokens_per_s_autoregressive", "speedup_adapted")


@contextmanager
def mistakes_exit() -> Iterator[None]:
    """A UserError is one line on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        notes.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(2) from None


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


@contextmanager
def probing_bar(shown_on: Console) -> Iterator[Callable[[str, int, int], None]]:
    """One bar over all targets, on a terminal."""
    columns = (
        TextColumn("probing {task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=shown_on, transient=True, disable=not shown_on.is_terminal) as bars:
        task = bars.add_task("the base")

        def show(what: str, done: int, of: int) -> None:
            bars.update(task, description=what, completed=done, total=of)

        yield show


def load_family(manifest: Path, overrides: list[str] | None, option: str = "manifest") -> Manifest:
    """A manifest that may be the demo's zoo, which is there only after a demo; `option` is how it is given."""
    if not manifest.exists():
        raise UserError(f"{manifest}: does not exist; run `farm demo` first, or give a family's {option}")
    return load_manifest(manifest, overrides or ())


def say(text: str, shown_on: Console = console) -> None:
    """A line as it is: paths and reasons in it may hold square brackets, and programs read it by lines."""
    shown_on.print(text, markup=False, highlight=False, soft_wrap=True)


def show_json(record: Any) -> None:
    """Records, or collections of them, as they are; a figure that is not known is null."""
    typer.echo(to_json(record, indent=1, inf_nan_mode="null").decode())


def show_plan(table: Table, lines: Iterable[str], shown_on: Console = console) -> None:
    """What a dry run has to say."""
    shown_on.print(table)
    for text in lines:
        say(text, shown_on)


def keep_measures(measured: Mapping[str, Any], out: Path) -> None:
    """Writes what `evaluate` measured as JSON and shows the figures that decide; the last line names the file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(measured, indent=1) + "\n")
    for name in SHOWN:
        if measured.get(name) is not None:
            console.print(f"{name:<28} {measured[name]:.3f}", highlight=False)
    say(str(out))


def show_trunk(folder: str, tau: float | None) -> None:
    """What training a trunk came to; the last line names its folder."""
    if tau is not None:
        say(f"tau of the base draft on the base: {tau:.2f}")
    say(f"trunk: {folder}")


def store_uri(value: str) -> str:
    return value if "://" in value else Path(value).expanduser().resolve().as_uri()
