"""The command that serves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from farm.cli.options import Overrides, app, store_uri
from farm.config import UserError, load_manifest


@app.command()
def serve(
    manifest: Annotated[
        Path | None, typer.Argument(help="Take the store and the serve section from it.")
    ] = None,
    store: Annotated[str | None, typer.Option(help="The store's folder or URI; default .farm/store.")] = None,
    overrides: Overrides = None,
) -> None:
    """Serve every onboarded target from one OpenAI-compatible endpoint, in the foreground."""
    if not (Path.cwd() / "serve" / "app.py").is_file():
        raise UserError(
            "serve/app.py is not in this folder; `farm serve` runs from the checkout, change into it"
        )
    arguments = [f"store={store_uri(store or '.farm/store')}"]
    if manifest is not None:
        settled = load_manifest(manifest, overrides or ())
        fields = {**settled.serve.model_dump(), **settled.resources.serve.model_dump()}
        arguments = [f"store={settled.store}", *(f"{name}={value}" for name, value in fields.items())]
    command = [str(Path(sys.executable).with_name("serve")), "run", "serve.app:build", *arguments]
    environment = {"RAY_AUTH_MODE": "disabled", **os.environ}
    raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)
