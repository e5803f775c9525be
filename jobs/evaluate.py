"""Measure a target's live adapter: `python -m jobs.evaluate manifest.yaml --target NAME --prompts F --out F.json`.

Exit code 0, or 2 for a mistake in the arguments. The last line names the file with the measures.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from farm.config import UserError, load_manifest
from farm.fleet.measure import evaluate_on_cluster
from farm.fleet.session import connect

SHOWN = ("tau_base_draft", "tau_adapted", "tokens_per_s_autoregressive", "speedup_adapted")

app = typer.Typer(add_completion=False)


@app.command()
def main(
    manifest: Annotated[Path, typer.Argument(help="The family's manifest.yaml.")],
    target: Annotated[str, typer.Option(help="A target's name, or `base`.")],
    prompts: Annotated[str, typer.Option(help="JSONL, Parquet or a folder of prompts.")],
    out: Annotated[Path, typer.Option(help="JSON file for the measures.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="a.b=value, or name=value for ${name}.")
    ] = None,
) -> None:
    """Compare the base draft with the live adapter of a target on any prompts."""
    console = Console()
    try:
        settled = load_manifest(manifest, overrides or ())
        with connect():
            measured = evaluate_on_cluster(settled, target, prompts)
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(measured, indent=1) + "\n")
    for name in SHOWN:
        if measured.get(name) is not None:
            console.print(f"{name:<28} {measured[name]:.3f}", highlight=False)
    console.print(out, markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
