"""The command line: `farm COMMAND`. Each command parses, calls the library and prints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from farm.config import Manifest, UserError, load_manifest
from farm.registry import Registry
from farm.store import open_store

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
registry_app = typer.Typer(no_args_is_help=True, help="Published adapters of a store.")
app.add_typer(registry_app, name="registry")
console = Console()

ManifestPath = Annotated[Path, typer.Argument(help="The family's manifest.yaml.", metavar="MANIFEST")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="a.b=value, or name=value for ${name}.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and its cost; run nothing.")]
StorePath = Annotated[str, typer.Option("--store", help="The store's folder or URI.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the zoo, the store and the reports go.")] = Path(".farm"),
    lora: Annotated[int, typer.Option(help="Number of LoRA targets.", min=0)] = 1,
) -> None:
    """Train a small family of models, onboard it and show what was gained."""
    start = time.perf_counter()
    manifest = _build_zoo(out / "zoo", lora)
    zoo_seconds = time.perf_counter() - start
    report_folder = _onboard(load_manifest(manifest))
    folder = out / "runs" / Path(report_folder).name
    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(report_folder.removeprefix("file://")).iterdir():
        shutil.copy(file, folder / file.name)
    total = time.perf_counter() - start
    console.print(f"zoo {zoo_seconds:.0f} s, everything {total:.0f} s", highlight=False)
    console.print(f"look at it:  {folder / 'report.html'}", markup=False, soft_wrap=True)
    console.print(f"serve it:    farm serve --store {out / 'store'}", markup=False, soft_wrap=True)
    _exit_by(folder / "report.json")


@app.command()
def zoo(
    out: Annotated[Path, typer.Option(help="Folder of the family.")],
    lora: Annotated[int, typer.Option(help="Number of LoRA targets.", min=0)] = 1,
) -> None:
    """Write the embedded family of models, its prompts and a manifest."""
    console.print(_build_zoo(out, lora), markup=False, soft_wrap=True)


@app.command()
def finetune(  # noqa: PLR0913 - each option of the command is a parameter
    base: Annotated[str, typer.Option(help="Checkpoint folder, .gguf file or package:NAME/FILE.")],
    data: Annotated[Path, typer.Option(help="Prompts with answers: JSONL, Parquet or a folder.")],
    out: Annotated[Path, typer.Option(help="Folder of the new target.")],
    rows: Annotated[str, typer.Option(help="Row range of the data, as START:STOP.")] = "0:1000",
    steps: Annotated[int, typer.Option(help="Optimizer steps of 8 conversations.", min=1)] = 80,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train a LoRA of this rank instead of every weight.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of the products; weights are float32.")
    ] = "float32",
) -> None:
    """Make a target: fine-tune a checkpoint on prompts with answers."""
    from farm.config import TargetSpec
    from farm.data.prompts import load_prompts
    from farm.manifest import model_path
    from farm.target.finetune import FinetuneSettings
    from farm.target.finetune import finetune as run

    first, _, last = rows.partition(":")
    try:
        chosen = (int(first or 0), int(last) if last else None)
    except ValueError:
        raise UserError(f"--rows {rows}: is no range; write START:STOP, for instance 0:1000") from None
    prompts = load_prompts(str(data), chosen).prompts
    spec = TargetSpec(name=out.name, model=model_path(base), prompts=str(data))
    with _progress() as progress:
        loss = run(
            spec,
            prompts,
            FinetuneSettings(steps, lr, lora_rank=lora_rank, dtype=dtype),
            out,
            lambda s, n: progress(out.name, s, n),
        )
    console.print(f"{out}: {steps} steps on {len(prompts)} rows, last loss {loss:.3f}", soft_wrap=True)


@app.command("train-trunk")
def train_trunk(manifest: ManifestPath, overrides: Overrides = None) -> None:
    """Train the family's trunk alone; an onboarding finds it in the store."""
    from farm.fleet.onboard import train_trunk as run
    from farm.fleet.session import connect

    with connect():
        folder, tau = run(load_manifest(manifest, overrides or ()), console.print)
    if tau is not None:
        console.print(f"tau of the base draft on the base: {tau:.2f}", highlight=False)
    console.print(f"trunk: {folder}", markup=False, soft_wrap=True)


