"""Train a family's trunk: `python -m jobs.train_trunk manifest.yaml [--set a.b=c]...`.

The trunk goes into the manifest's store, where an onboarding finds it; the last line names its folder. Exit code
0, 1 when the training failed, 2 for a mistake in the manifest.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from farm.config import UserError, load_manifest
from farm.fleet.onboard import train_trunk
from farm.fleet.session import connect

app = typer.Typer(add_completion=False)


@app.command()
def main(
    manifest: Annotated[Path, typer.Argument(help="The family's manifest.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="a.b=value, or name=value for ${name}.")
    ] = None,
) -> None:
    """Let the base answer its prompts, then train the trunk and the base's private expert on the answers."""
    console = Console()
    try:
        settled = load_manifest(manifest, overrides or ())
        with connect():
            folder, tau = train_trunk(settled, console.print)
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    if tau is not None:
        console.print(f"tau of the base draft on the base: {tau:.2f}", highlight=False)
    console.print(f"trunk: {folder}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
