"""The command that serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from farm.cli.options import Overrides, app, store_uri
from farm.config import UserError, load_manifest
from farm.keys import add_key

# What Serve reads when it starts. Its threads share an interpreter with the engine's: one loop takes less from it than
# three. And pieces of answers go from the gateway to the proxy over gRPC, not through Ray's object store.
LEAN_SERVE = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
}

key_app = typer.Typer(no_args_is_help=True, help="Keys of the endpoint.")
app.add_typer(key_app, name="key")


@app.command()
def serve(
    manifest: Annotated[
        Path | None,
        typer.Argument(
            help="The family's manifest.yaml: its store, serve and resources.serve are used.",
            metavar="MANIFEST",
        ),
    ] = None,
    store: Annotated[str | None, typer.Option(help="The store's folder or URI; default .farm/store.")] = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show where targets go; start nothing.")] = False,
) -> None:
    """Serve every onboarded target from one OpenAI-compatible endpoint, in the foreground."""
    if not (Path.cwd() / "serve" / "app.py").is_file():
        raise UserError(
            "serve/app.py is not in this folder; `farm serve` runs from the checkout, change into it"
        )
    if manifest is None and overrides:
        raise UserError(f"--set {overrides[0]}: sets a field of a manifest; name one")
    if manifest is not None and store is not None:
        raise UserError(f"--store {store}: the manifest names the store; leave one of them out")
    arguments = [f"store={store_uri(store or '.farm/store')}"]
    if manifest is not None:
        settled = load_manifest(manifest, overrides or ())
        fields = {**settled.serve.model_dump(), **settled.resources.serve.model_dump()}
        arguments = [f"store={settled.store}", *_arguments(fields)]
    if dry_run:
        command = [sys.executable, "-m", "serve.plan", *arguments]
        raise typer.Exit(subprocess.run(command, check=False).returncode)
    command = [sys.executable, "-m", "serve.foreground", *arguments]
    # The process becomes the server: signals reach it.
    os.execve(sys.executable, command, {"RAY_AUTH_MODE": "disabled", **LEAN_SERVE, **os.environ})


def _arguments(fields: Mapping[str, object]) -> Iterator[str]:
    """Settings as `name=value`, lists with commas, sections as JSON; what is not set is left out."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield f"{name}={json.dumps(value)}"
        elif value is not None and value != ():
            yield f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"


@key_app.command("new")
def key_new(
    name: Annotated[str, typer.Argument(help="Whom the key is for.")],
    keys: Annotated[Path, typer.Option(help="File of keys, `serve.keys` of the manifest.")],
    targets: Annotated[str, typer.Option(help="Targets it may use, with commas; default: all.")] = "",
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Longest prompt.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Requests at the same time.")] = None,
) -> None:
    """Print a new key once; its hash is appended to the file, and a running endpoint knows it within seconds."""
    limits = {
        "max_prompt_tokens": max_prompt_tokens,
        "max_new_tokens": max_new_tokens,
        "max_concurrent": max_concurrent,
    }
    allowed = [target.strip() for target in targets.split(",") if target.strip()]
    typer.echo(add_key(keys, name, allowed, **limits))
