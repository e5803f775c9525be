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

registry_app = typer.Typer(no_args_is_help=True, help="Published adapters of a store.")
app.add_typer(registry_app, name="registry")


@app.command()
def serve(
    manifest: Annotated[
        Path | None, typer.Argument(help="Take the store and the serve section from it.")
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
    arguments = [f"store={store_uri(store or '.farm/store')}"]
    if manifest is not None:
        settled = load_manifest(manifest, overrides or ())
        fields = {**settled.serve.model_dump(), **settled.resources.serve.model_dump()}
        given = (f"{name}={value}" for name, value in fields.items() if value is not None)
        arguments = [f"store={settled.store}", *given]
    command = [str(Path(sys.executable).with_name("serve")), "run", "serve.app:build", *arguments]
    if dry_run:
        command = [sys.executable, "-m", "serve.plan", *arguments]
    environment = {"RAY_AUTH_MODE": "disabled", **os.environ}
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


@registry_app.command("canary")
def registry_canary(
    target: str,
    version: str,
    share: Annotated[float | None, typer.Option(help="Of the requests, between 0 and 1.")] = None,
    end: Annotated[bool, typer.Option("--end", help="All requests go to the live version again.")] = False,
    store: StorePath = ".farm/store",
) -> None:
    """Try a published version on a share of a target's requests, or end that."""
    registry = Registry(open_store(store_uri(store)))
    if end == (share is not None):
        raise UserError("registry canary: give either --share, for instance 0.1, or --end")
    if share is None:
        ended = registry.end_canary(target, version)
        console.print(
            f"{target}: {version} is {'no canary any more' if ended else 'no canary'}", highlight=False
        )
        return
    if not registry.start_canary(target, version, share):
        tried = registry.canary(target)
        raise UserError(
            f"{target}: {tried.version} is tried already; end it first, or let it decide"
            if tried and tried.version != version
            else f"{target}: its pointer moved meanwhile; look again, then repeat"
        )
    console.print(f"{target}: {version} gets {share:g} of the requests", highlight=False)
