"""Commands that measure what was onboarded."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from farm.cli.options import (
    ZOO,
    ManifestPath,
    MeasuredTarget,
    MeasuresPath,
    Overrides,
    PromptsSource,
    app,
    console,
    keep_measures,
    load_family,
)
from farm.config import UserError, dump, load_manifest

if TYPE_CHECKING:
    from farm.bench.decode import Row
    from farm.bench.mixed import Case

bench_app = typer.Typer(no_args_is_help=True, help="Benchmarks; results go to a folder.")
app.add_typer(bench_app, name="bench")

FamilyPath = Annotated[
    Path, typer.Argument(help="A family's manifest; default: the demo's zoo.", metavar="[MANIFEST]")
]
TABLE_WIDTH = 132  # of a benchmark's table where the terminal is narrower or says nothing


class OtherEngine(StrEnum):
    """What can be measured beside `transformers` and farm."""

    VLLM = "vllm"


@app.command()
def evaluate(
    manifest: ManifestPath,
    target: MeasuredTarget,
    prompts: PromptsSource,
    out: MeasuresPath,
    overrides: Overrides = None,
) -> None:
    """Measure the base draft and the live adapter of a target on any prompts."""
    from farm.evaluate.published import evaluate_published

    keep_measures(evaluate_published(load_manifest(manifest, overrides or ()), target, prompts), out)


@bench_app.command("decode")
def bench_decode(  # noqa: PLR0913 - the options of a command
    manifest: FamilyPath = ZOO,
    out: Annotated[Path, typer.Option(help="Folder of decode.json and decode.png.")] = Path("docs/bench"),
    target: Annotated[
        list[str] | None, typer.Option(help="A target's name, repeatable; default: every full one.")
    ] = None,
    engine: Annotated[
        list[OtherEngine] | None, typer.Option(help="Another engine beside; needs `make vllm-venv`.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Batch 1 and 8, the main arms only.")] = False,
    repeats: Annotated[int, typer.Option(help="Times that all arms run in turn.", min=3)] = 5,
    only: Annotated[
        str, typer.Option("--arms", help="Regular expression over batch/workload/engine/control/draft.")
    ] = "",
    tree: Annotated[
        list[str] | None,
        typer.Option(help="A tree beside, repeatable: tree-2x4, or with kind and nodes tree-sampled-3x4-10."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Speed of `generate`, plain decoding, both drafts and every control of the draft length, in one run."""
    from rich.progress import track

    from farm.bench.arms import chosen, full_arms, quick_arms, with_trees, with_vllm
    from farm.bench.decode import largest, measure
    from farm.bench.family import members
    from farm.bench.floor import measure_floor
    from farm.bench.report import beside_best_fixed, table, write
    from farm.bench.vllm_engine import check_loadable, find_python, vllm_engines

    source, settled = _source(), load_family(manifest, overrides)
    try:
        arms = with_trees(quick_arms() if quick else full_arms(), tree or ())
    except ValueError as error:
        raise UserError(f"--tree {error}") from None
    try:
        arms = chosen(arms, only)
    except ValueError as error:
        raise UserError(f"--arms {error}") from None
    specs = {spec.name: spec for spec in settled.targets}
    if engine:
        arms = with_vllm(arms)
        find_python()
        for name in target or [spec.name for spec in settled.targets if spec.lora is None]:
            if name in specs:
                check_loadable(specs[name])
    rows, floors = [], {}
    for member in members(settled, target or ()):
        floors[member.name] = measure_floor(member.target.forward)
        spec, config, prompt = specs[member.name], member.target.config, member.prompts[0]
        with vllm_engines(spec, config, largest(member, arms), prompt) if engine else nullcontext() as vllm:
            every = measure(member, family_name(manifest), arms, repeats, vllm)
            total = len(arms) * repeats
            rows += track(every, member.name, total, console=console, disable=not console.is_terminal)
    _show_wide(table(rows))
    for line in beside_best_fixed(rows):
        console.print(line, markup=False, highlight=False)
    for path in write(out, rows, floors, source):
        console.print(path, markup=False, soft_wrap=True)


@bench_app.command("operators")
def bench_operators(
    manifest: FamilyPath = ZOO,
    out: Annotated[Path, typer.Option(help="Folder of operators.json.")] = Path("docs/bench"),
    repeats: Annotated[int, typer.Option(help="Times that both sides run in turn.", min=3)] = 20,
    overrides: Overrides = None,
) -> None:
    """Products, norm, sampling and forward beside the library's, at the sizes of the family's base model."""
    from rich.progress import track

    from farm.bench.operators import model_pairs
    from farm.bench.pairs import measure, table, write

    source, pairs = _source(), model_pairs(load_family(manifest, overrides))
    shown = track(pairs, "measuring", console=console, disable=not console.is_terminal)
    rows = [measure(pair, family_name(manifest), repeats) for pair in shown]
    _show_wide(table(rows))
    console.print(write(out, rows, source), markup=False, soft_wrap=True)


@bench_app.command("mixed")
def bench_mixed(
    manifest: FamilyPath = ZOO,
    out: Annotated[Path, typer.Option(help="Folder of mixed.json.")] = Path("docs/bench"),
    repeats: Annotated[int, typer.Option(help="Times that all cases run in turn.", min=3)] = 5,
    overrides: Overrides = None,
) -> None:
    """Batches of several targets beside the same batches on each of them alone."""
    from rich.progress import track

    from farm.bench.mixed import CONTROLS, cases, measure, table, write

    source, every = _source(), cases(load_family(manifest, overrides))
    total = len(every) * len(CONTROLS) * repeats
    measured = measure(every, family_name(manifest), repeats)
    rows: dict[tuple[Case, str], list[Row]] = {}
    for case, row in track(measured, "measuring", total, console=console, disable=not console.is_terminal):
        rows.setdefault((case, row.control), []).append(row)
    _show_wide(table(rows))
    console.print(write(out, rows, source), markup=False, soft_wrap=True)


