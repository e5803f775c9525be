"""Processes that are killed at the worst moment."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_until(said: str, program: str, *arguments: str) -> None:
    """Runs a Python program until it prints the line `said`, then kills it; RuntimeError when it ends or says else."""
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.kill()
    if line != f"{said}\n":
        raise RuntimeError(f"the process said {line!r} instead of {said!r}")
