"""Measure a target's live adapter: `python -m jobs.evaluate manifest.yaml --target NAME --prompts F --out F.json`.

Exit code 0, or 2 for a mistake in the arguments. The last line names the file with the measures.
"""

import typer

from farm.cli.options import (
    ManifestPath,
    MeasuredTarget,
    MeasuresPath,
    Overrides,
    PromptsSource,
    keep_measures,
    mistakes_exit,
)
from farm.config import load_manifest
from farm.fleet.measure import evaluate_on_cluster
from farm.fleet.session import connect

app = typer.Typer(add_completion=False)


@app.command()
def main(
    manifest: ManifestPath,
    target: MeasuredTarget,
    prompts: PromptsSource,
    out: MeasuresPath,
    overrides: Overrides = None,
) -> None:
    """Compare the base draft with the live adapter of a target on any prompts."""
    with mistakes_exit():
        settled = load_manifest(manifest, overrides or ())
        with connect():
            measured = evaluate_on_cluster(settled, target, prompts)
    keep_measures(measured, out)


if __name__ == "__main__":
    app()
