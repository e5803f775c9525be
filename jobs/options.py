"""What the jobs share: their arguments, and how a mistake of the user ends them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from farm.config import UserError

ManifestPath = Annotated[Path, typer.Argument(help="The family's manifest.yaml.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="a.b=value, or name=value for ${name}.")]


@contextmanager
def mistakes_exit() -> Iterator[None]:
    """A UserError is one line on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
