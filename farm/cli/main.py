"""The command line: `farm COMMAND`. Each command parses, calls the library and prints."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

# Importing them registers their commands, in the order of the help: that in which a family needs them.
# isort: off
from farm.cli import (  # noqa: F401
    onboarding,
    triage,
    evaluating,
    serving,
    exporting,
    registry,
    bench,
    bench_adapt,
    bench_serve,
)

# isort: on
from farm.cli.options import app, mistakes_exit
from farm.fleet.session import set_worker_variables


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"farm {version('farm')}")
        raise typer.Exit


@app.callback()
def farm(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Adapt one speculative-decoding draft to a family of fine-tuned models, and serve them.

    A mistake is one line that names the remedy, and exit code 2.
    """


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2."""
    _quiet_libraries()
    set_worker_variables()
    with mistakes_exit():
        app()


def _quiet_libraries() -> None:
    """Their bars and notices would bury the farm's own lines; an error still shows."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not any(Path("/dev").glob("nvidia*")):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says on every import that it looked
