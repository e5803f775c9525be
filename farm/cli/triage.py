"""The command that says whether adapting pays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from farm.cli.options import ManifestPath, Overrides, app, console, probing_bar
from farm.config import load_manifest
from farm.evaluate.triage import SERVED_TOKENS, line, measured

if TYPE_CHECKING:
    from farm.evaluate.triage import Verdict


@app.command()
def probe(
    manifest: ManifestPath,
    prompts: Annotated[int, typer.Option(help="Prompts a target.", min=2)] = 32,
    tokens: Annotated[float, typer.Option(help="Served tokens that an adaptation has to pay within.")] = (
        SERVED_TOKENS
    ),
    overrides: Overrides = None,
) -> None:
    """What the base draft is worth on every target, whether adapting pays, and after how many served tokens."""
    from farm.fleet.triage import triage

    settled = load_manifest(manifest, overrides or ())
    with probing_bar() as progress:
        found = triage(settled, prompts=prompts, served_tokens=tokens, progress=progress)
    console.print(_table(found.verdicts))
    for verdict in found.verdicts:
        console.print(line(verdict), markup=False, highlight=False, soft_wrap=True)
    for name, reason in found.refused.items():
        console.print(f"{name}: refused: {reason}", style="red", markup=False, soft_wrap=True)
    source = f"{found.num_past} past adaptations of this store" if found.num_past else "guesses: no past runs"
    console.print(f"expected tau from {source}", highlight=False)


def _table(verdicts: tuple[Verdict, ...]) -> Table:
    table = Table(
        caption="s / s: seconds that each tier saves on a million served tokens, for each second of adapting"
    )
    table.add_column("target", overflow="fold")
    table.add_column("decision")
    for heading in ("tau", "alpha", "kept", "low-rank s / s", "expert s / s", "full s / s"):
        table.add_column(heading, justify="right")
    for verdict in verdicts:
        seen = verdict.seen
        table.add_row(
            Text(verdict.target),
            verdict.decision,
            measured(seen.tau, seen.tau_interval),
            measured(seen.alpha, seen.alpha_interval),
            f"{verdict.retention:.0%}",
            *(f"{offer.gain_per_cost:.2f}" for offer in verdict.offers),
        )
    return table
