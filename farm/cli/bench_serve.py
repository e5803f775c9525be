"""The benchmark of an endpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from farm.cli.bench import OUT, FamilyPath, bench_app, folder_of, run_source, show_lines, show_wide
from farm.cli.options import ZOO, Overrides, console, load_family
from farm.config import UserError


@bench_app.command("serve")
def bench_serve(
    manifest: FamilyPath = ZOO,
    out: Annotated[Path, folder_of("serve.json and serve.png")] = OUT,
    quick: Annotated[bool, typer.Option("--quick", help="30 s of the closed loop instead of 120.")] = False,
    clients: Annotated[int, typer.Option(help="Clients of the closed loop.", min=1)] = 64,
    url: Annotated[
        str | None,
        typer.Option(help="A running endpoint of this family, its key in FARM_API_KEY; default: start one."),
    ] = None,
    chaos: Annotated[
        bool,
        typer.Option("--chaos", help="Also: versions rolled out and back, the store away, a replica killed."),
    ] = False,
    overrides: Overrides = None,
) -> None:
    """An endpoint under a closed and an open loop of streams, beside the same engine without it."""
    from dataclasses import replace

    from farm.bench.serve import Endpoint, Load, bench_child, bench_url, chaos_child
    from farm.bench.serve_report import table, write

    source, settled = run_source(), load_family(manifest, overrides)
    load = replace(Load.quick() if quick else Load(), clients=clients)

    def say(what: str) -> None:
        console.print(what, highlight=False)

    if url is None:
        out.mkdir(parents=True, exist_ok=True)
        arguments = [str(manifest), *(word for one in overrides or () for word in ("--set", one))]
        record = bench_child(settled, arguments, load, out / "serve.log", say)
        if chaos:
            record["chaos"] = chaos_child(settled, arguments, load, out / "chaos.log", say)
    elif chaos:
        raise UserError("--chaos kills a replica: it starts the endpoint itself, without --url")
    else:
        record = bench_url(settled, Endpoint(url, os.environ.get("FARM_API_KEY")), load, say)
    show_wide(table(record))
    show_lines(write(out, record, source))
