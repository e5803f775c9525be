"""Onboard a family: `python -m jobs.onboard manifest.yaml [--dry-run] [--set a.b=c]...`.

Exit code 0 when every target was promoted, kept or skipped, 1 when one was refused or failed, 2 for a mistake
in the manifest. The last line names the report.
"""

import sys

import typer
from rich.console import Console

from farm.cli.options import DryRun, ManifestPath, Overrides, mistakes_exit, say, show_plan
from farm.config import load_manifest
from farm.evaluate.report import terminal_table
from farm.fleet.onboard import exit_code, onboard, plan_onboarding
from farm.fleet.session import connect

LOG_WIDTH = 150  # of a job's log, where no terminal says how wide it is

app = typer.Typer(add_completion=False)


@app.command()
def main(manifest: ManifestPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Regenerate, adapt, evaluate and publish every target of the manifest that is not done yet."""
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    with mistakes_exit():
        settled = load_manifest(manifest, overrides or ())
        if dry_run:
            show_plan(*plan_onboarding(settled), console)
            return
        with connect():
            report, folder = onboard(settled, say)
    console.print(terminal_table(report))
    say(f"report: {folder}/report.json")
    raise typer.Exit(exit_code(report))


if __name__ == "__main__":
    app()
