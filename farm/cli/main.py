"""The command line: `farm COMMAND`. Each command parses, calls the library and prints."""

from __future__ import annotations

import os
from pathlib import Path

# Importing them registers their commands, in the order of the help.
from farm.cli import (  # noqa: F401
    bench,
    bench_adapt,
    bench_serve,
    evaluating,
    exporting,
    onboarding,
    registry,
    serving,
    triage,
)
from farm.cli.options import app, mistakes_exit
from farm.fleet.session import set_worker_variables


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
