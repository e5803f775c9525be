"""Commands that serve, and that say which adapter is live."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from farm.cli.options import Overrides, StorePath, app, console, store_uri
from farm.config import UserError, load_manifest
from farm.keys import add_key
from farm.registry import Registry
from farm.store import open_store

registry_app = typer.Typer(no_args_is_help=True, help="Published adapters of a store.")
app.add_typer(registry_app, name="registry")
key_app = typer.Typer(no_args_is_help=True, help="Keys of the endpoint.")
app.add_typer(key_app, name="key")


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
        arguments = [f"store={settled.store}", *_arguments(fields)]
    command = [sys.executable, "-m", "serve.foreground", *arguments]
    os.execve(
        sys.executable, command, {"RAY_AUTH_MODE": "disabled", **os.environ}
    )  # signals reach the server itself


def _arguments(fields: Mapping[str, object]) -> Iterator[str]:
    """Settings as `name=value`, lists with commas; what is not set is left out."""
    for name, value in fields.items():
        if value is not None and value != ():
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
