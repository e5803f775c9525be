"""The command that says whether adapting pays: from a manifest, or from the counters of a server that runs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from farm.cli.options import AsJson, Overrides, app, console, notes, probing_bar, say, show_json
from farm.config import Manifest, UserError, load_manifest
from farm.evaluate.triage import SERVED_TOKENS, Cost, decide, line, measured, offers

if TYPE_CHECKING:
    from farm.evaluate.counters import Counters
    from farm.evaluate.triage import Past, Verdict

# Where nothing better is known: the hours published for EDA on a 7B model, and a draft that fits its model.
ADAPT_SECONDS, FITTING_ALPHA = 7200.0, 0.75
# Options that only count with --metrics, and only without.
OF_COUNTERS = ("seconds", "tau_base", "adapt_seconds", "token_seconds", "draft_cost", "verify_cost", "batch")
OF_MODELS = ("prompts",)


@dataclass(frozen=True)
class Judged:
    """A model that a server runs: what it counts, the draft length of most tokens a second, whether adapting pays."""

    counters: Counters
    best_k: int
    best_speedup: float  # over plain decoding
    verdict: Verdict


@app.command()
def probe(  # noqa: PLR0913 - the options of a command
    context: typer.Context,
    manifest: Annotated[
        Path | None, typer.Argument(help="The family's manifest.yaml.", metavar="MANIFEST")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="URL of a running endpoint, vLLM or SGLang: read its counters, run no model."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="With --metrics: count for so long; 0: since the server's start.", min=0)
    ] = 0.0,
    prompts: Annotated[int, typer.Option(help="Held-out prompts a target; not with --metrics.", min=2)] = 32,
    tokens: Annotated[
        float, typer.Option(help="Served tokens that an adaptation has to pay within.", min=0)
    ] = SERVED_TOKENS,
    tau_base: Annotated[
        float | None,
        typer.Option(help="With --metrics: tau of the draft on the model it was made for.", min=1),
    ] = None,
    adapt_seconds: Annotated[
        float | None, typer.Option(help="With --metrics: seconds of adapting, answers included.", min=0)
    ] = None,
    token_seconds: Annotated[
        float | None,
        typer.Option(help="With --metrics: seconds of an output token, if it is not exposed.", min=1e-6),
    ] = None,
    draft_cost: Annotated[
        float, typer.Option(help="With --metrics: a draft step, as a share of a step of the model.", min=0)
    ] = 0.1,
    verify_cost: Annotated[
        float, typer.Option(help="With --metrics: verifying one token more, as a share of a step.", min=0)
    ] = 0.02,
    batch: Annotated[int, typer.Option(help="With --metrics: requests that decode at once.", min=1)] = 1,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """What the base draft is worth on every target, whether adapting pays, and after how many served tokens."""
    if metrics is None:
        _refuse_given(context, OF_COUNTERS, "counts only with --metrics; name a server's, or leave it out")
    else:
        _refuse_given(context, OF_MODELS, "is not used with --metrics, which runs no model; leave it out")
    if manifest is None and overrides:
        raise UserError(f"--set {overrides[0]}: sets a field of a manifest; name one")
    settled = None if manifest is None else load_manifest(manifest, overrides or ())
    if metrics is None:
        if settled is None:
            raise UserError("give a manifest, or --metrics URL of a server that runs")
        _probe_family(settled, prompts, tokens, as_json)
        return
    from farm.evaluate.counters import StepCosts, best_length, read_counters

    costs, history = StepCosts(draft_cost, verify_cost), _history(settled)
    judged: list[Judged] = []
    for counters in read_counters(metrics, seconds):
        base, cost_s, guesses = _assumed(counters, history, tau_base, adapt_seconds)
        seen = counters.seen(costs, token_seconds, batch)
        made = offers(seen, base, Cost(0.0, cost_s), "full", history)
        verdict = decide(counters.model, seen, base, made, tokens)
        judged.append(Judged(counters, *best_length(counters.survival, costs), verdict))
        if not as_json:
            _show_counters(judged[-1])
        if guesses:
            say(f"assumed, not measured: {', '.join(guesses)}", notes if as_json else console)
        if not as_json:
            say(line(verdict))
    if as_json:
        show_json(judged)


def _refuse_given(context: typer.Context, names: Collection[str], why: str) -> None:
    """Raises UserError for the first of these options that was given, whatever its value."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise UserError(f"--{name.replace('_', '-')}: {why}")


def _probe_family(manifest: Manifest, prompts: int, tokens: float, as_json: bool) -> None:
    from farm.fleet.triage import triage

    with probing_bar(notes if as_json else console) as progress:
        found = triage(manifest, prompts=prompts, served_tokens=tokens, progress=progress)
    if as_json:
        show_json(found)
        return
    console.print(_table(found.verdicts))
    for verdict in found.verdicts:
        say(line(verdict))
    for name, reason in found.refused.items():
        console.print(f"{name}: refused: {reason}", style="red", markup=False, soft_wrap=True)
    source = f"{found.num_past} past adaptations of this store" if found.num_past else "guesses: no past runs"
    say(f"expected tau from {source}")


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


def _history(manifest: Manifest | None) -> tuple[Past, ...]:
    """Past adaptations of the manifest's store; none without a manifest."""
    from farm.evaluate.history import read_history
    from farm.store import open_store

    return () if manifest is None else read_history(open_store(manifest.store))


def _assumed(
    counters: Counters, history: tuple[Past, ...], tau_base: float | None, adapt_seconds: float | None
) -> tuple[float, float, list[str]]:
    """tau of a fitting draft and seconds of adapting: as given, else from past runs, else assumed; what is assumed."""
    from farm.evaluate.counters import tau_of_alpha

    if adapt_seconds is None and history:
        adapt_seconds = sum(past.answers_s + past.training_s for past in history) / len(history)
    if tau_base is None and history:
        tau_base = history[-1].tau_base
    guesses = []
    if tau_base is None:
        tau_base = tau_of_alpha(FITTING_ALPHA, counters.k)
        guesses.append(f"--tau-base (a fitting draft accepts {FITTING_ALPHA:.0%} of each position)")
    if adapt_seconds is None:
        adapt_seconds = ADAPT_SECONDS
        guesses.append(f"--adapt-seconds ({ADAPT_SECONDS:,.0f}, as published for a 7B model)")
    return tau_base, adapt_seconds, guesses


def _show_counters(judged: Judged) -> None:
    counters = judged.counters
    survival = " / ".join(f"{share:.2f}" for share in counters.survival)
    note = "" if counters.by_position else " (from tau: the engine counts no positions)"
    if not counters.steady:
        note += " (at least: drafts were often shorter)"
    more = ", the longest that was tried" if judged.best_k == counters.k else ""
    rounds = f"{counters.rounds:,.0f} rounds" if counters.rounds else "its latest rounds"
    say(f"{counters.model}: {counters.engine}, {rounds} of up to {counters.k} drafted tokens")
    say(f"  tau {counters.tau:.2f}, alpha {counters.alpha:.2f}, survival by position {survival}{note}")
    say(f"  best k {judged.best_k}{more}: {judged.best_speedup:.2f} times plain decoding")
