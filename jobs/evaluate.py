"""Measure a target's live adapter: `python -m jobs.evaluate manifest.yaml --target NAME --prompts F --out F.json`.

Exit code 0, or 2 for a mistake in the arguments. The last line names the file with the measures.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from farm.config import load_manifest
from farm.fleet.measure import evaluate_on_cluster
from farm.fleet.session import connect
from jobs.options import ManifestPath, Overrides, mistakes_exit

SHOWN = ("tau_base_draft", "tau_adapted", "tokens_per_s_autoregressive", "speedup_adapted")

app = typer.Typer(add_completion=False)


@app.command()
def main(
    manifest: ManifestPath,
    target: Annotated[str, typer.Option(help="A target's name, or `base`.")],
    prompts: Annotated[str, typer.Option(help="JSONL, Parquet or a folder of prompts.")],
    out: Annotated[Path, typer.Option(help="JSON file for the measures.")],
    overrides: Overrides = None,
) -> None:
    """Compare the base draft with the live adapter of a target on any prompts."""
    console = Console()
    with mistakes_exit():
        settled = load_manifest(manifest, overrides or ())
        with connect():
            measured = evaluate_on_cluster(settled, target, prompts)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(measured, indent=1) + "\n")
    for name in SHOWN:
        if measured.get(name) is not None:
            console.print(f"{name:<28} {measured[name]:.3f}", highlight=False)
    console.print(out, markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
