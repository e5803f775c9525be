"""Train a family's trunk: `python -m jobs.train_trunk manifest.yaml [--dry-run] [--set a.b=c]...`.

The trunk goes into the manifest's store, where an onboarding finds it; the last line names its folder. Exit code
0, 1 when the training failed, 2 for a mistake in the manifest.
"""

import typer

from farm.cli.options import DryRun, ManifestPath, Overrides, mistakes_exit, say, show_plan, show_trunk
from farm.config import load_manifest
from farm.fleet.onboard import plan_trunk_training, train_trunk
from farm.fleet.session import connect

app = typer.Typer(add_completion=False)


@app.command()
def main(manifest: ManifestPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Let the base answer its prompts, then train the trunk and the base's private expert on the answers."""
    with mistakes_exit():
        settled = load_manifest(manifest, overrides or ())
        if dry_run:
            show_plan(*plan_trunk_training(settled))
            return
        with connect():
            folder, tau = train_trunk(settled, say)
    show_trunk(folder, tau)


if __name__ == "__main__":
    app()
