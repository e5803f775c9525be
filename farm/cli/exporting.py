"""Commands that carry drafts to other engines, and public drafts in here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from farm.cli.options import ZOO, Overrides, app, console, load_family
from farm.config import Manifest, UserError
from farm.export.engines import ServingEngine, StoredDtype

import_app = typer.Typer(no_args_is_help=True, help="Drafts of other projects.")
app.add_typer(import_app, name="import")

PARITY_FILE = "parity.json"


@app.command("export")
def export_draft(  # noqa: PLR0913 - the options of a command
    target: Annotated[str, typer.Argument(help="A target's name, or `base`.")],
    to: Annotated[ServingEngine, typer.Option("--to", help="The engine that will serve it.")],
    out: Annotated[Path, typer.Option(help="A new folder for the draft.")],
    manifest: Annotated[Path, typer.Option(help="The family's manifest; default: the demo's zoo.")] = ZOO,
    dtype: Annotated[
        StoredDtype | None, typer.Option(help="Of the weights; default: that of the target's checkpoint.")
    ] = None,
    pad: Annotated[int, typer.Option(help="The MLP's width is raised to a multiple of this.", min=1)] = 128,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run it in vLLM, compare, write parity.json; `make vllm-venv`.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Write a target's live draft as an EAGLE-1 folder that vLLM or SGLang serves unchanged."""
    from farm.evaluate.published import BASE, Published, spec_of
    from farm.export.folder import ExportTask, export

    family = load_family(manifest, overrides, "--manifest")
    spec = spec_of(family, target)
    published = Published.of(family.store)
    expert, card = published.base_expert, {"target": target, "trunk_key": published.trunk_key}
    if target != BASE:
        live = published.live_expert(target, spec.model)
        if live is None:
            raise UserError(f"{target}: has no live adapter in {family.store}; run `farm onboard` first")
        expert, card = live.file, live.card
    task = ExportTask(spec, to, published.trunk_folder, expert, card, family.evaluate.k, dtype, pad)
    if verify:
        from farm.bench.parity import as_verified

        task = as_verified(task)
    folder = export(task, out)
    console.print(folder, markup=False, soft_wrap=True)
    if verify:
        _verify(task, folder, published.base_expert, family)


@import_app.command("eagle")
def import_eagle(
    folder: Annotated[Path, typer.Argument(help="A public EAGLE-1 checkpoint.", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="A new folder for the trunk.")],
    private_width: Annotated[
        int | None, typer.Option(help="Of the private expert; default: the checkpoint's MLP.", min=1)
    ] = None,
) -> None:
    """Make a trunk out of a public EAGLE-1 draft; name it as `trunk` in a manifest."""
    from farm.export.public import trunk_of_eagle, write_trunk

    write_trunk(trunk_of_eagle(folder, private_width), out)
    console.print(f"trunk: {out}", markup=False, soft_wrap=True)


def _verify(task: Any, folder: Path, base_expert: Path, family: Manifest) -> None:
    """Writes parity.json into the folder; exit code 1 when the gate is shut."""
    from farm.bench.family import held_out
    from farm.bench.parity import DTYPE, Subject, verify
    from farm.target.load import load_target

    opened = load_target(task.target, dtype=DTYPE)
    settings = family.evaluate
    subject = Subject(
        opened, held_out(family, task.target, opened), settings.speed_prompts, settings.speed_rounds
    )
    parity = verify(task, folder, base_expert, subject, lambda line: console.print(line, highlight=False))
    path = folder / PARITY_FILE
    path.write_text(json.dumps(parity.to_dict(), indent=1) + "\n")
    for name, value in parity.to_dict().items():
        console.print(f"{name:<28} {value}", highlight=False, markup=False)
    console.print(path, markup=False, soft_wrap=True)
    for line in parity.warnings():
        console.print(f"warning: {line}", markup=False, soft_wrap=True)
    failures = parity.failures()
    for line in failures:
        console.print(f"not on par: {line}", markup=False, soft_wrap=True)
    raise typer.Exit(1 if failures else 0)