@app.command()
def onboard(manifest: ManifestPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Regenerate, adapt, evaluate and publish every target that is not done yet."""
    settled = load_manifest(manifest, overrides or ())
    if dry_run:
        from farm.fleet.onboard import plan_onboarding

        console.print(plan_onboarding(settled))
        return
    folder = _onboard(settled)
    console.print(f"report: {folder}/report.json", markup=False, soft_wrap=True)
    _exit_by(Path(folder.removeprefix("file://")) / "report.json")


@app.command()
def status(
    manifest: ManifestPath,
    overrides: Overrides = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow until every target has ended.")] = False,
) -> None:
    """Stage, rows, seconds, error and live version of each target, read from the store."""
    from farm.status import latest_run, read_status, status_table
    from farm.status import watch as follow

    store = open_store(load_manifest(manifest, overrides or ()).store)
    run_id = latest_run(store)
    if run_id is None:
        raise UserError(f"{store.uri}: nothing was onboarded into this store yet; run `farm onboard`")
    records = read_status(store, run_id)
    registry = Registry(store)

    def live() -> dict[str, str]:
        versions = ((record.target, registry.live(record.target)) for record in records)
        return {name: version.version for name, version in versions if version is not None}

    if watch:
        follow(store, run_id, live, console=console)
    else:
        console.print(status_table(records, live(), time.time()))


@app.command()
def evaluate(
    manifest: ManifestPath,
    target: Annotated[str, typer.Option(help="A target's name, or `base`.")],
    prompts: Annotated[Path, typer.Option(help="JSONL, Parquet or a folder of prompts.")],
    out: Annotated[Path, typer.Option(help="JSON file for the measures.")],
    overrides: Overrides = None,
) -> None:
    """Measure the base draft and the live adapter of a target on any prompts."""
    from farm.evaluate.published import evaluate_published

    measured = evaluate_published(load_manifest(manifest, overrides or ()), target, str(prompts))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(measured, indent=1) + "\n")
    for name in ("tau_base_draft", "tau_adapted", "tokens_per_s_autoregressive", "speedup_adapted"):
        if measured.get(name) is not None:
            console.print(f"{name:<28} {measured[name]:.3f}", highlight=False)
    console.print(out, markup=False, soft_wrap=True)


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
    arguments = [f"store={_store_uri(store or '.farm/store')}"]
    if manifest is not None:
        settled = load_manifest(manifest, overrides or ())
        fields = {**settled.serve.model_dump(), **settled.resources.serve.model_dump()}
        arguments = [f"store={settled.store}", *(f"{name}={value}" for name, value in fields.items())]
    command = [str(Path(sys.executable).with_name("serve")), "run", "serve.app:build", *arguments]
    environment = {"RAY_AUTH_MODE": "disabled", **os.environ}
    raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)


@registry_app.command("list")
def registry_list(store: StorePath = ".farm/store") -> None:
    """Every target's versions, the live one marked."""
    registry = Registry(open_store(_store_uri(store)))
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
    registry = Registry(open_store(_store_uri(store)))
    live = registry.live(target)
    if not registry.promote(target, version, live.version if live else None):
        raise UserError(f"{target}: the live version moved meanwhile; look again, then repeat")
    console.print(f"{target}: {version} is live", highlight=False)


@registry_app.command("rollback")
def registry_rollback(target: str, store: StorePath = ".farm/store") -> None:
    """Make the version live that was live before."""
    version = Registry(open_store(_store_uri(store))).rollback(target)
    console.print(f"{target}: {version.version} is live again", highlight=False)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2."""
    _quiet_libraries()
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)


def _quiet_libraries() -> None:
    """Their bars and notices would bury the farm's own lines; an error still shows."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not any(Path("/dev").glob("nvidia*")):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says on every import that it looked


def _onboard(manifest: Manifest) -> str:
    """Runs the onboarding, prints its table and returns the URI of the report's folder."""
    from farm.evaluate.report import terminal_table
    from farm.fleet.onboard import onboard as run
    from farm.fleet.session import connect

    with connect():
        report, folder = run(manifest, console.print)
    console.print(terminal_table(report))
    return folder


def _exit_by(report: Path) -> None:
    from farm.evaluate.report import read_report
    from farm.fleet.onboard import exit_code

    raise typer.Exit(exit_code(read_report(report)))


def _build_zoo(out: Path, num_lora: int) -> Path:
    from farm.target.zoo import build_zoo

    with _progress() as progress:
        return build_zoo(out.resolve(), num_lora, progress)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each model on a terminal; elsewhere a line at each model's start and at each quarter."""
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, object] = {}

        def show(what: str, step: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(f"training {what}", total=of)
            bars.update(tasks[what], completed=step)  # type: ignore[arg-type]
            if not console.is_terminal and (step == 1 or step % max(1, of // 4) == 0):
                console.print(f"training {what}: step {step} of {of}", highlight=False)

        yield show


def _store_uri(value: str) -> str:
    return value if "://" in value else Path(value).expanduser().resolve().as_uri()


if __name__ == "__main__":
    main()