@bench_app.command("packed")
def bench_packed(
    manifest: FamilyPath = ZOO,
    out: Annotated[Path, typer.Option(help="Folder of packed.json.")] = Path("docs/bench"),
    targets: Annotated[
        int | None, typer.Option(help="Targets in the run; default: 16, with --quick 4.", min=2)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Four targets, one epoch each.")] = False,
    overrides: Overrides = None,
) -> None:
    """Many targets adapted in one training run beside the same targets in runs of their own: what each costs."""
    from farm.bench import packed
    from farm.fleet.pack_cost import in_turn, measure, onboarded_jobs
    from farm.fleet.session import connect

    source, settled = _source(), load_family(manifest, overrides)
    if quick:
        settled = packed.quick(settled)
    source |= {"adapt": dump(settled.adapt), "resources": dump(settled.resources.adapt)}
    count = targets or (packed.QUICK_TARGETS if quick else packed.TARGETS)

    jobs = in_turn(onboarded_jobs(settled, console.print), count)
    with connect():
        cost = measure(settled, jobs, console.print)
    _show_wide(packed.table(cost))
    for line in packed.lines(cost):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(packed.write(out, cost, family_name(manifest), source), markup=False, soft_wrap=True)


@bench_app.command("neighbours")
def bench_neighbours(
    manifest: FamilyPath = ZOO,
    out: Annotated[Path, typer.Option(help="Folder of neighbours.json.")] = Path("docs/bench"),
) -> None:
    """Decoding and a training step beside busy processes, with the threads' spinning as set here and unset."""
    from farm.bench import neighbours
    from farm.fleet.session import WORKER_VARIABLES

    source = _source()
    load_family(manifest, None)  # mistakes are told here and not by a child
    rows = list(neighbours.measure(manifest, os.cpu_count() or 1, WORKER_VARIABLES[neighbours.SPINS]))
    _show_wide(neighbours.table(rows))
    console.print(neighbours.write(out, rows, source), markup=False, soft_wrap=True)


@bench_app.command("serve")
def bench_serve(
    manifest: FamilyPath = ZOO,
    out: Annotated[Path, typer.Option(help="Folder of serve.json and serve.png.")] = Path("docs/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="30 s of the closed loop instead of 120.")] = False,
    clients: Annotated[int, typer.Option(help="Clients of the closed loop.", min=1)] = 64,
    url: Annotated[
        str | None, typer.Option(help="A running endpoint of this family; default: start one.")
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

    source, settled = _source(), load_family(manifest, overrides)
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
    _show_wide(table(record))
    for path in write(out, record, source):
        console.print(path, markup=False, soft_wrap=True)


@bench_app.command("adapt")
def bench_adapt(
    manifest: FamilyPath = ZOO,
    out: Annotated[Path, typer.Option(help="Folder of adapt.json and its plots.")] = Path("docs/bench"),
    target: Annotated[
        list[str] | None, typer.Option(help="A target's name, repeatable; default: every full one.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method, repeatable; default: all.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of every way.", min=1)] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="The main methods, the first target, one seed.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Tau, training time and size of every way to adapt a draft; a run that was stopped goes on where it was."""
    from farm.bench.adapt import identities, measure
    from farm.bench.adapt_data import data_keys, subjects
    from farm.bench.adapt_markdown import page
    from farm.bench.adapt_report import code_digest, compare, comparison_table, keep, kept, table, write
    from farm.bench.methods import QUICK, methods_of, variants, work

    source, settled, model = _source(), load_family(manifest, overrides), family_name(manifest)
    source |= {"code": code_digest(), "adapt": dump(settled.adapt), "evaluate": dump(settled.evaluate)}
    source |= data_keys(settled)
    every, default = variants(settled.adapt), settled.adapt
    unknown = [name for name in method or () if name not in methods_of(every)]
    if unknown:
        raise UserError(f"--method {unknown[0]}: is none of {', '.join(methods_of(every))}")
    names = target or [spec.name for spec in settled.targets if spec.lora is None]
    rows = kept(out, model, source)
    for number, subject in enumerate(subjects(settled, names[:1] if quick else names)):
        chosen = method or (QUICK if quick else ())
        todo = work(every, chosen, 1 if quick else seeds, first=number == 0)
        for new in measure(subject, model, default, todo, identities(rows)):
            rows += new
            keep(out, rows, source)
            last = new[-1]
            console.print(
                f"{last.target}, {last.variant}, seed {last.seed}: tau {last.tau:.2f}, {last.train_seconds:.1f} s",
                highlight=False,
            )
    _show_wide(table(rows))
    _show_wide(comparison_table(compare(rows)))
    paths = [*write(out, rows, source), out / "adapt.md"]
    paths[-1].write_text(page(rows, source["command"], source["git_sha"]))
    for path in paths:
        console.print(path, markup=False, soft_wrap=True)


def _show_wide(shown: Table) -> None:
    Console(width=max(console.width, TABLE_WIDTH)).print(shown)


def _source() -> dict[str, Any]:
    """Taken before a benchmark runs: the checkout may move on while it does."""
    from farm.bench.report import origin

    return origin(" ".join(["farm", *sys.argv[1:]]))


def family_name(manifest: Path) -> str:
    """What rows of a benchmark call the family: the manifest's name, or its folder's when it is a manifest.yaml."""
    path = manifest.resolve()
    return path.parent.name if path.stem == "manifest" else path.stem
