"""Train a family's trunk: `python -m jobs.train_trunk manifest.yaml [--set a.b=c]...`.

The trunk goes into the manifest's store, where an onboarding finds it; the last line names its folder. Exit code
0, 1 when the training failed, 2 for a mistake in the manifest.
"""

import typer

from farm.cli.options import ManifestPath, Overrides, console, mistakes_exit, show_trunk
from farm.config import load_manifest
from farm.fleet.onboard import train_trunk
from farm.fleet.session import connect

app = typer.Typer(add_completion=False)


@app.command()
def main(manifest: ManifestPath, overrides: Overrides = None) -> None:
    """Let the base answer its prompts, then train the trunk and the base's private expert on the answers."""
    with mistakes_exit():
        settled = load_manifest(manifest, overrides or ())
        with connect():
            folder, tau = train_trunk(settled, console.print)
    show_trunk(folder, tau)


if __name__ == "__main__":
    app()
