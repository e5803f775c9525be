"""Commands on published adapters: which there are, what they are made of, which is live, what can go."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from farm.card import Card, parse_card
from farm.cli.options import AsJson, StorePath, app, console, show_json, store_uri
from farm.config import UserError
from farm.garbage import GRACE_S, Garbage, delete_garbage, find_garbage
from farm.registry import Pointer, Registry, Version
from farm.store import open_store

if TYPE_CHECKING:
    from farm.store import ObjectStore

DAY_S = 86400.0

TargetName = Annotated[str, typer.Argument(help="A target's name, as `list` shows it.", metavar="TARGET")]
VersionName = Annotated[str, typer.Argument(help="One of its versions, for instance v2.", metavar="VERSION")]

registry_app = typer.Typer(no_args_is_help=True, help="Published adapters of a store.")
app.add_typer(registry_app, name="registry")


@registry_app.command("list")
def list_versions(store: StorePath = ".farm/store", as_json: AsJson = False) -> None:
    """Every target's versions, the live one and the canary marked."""
    registry = _open(store)
    pointers = {name: registry.pointer(name) for name in sorted(registry.family()["targets"])}
    if as_json:
        show_json([_listed(registry, name, pointer) for name, pointer in pointers.items()])
        return
    for name, pointer in pointers.items():
        marks = {pointer.live: " (live)"}
        if pointer.canary is not None:
            marks[pointer.canary.version] = f" (canary, {pointer.canary.share:g})"
        for ended in pointer.withdrawn:
            marks[ended.version] = f" (rolled back: {escape(ended.reason)})"
        versions = [
            f"[bold]{v.version}{marks[v.version]}[/bold]" if v.version in marks else v.version
            for v in registry.versions(name)
        ]
        console.print(f"{name:<24} {', '.join(versions) or 'base draft'}", highlight=False, soft_wrap=True)


@registry_app.command()
def show(
    name: Annotated[str, typer.Argument(help="TARGET for its live version, or TARGET@VERSION.")],
    store: StorePath = ".farm/store",
    as_json: AsJson = False,
) -> None:
    """A version's card: tau, what it was made of, where it fits."""
    registry = _open(store)
    version = _version(registry, name)
    if as_json:
        show_json(version.card)
        return
    live = registry.live(version.target)
    is_live = live is not None and live.version == version.version
    title = f"{version.target}@{version.version}"
    console.print(_card_table(f"{title} (live)" if is_live else title, parse_card(title, version.card)))


@registry_app.command()
def promote(target: TargetName, version: VersionName, store: StorePath = ".farm/store") -> None:
    """Make a published version live."""
    registry = _open(store)
    live = registry.live(target)
    if not registry.promote(target, version, live.version if live else None):
        raise UserError(f"{target}: the live version moved meanwhile; look again, then repeat")
    console.print(f"{target}: {version} is live", highlight=False)


@registry_app.command()
def canary(
    target: TargetName,
    version: VersionName,
    share: Annotated[float | None, typer.Option(help="Of the requests, between 0 and 1.")] = None,
    end: Annotated[bool, typer.Option("--end", help="All requests go to the live version again.")] = False,
    store: StorePath = ".farm/store",
) -> None:
    """Try a published version on a share of a target's requests, or end that."""
    registry = _open(store)
    if end == (share is not None):
        raise UserError("registry canary: give either --share, for instance 0.1, or --end")
    if share is None:
        ended = registry.end_canary(target, version)
        console.print(
            f"{target}: {version} is {'no canary any more' if ended else 'no canary'}", highlight=False
        )
        return
    if not registry.start_canary(target, version, share):
        tried = registry.canary(target)
        raise UserError(
            f"{target}: {tried.version} is tried already; end it first, or let it decide"
            if tried and tried.version != version
            else f"{target}: its pointer moved meanwhile; look again, then repeat"
        )
    console.print(f"{target}: {version} gets {share:g} of the requests", highlight=False)


@registry_app.command()
def rollback(target: TargetName, store: StorePath = ".farm/store") -> None:
    """Make the version live that was live before."""
    version = _open(store).rollback(target)
    console.print(f"{target}: {version.version} is live again", highlight=False)


@registry_app.command()
def gc(
    store: StorePath = ".farm/store",
    grace_days: Annotated[
        float, typer.Option("--grace", help="Days; what is younger stays.", min=0)
    ] = GRACE_S / DAY_S,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go; delete nothing.")] = False,
) -> None:
    """Delete versions, stage outputs and checkpoints that nothing live, canary or kept refers to."""
    opened: ObjectStore = open_store(store_uri(store))
    found = find_garbage(opened, grace_days * DAY_S, time.time())
    gone = found if dry_run else [garbage for garbage in found if delete_garbage(opened, garbage)]
    for garbage in gone:
        line = f"{_size(garbage):>10}  {garbage.age_s / DAY_S:6.1f} days  {garbage.what}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    total = sum(garbage.num_bytes for garbage in gone) / 1e6
    verb = "would go" if dry_run else "deleted"
    console.print(f"{len(gone)} {verb}, {total:.1f} MB", highlight=False)


def _open(store: str) -> Registry:
    return Registry(open_store(store_uri(store)))


def _listed(registry: Registry, target: str, pointer: Pointer) -> dict[str, Any]:
    versions = [version.version for version in registry.versions(target)]
    return {"target": target, "versions": versions, "live": pointer.live, **asdict(pointer)}


def _version(registry: Registry, name: str) -> Version:
    """The version that `target` (its live one, else its newest) or `target@version` names."""
    target, _, wanted = name.partition("@")
    versions = registry.versions(target)
    if not versions:
        raise UserError(
            f"{target}: has no published version in {registry.store.uri}; run `farm onboard` first"
        )
    if not wanted:
        return registry.live(target) or versions[-1]
    for version in versions:
        if version.version == wanted:
            return version
    known = ", ".join(version.version for version in versions)
    raise UserError(f"{target}: has no version {wanted}; choose one of {known}")


def _card_table(title: str, card: Card) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for draft, temperature, tau in card.tau_table:
        table.add_row(f"tau, {draft}, temperature {temperature}", f"{tau:.3f}")
    gain = card.evaluation.get("gain_interval")
    if gain and None not in gain:
        table.add_row("gain in tau, 95 %", f"{gain[0]:.3f} to {gain[1]:.3f}")
    rows = (
        ("compared with", card.opponent or "base draft"),
        ("data key", card.answers_key),
        ("selection key", card.select_key),
        ("adapt key", card.adapt_key),
        ("evaluation key", card.evaluate_key),
        ("config sha256", card.config_digest),
        ("trunk", card.trunk_key),
        ("trunk sha256", card.trunk_digest),
        ("hidden size, vocabulary", _pair(card.hidden_size, card.vocab_size)),
        ("draft vocabulary sha256", card.vocabulary_digest),
        ("tokenizer sha256", card.tokenizer_digest),
        ("base sha256", card.base_digest),
        ("target sha256", card.target_digest),
        ("git", card.git_sha),
        ("libraries", ", ".join(f"{name} {version}" for name, version in card.library_versions.items())),
        *((f"{name} sha256", digest) for name, digest in card.files.items()),
    )
    for name, value in rows:
        table.add_row(name, Text(value or "–"))
    return table


def _pair(*values: int | None) -> str | None:
    return None if None in values else ", ".join(str(value) for value in values)


def _size(garbage: Garbage) -> str:
    return f"{garbage.num_bytes / 1e6:.1f} MB"
