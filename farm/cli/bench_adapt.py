"""Benchmarks of adapting: the ways to do it, and many targets in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farm.cli.bench import (
    OUT,
    FamilyPath,
    bench_app,
    family_name,
    folder_of,
    run_source,
    show_lines,
    show_wide,
)
from farm.cli.options import ZOO, Overrides, console, load_family, say
from farm.config import UserError, dump

SEEDS = 3  # of `bench adapt`


@bench_app.command("adapt")
def bench_adapt(
    manifest: FamilyPath = ZOO,
    out: Annotated[Path, folder_of("adapt.json and its plots")] = OUT,
    target: Annotated[
        list[str] | None, typer.Option(help="A target's name, repeatable; default: every full one.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method, repeatable; default: all.")] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Seeds of every way; default: 3, with --quick 1.", min=1)
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed, the main methods, the first target, unless given.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Tau, training time and size of every way to adapt a draft; a run that was stopped goes on where it was."""
    from farm.bench.adapt import identities, measure
    from farm.bench.adapt_data import data_keys, subjects
    from farm.bench.adapt_markdown import page
    from farm.bench.adapt_report import code_digest, compare, comparison_table, keep, kept, table, write
    from farm.bench.methods import QUICK, methods_of, variants, work

    source, settled, model = run_source(), load_family(manifest, overrides), family_name(manifest)
    source |= {"code": code_digest(), "adapt": dump(settled.adapt), "evaluate": dump(settled.evaluate)}
    source |= data_keys(settled)
    every, default = variants(settled.adapt), settled.adapt
    unknown = [name for name in method or () if name not in methods_of(every)]
    if unknown:
        raise UserError(f"--method {unknown[0]}: is none of {', '.join(methods_of(every))}")
    full = [spec.name for spec in settled.targets if spec.lora is None]
    names, num_seeds = extent(full, target, seeds, quick=quick)
    rows, chosen = kept(out, model, source), method or (QUICK if quick else ())
    dataset = any(one.data == "dataset" for one in every if not chosen or one.method in chosen)
    for number, subject in enumerate(subjects(settled, names, dataset=dataset)):
        todo = work(every, chosen, num_seeds, first=number == 0)
        for new in measure(subject, model, default, todo, identities(rows)):
            rows += new
            keep(out, rows, source)
            last = new[-1]
            console.print(
                f"{last.target}, {last.variant}, seed {last.seed}: tau {last.tau:.2f}, {last.train_seconds:.1f} s",
                highlight=False,
            )
    show_wide(table(rows))
    show_wide(comparison_table(compare(rows)))
    paths = [*write(out, rows, source), out / "adapt.md"]
    paths[-1].write_text(page(rows, source["command"], source["git_sha"]))
    show_lines(paths)


def extent(
    full: list[str], target: list[str] | None, seeds: int | None, *, quick: bool
) -> tuple[list[str], int]:
    """Targets and the number of seeds: what is given counts, with `quick` too."""
    return target or (full[:1] if quick else full), seeds or (1 if quick else SEEDS)


@bench_app.command("packed")
def bench_packed(
    manifest: FamilyPath = ZOO,
    out: Annotated[Path, folder_of("packed.json")] = OUT,
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

    source, settled = run_source(), load_family(manifest, overrides)
    if quick:
        settled = packed.quick(settled)
    source |= {"adapt": dump(settled.adapt), "resources": dump(settled.resources.adapt)}
    count = targets or (packed.QUICK_TARGETS if quick else packed.TARGETS)

    jobs = in_turn(onboarded_jobs(settled, say), count)
    with connect():
        cost = measure(settled, jobs, say)
    show_wide(packed.table(cost))
    show_lines([*packed.lines(cost), packed.write(out, cost, family_name(manifest), source)])
