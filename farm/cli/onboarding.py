"""Commands that make models and onboard them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from farm.cli.options import (
    AsJson,
    DryRun,
    ManifestPath,
    Overrides,
    app,
    console,
    say,
    show_json,
    show_plan,
    show_trunk,
    training_bars,
)
from farm.config import Manifest, UserError, load_manifest
from farm.registry import Registry
from farm.store import open_store

if TYPE_CHECKING:
    from farm.evaluate.records import Report


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Where the zoo, the store and the reports go.", file_okay=False)
    ] = Path(".farm"),
    lora: Annotated[int, typer.Option(help="Number of LoRA targets.", min=0)] = 1,
) -> None:
    """Train a small family of models, onboard it and show what was gained."""
    start = time.perf_counter()
    manifest = _build_zoo(out / "zoo", lora)
    zoo_seconds = time.perf_counter() - start
    report, report_folder = _onboard(load_manifest(manifest))
    folder = out / "runs" / report.run_id
    folder.mkdir(parents=True, exist_ok=True)
    reports = open_store(report_folder)
    for name in reports.list(""):
        (folder / name).write_bytes(reports.get(name))
    total = time.perf_counter() - start
    say(f"zoo {zoo_seconds:.0f} s, everything {total:.0f} s")
    say(f"look at it:  {folder / 'report.html'}")
    say(f"serve it:    farm serve --store {out / 'store'}")
    _exit_by(report)


@app.command()
def zoo(
    out: Annotated[Path, typer.Option(help="Folder of the family.", file_okay=False)],
    lora: Annotated[int, typer.Option(help="Number of LoRA targets.", min=0)] = 1,
) -> None:
    """Write the embedded family of models, its prompts and a manifest."""
    say(str(_build_zoo(out, lora)))


@app.command()
def finetune(  # noqa: PLR0913 - each option of the command is a parameter
    base: Annotated[str, typer.Option(help="Checkpoint folder, .gguf file or package:NAME/FILE.")],
    data: Annotated[
        Path, typer.Option(help="Prompts with answers: JSONL, Parquet or a folder.", exists=True)
    ],
    out: Annotated[Path, typer.Option(help="A new folder for the target.")],
    rows: Annotated[str, typer.Option(help="Row range of the data, as START:STOP.")] = "0:1000",
    steps: Annotated[int, typer.Option(help="Optimizer steps of 8 conversations.", min=1)] = 80,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", min=0)] = 3e-4,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train a LoRA of this rank instead of every weight.", min=1)
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A jinja file, or the template's text; default: the tokenizer's own.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="Of the products; weights are float32. auto: bfloat16 on a GPU, else float32."),
    ] = "auto",
) -> None:
    """Make a target: fine-tune a checkpoint on prompts with answers."""
    from farm.data.prompts import load_prompts
    from farm.export.folder import new_folder
    from farm.manifest import model_path
    from farm.sections import TargetSpec
    from farm.target.finetune import FinetuneSettings
    from farm.target.finetune import finetune as run

    prompts = load_prompts(str(data), _row_range(rows)).prompts
    spec = TargetSpec(name="base", model=model_path(base), chat_template=chat_template)
    settings = FinetuneSettings(steps, lr, lora_rank=lora_rank, dtype=dtype)
    with new_folder(out) as (folder, final), training_bars() as progress:
        loss = run(spec, prompts, settings, folder, lambda s, n: progress(final.name, s, n))
    say(f"{out}: {steps} steps on {len(prompts)} rows, last loss {loss:.3f}")


def _row_range(text: str) -> tuple[int, int | None]:
    first, colon, last = text.partition(":")
    try:
        if colon:  # a single number could be either end
            return int(first or 0), int(last) if last else None
    except ValueError:
        pass
    raise UserError(f"--rows {text}: is no range; write START:STOP, for instance 0:1000")


@app.command("train-trunk")
def train_trunk(manifest: ManifestPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train the family's trunk alone; an onboarding finds it in the store."""
    from farm.fleet.onboard import plan_trunk_training
    from farm.fleet.onboard import train_trunk as run
    from farm.fleet.session import connect

    settled = load_manifest(manifest, overrides or ())
    if dry_run:
        show_plan(*plan_trunk_training(settled))
        return
    with connect():
        folder, tau = run(settled, say)
    show_trunk(folder, tau)


@app.command()
def onboard(manifest: ManifestPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Regenerate, adapt, evaluate and publish every target that is not done yet.

    The exit code is 1 when a target was refused or failed.
    """
    settled = load_manifest(manifest, overrides or ())
    if dry_run:
        from farm.fleet.onboard import plan_onboarding

        show_plan(*plan_onboarding(settled))
        return
    report, folder = _onboard(settled)
    say(f"report: {folder}/report.json")
    _exit_by(report)


@app.command()
def status(
    manifest: ManifestPath,
    overrides: Overrides = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow until every target has ended.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stage, rows, seconds, error and live version of each target, read from the store."""
    from farm.status import latest_run, read_status, status_table
    from farm.status import watch as follow

    if watch and as_json:
        raise UserError("--json: is one look, --watch are many; leave one of them out")
    store = open_store(load_manifest(manifest, overrides or ()).store)
    run_id = latest_run(store)
    if run_id is None:
        raise UserError(f"{store.uri}: nothing was onboarded into this store yet; run `farm onboard`")
    records = read_status(store, run_id)
    registry = Registry(store)

    def live() -> dict[str, str]:
        versions = ((record.target, registry.live(record.target)) for record in records)
        return {name: version.version for name, version in versions if version is not None}

    if as_json:
        show_json({"targets": records, "live": live()})
    elif watch:
        follow(store, run_id, live, console=console)
    else:
        console.print(status_table(records, live(), time.time()))


def _onboard(manifest: Manifest) -> tuple[Report, str]:
    """Runs the onboarding, prints its table and returns the report and the URI of its folder."""
    from farm.evaluate.report import terminal_table
    from farm.fleet.onboard import new_run_id
    from farm.fleet.onboard import onboard as run
    from farm.fleet.session import connect
    from farm.status import progress_bars

    run_id = new_run_id()
    with connect(), progress_bars(open_store(manifest.store), run_id, console):
        report, folder = run(manifest, say, run_id=run_id)
    console.print(terminal_table(report))
    return report, folder


def _exit_by(report: Report) -> None:
    from farm.fleet.onboard import exit_code

    raise typer.Exit(exit_code(report))


def _build_zoo(out: Path, num_lora: int) -> Path:
    from farm.target.zoo import build_zoo

    with training_bars() as progress:
        return build_zoo(out.resolve(), num_lora, progress)
