"""`farm bench`: what its commands share, and those that decode or compute."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from farm.cli.options import ZOO, Overrides, app, console, load_family, say
from farm.config import UserError

if TYPE_CHECKING:
    from farm.bench.decode import Row
    from farm.bench.mixed import Case

bench_app = typer.Typer(no_args_is_help=True, help="Benchmarks; results go to a folder.")
app.add_typer(bench_app, name="bench")

FamilyPath = Annotated[
    Path, typer.Argument(help="A family's manifest; default: the demo's zoo.", metavar="MANIFEST")
]
OUT = Path("docs/bench")
Item = TypeVar("Item")
TABLE_WIDTH = 132  # of a benchmark's table where the terminal is narrower or says nothing


def folder_of(files: str) -> Any:
    """The option --out of a benchmark that writes these files: refused before it measures where it is one itself."""
    return typer.Option(help=f"Folder of {files}.", file_okay=False)


class OtherEngine(StrEnum):
    """What can be measured beside `transformers` and farm."""

    VLLM = "vllm"


def show_wide(shown: Table) -> None:
    """A benchmark's table, unfolded where there is no terminal."""
    Console(width=max(console.width, TABLE_WIDTH)).print(shown)


def show_lines(lines: Iterable[object]) -> None:
    """A line each of what a benchmark found, or of the files that it wrote."""
    for line in lines:
        say(str(line))


def with_progress(rows: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """The rows as they are measured, with a bar on a terminal."""
    from rich.progress import track

    return track(rows, what, total, console=console, disable=not console.is_terminal)


def run_source() -> dict[str, Any]:
    """Taken before a benchmark runs: the checkout may move on while it does."""
    from farm.bench.report import origin

    return origin(" ".join(["farm", *sys.argv[1:]]))


def family_name(manifest: Path) -> str:
    """What rows of a benchmark call the family: the manifest's name, or its folder's when it is a manifest.yaml."""
    path = manifest.resolve()
    return path.parent.name if path.stem == "manifest" else path.stem


@bench_app.command("decode")
def bench_decode(  # noqa: PLR0913 - the options of a command
    manifest: FamilyPath = ZOO,
    out: Annotated[Path, folder_of("decode.json and decode.png")] = OUT,
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
    from farm.bench.arms import chosen, full_arms, quick_arms, with_trees, with_vllm
    from farm.bench.decode import largest, measure
    from farm.bench.family import members
    from farm.bench.floor import measure_floor
    from farm.bench.report import beside_best_fixed, table, write
    from farm.bench.vllm_engine import check_loadable, find_python, vllm_engines

    source, settled = run_source(), load_family(manifest, overrides)
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
            rows += with_progress(every, member.name, len(arms) * repeats)
    show_wide(table(rows))
    show_lines([*beside_best_fixed(rows), *write(out, rows, floors, source)])


@bench_app.command("operators")
def bench_operators(
    manifest: FamilyPath = ZOO,
    out: Annotated[Path, folder_of("operators.json")] = OUT,
    repeats: Annotated[int, typer.Option(help="Times that both sides run in turn.", min=3)] = 20,
    overrides: Overrides = None,
) -> None:
    """Products, norm, sampling and forward beside the library's, at the sizes of the family's base model."""
    from farm.bench.operators import model_pairs
    from farm.bench.pairs import measure, table, write

    source, pairs = run_source(), model_pairs(load_family(manifest, overrides))
    rows = [measure(pair, family_name(manifest), repeats) for pair in with_progress(pairs, "measuring")]
    show_wide(table(rows))
    show_lines([write(out, rows, source)])


@bench_app.command("mixed")
def bench_mixed(
    manifest: FamilyPath = ZOO,
    out: Annotated[Path, folder_of("mixed.json")] = OUT,
    repeats: Annotated[int, typer.Option(help="Times that all cases run in turn.", min=3)] = 5,
    overrides: Overrides = None,
) -> None:
    """Batches of several targets beside the same batches on each of them alone."""
    from farm.bench.mixed import CONTROLS, cases, measure, table, write

    source, every = run_source(), cases(load_family(manifest, overrides))
    total = len(every) * len(CONTROLS) * repeats
    measured = measure(every, family_name(manifest), repeats)
    rows: dict[tuple[Case, str], list[Row]] = {}
    for case, row in with_progress(measured, "measuring", total):
        rows.setdefault((case, row.control), []).append(row)
    show_wide(table(rows))
    show_lines([write(out, rows, source)])


@bench_app.command("neighbours")
def bench_neighbours(
    manifest: FamilyPath = ZOO,
    out: Annotated[Path, folder_of("neighbours.json")] = OUT,
) -> None:
    """Decoding and a training step beside busy processes, with the threads' spinning as set here and unset."""
    from farm.bench import neighbours
    from farm.fleet.session import WORKER_VARIABLES

    source = run_source()
    load_family(manifest, None)  # mistakes are told here and not by a child
    rows = list(neighbours.measure(manifest, os.cpu_count() or 1, WORKER_VARIABLES[neighbours.SPINS]))
    show_wide(neighbours.table(rows))
    show_lines([neighbours.write(out, rows, source)])
