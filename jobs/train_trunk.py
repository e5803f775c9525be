"""Train a family's trunk: `python -m jobs.train_trunk manifest.yaml [--set a.b=c]...`.

The trunk goes into the manifest's store, where an onboarding finds it; the last line names its folder. Exit code
0, 1 when the training failed, 2 for a mistake in the manifest.
"""

import typer
from rich.console import Console

from farm.config import load_manifest
from farm.fleet.onboard import train_trunk
from farm.fleet.session import connect
from jobs.options import ManifestPath, Overrides, mistakes_exit

app = typer.Typer(add_completion=False)


@app.command()
def main(manifest: ManifestPath, overrides: Overrides = None) -> None:
    """Let the base answer its prompts, then train the trunk and the base's private expert on the answers."""
    console = Console()
    with mistakes_exit():
        settled = load_manifest(manifest, overrides or ())
        with connect():
            folder, tau = train_trunk(settled, console.print)
    if tau is not None:
        console.print(f"tau of the base draft on the base: {tau:.2f}", highlight=False)
    console.print(f"trunk: {folder}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
