"""Commands that serve, and that say which adapter is live."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from farm.cli.options import Overrides, StorePath, app, console, store_uri
from farm.config import UserError, load_manifest
from farm.registry import Registry
from farm.store import open_store

# What Serve reads when it starts. Its threads share an interpreter with the engine's: one loop takes less from it than
# three. And pieces of answers go from the gateway to the proxy over gRPC, not through Ray's object store.
LEAN_SERVE = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
}
registry_app = typer.Typer(no_args_is_help=True, help="Published adapters of a store.")
app.add_typer(registry_app, name="registry")


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
    environment = {"RAY_AUTH_MODE": "disabled", **LEAN_SERVE, **os.environ}
    raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)


@registry_app.command("list")
def registry_list(store: StorePath = ".farm/store") -> None:
    """Every target's versions, the live one marked."""
    registry = Registry(open_store(store_uri(store)))
    for name in sorted(registry.family()["targets"]):
        live = registry.live(name)
        versions = [
            f"[bold]{v.version} (live)[/bold]" if live and v.version == live.version else v.version
            for v in registry.versions(name)
        ]
        console.print(f"{name:<24} {', '.join(versions) or 'base draft'}", highlight=False)


@registry_app.command("promote")
def registry_promote(target: str, version: str, store: StorePath = ".farm/store") -> None:
    """Make a published version live."""
    registry = Registry(open_store(store_uri(store)))
    live = registry.live(target)
    if not registry.promote(target, version, live.version if live else None):
        raise UserError(f"{target}: the live version moved meanwhile; look again, then repeat")
    console.print(f"{target}: {version} is live", highlight=False)


@registry_app.command("rollback")
def registry_rollback(target: str, store: StorePath = ".farm/store") -> None:
    """Make the version live that was live before."""
    version = Registry(open_store(store_uri(store))).rollback(target)
    console.print(f"{target}: {version.version} is live again", highlight=False)
