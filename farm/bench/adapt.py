"""`farm bench adapt`: tau, training time and size of every way to adapt a draft, on one target's data at a time.

Trained in this process by the loop that an onboarding runs; tau is the engine's on held-out prompts, greedy. A row is
kept as soon as it is measured, and what the same code has measured is not measured again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from farm.bench.adapt_data import Subject, choose_rows
from farm.bench.methods import Variant, Work
from farm.draft.checkpoint import trunk_digest
from farm.draft.model import new_draft
from farm.evaluate.bench import TauResult
from farm.sections import AdaptSettings
from farm.train.loop import FitResult, FitTask, Save
from farm.train.process import fit_in_process

CURVE_SHARES: Final = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)  # of a run's seconds, where its draft is measured
CHECKPOINTS: Final = 40  # of a run whose curve is measured


@dataclass(frozen=True)
class Row:
    """One draft, measured. Seconds are those of caching, reference and steps; bytes those of the trained tensors."""

    model: str
    target: str
    method: str
    variant: str
    data: str
    selection: str
    fraction: float
    loss: str
    form: str
    tier: str
    seed: int
    tau: float
    alpha: float  # accepted over reached drafted tokens, all positions together
    train_seconds: float
    train_tokens: int
    train_flops: float
    adapter_bytes: int
    survival: tuple[float, ...] = ()
    progress: float = 1.0  # share of its run's seconds; below 1 on the way
    lr: float = 0.0
    epochs: int = 0  # 0: as many as the tokens of the settings took
    unroll: int = 0
    adaspec: bool = False
    init: str = ""


Identity = tuple[str, str, str, int]  # target, method, variant, seed


@dataclass(frozen=True)
class _Run:
    """A finished run: its settings, its result, and folders with a draft each by the seconds it took to there."""

    settings: AdaptSettings
    result: FitResult
    drafts: tuple[tuple[float, Path], ...]

    @property
    def before(self) -> float:
        """Seconds before the first step."""
        return self.result.seconds.caching + self.result.seconds.reference

    @property
    def held_out(self) -> float:
        """Expected tau of the result, whose weights are those of the best measurement."""
        return max((tau for _, tau in self.result.held_out), default=0.0)


def measure(
    subject: Subject,
    model: str,
    default: AdaptSettings,
    work: Sequence[Work],
    done: Collection[Identity],
) -> Iterator[list[Row]]:
    """The rows of each piece of work that is not done yet: one, or several along a curve."""
    before = trunk_digest(subject.trunk)
    for item in work:
        if (subject.spec.name, item.variant.method, item.variant.label, item.seed) in done:
            continue
        if item.variant.data == "none":
            result = subject.measure(subject.draft(None))
            yield [_row(subject, model, item, default, result, None, 0.0)]
            continue
        if not subject.shards[item.variant.data]:
            continue
        with TemporaryDirectory() as folder:
            yield list(_trained_rows(subject, model, default, item, Path(folder)))
        if trunk_digest(subject.trunk) != before:
            raise RuntimeError(f"{item.variant.label}: the trunk changed")


def _trained_rows(
    subject: Subject, model: str, default: AdaptSettings, item: Work, folder: Path
) -> Iterator[Row]:
    variant, width, rows = item.variant, subject.config.private_width, None
    if variant.selection != "all":
        rows = choose_rows(subject, variant.selection, variant.fraction, item.seed).rows
    runs = [
        _fit(subject, variant, variant.settings(default, item.seed, rate, width), rows, folder / f"{number}")
        for number, rate in enumerate(variant.rates)
    ]
    best = max(runs, key=lambda run: run.held_out)
    total = best.before + best.result.seconds.steps
    shares = CURVE_SHARES if variant.curve else (1.0,)
    nearest = [min(best.drafts, key=lambda draft: abs(best.before + draft[0] - s * total)) for s in shares]
    for seconds, place in dict.fromkeys(nearest):
        measured = subject.measure(subject.draft(place))
        yield _row(subject, model, item, best.settings, measured, best, (best.before + seconds) / total)


def _fit(
    subject: Subject, variant: Variant, settings: AdaptSettings, rows: frozenset[int] | None, folder: Path
) -> _Run:
    count = len(rows or subject.samples(variant.data))
    steps = settings.epochs * max(1, count // settings.batch_rows)
    every = max(1, steps // CHECKPOINTS) if variant.curve else 10**9
    trunk, expert = dict(subject.trunk), subject.base_expert
    if variant.random_trunk:
        fresh = new_draft(subject.config, settings.seed)
        trunk = fresh.trunk.state_dict() | {
            n: v for n, v in trunk.items() if n not in fresh.trunk.state_dict()
        }
        settings = settings.model_copy(update={"init": "random"})
    vocabulary = trunk.get("draft_vocabulary")
    task = FitTask(
        kind="expert", settings=settings.model_copy(update={"save_every": every}), draft=subject.config,
        target=subject.spec, shards=subject.shards[variant.data], expert=expert,
        vocabulary=None if vocabulary is None else tuple(int(token) for token in vocabulary), rows=rows,
        dtype=subject.manifest.dtype,
    )  # fmt: skip
    drafts: list[tuple[float, Path]] = []

    def keep(metrics: dict[str, float], save: Save | None) -> None:
        assert save is not None
        place = folder / f"{len(drafts)}"
        place.mkdir(parents=True)
        save(place)
        drafts.append((metrics["seconds"], place))

    result = fit_in_process(task, trunk, folder, report=keep)
    return _Run(settings, result, tuple(drafts))


def _row(
    subject: Subject,
    model: str,
    item: Work,
    settings: AdaptSettings,
    measured: TauResult,
    run: _Run | None,
    progress: float,
) -> Row:
    variant, stats = item.variant, measured.stats
    fields: dict[str, Any] = {"loss": "", "form": "", "tier": "", "train_seconds": 0.0, "train_tokens": 0}
    fields |= {"train_flops": 0.0, "adapter_bytes": 0, "progress": 1.0}
    if run is not None:
        total = run.before + run.result.seconds.steps
        fields = {
            "loss": settings.loss, "form": settings.form, "tier": settings.tier,
            "train_seconds": progress * total, "train_tokens": round(progress * run.result.positions),
            "train_flops": progress * run.result.flops, "adapter_bytes": run.result.trained_bytes,
            "progress": round(progress, 3), "lr": settings.lr,
            "epochs": settings.epochs if settings.tokens is None else 0,
            "unroll": settings.unroll, "adaspec": settings.adaspec is not None, "init": settings.init,
        }  # fmt: skip
    return Row(
        model=model, target=subject.spec.name, method=variant.method, variant=variant.label, data=variant.data,
        selection=variant.selection, fraction=variant.fraction, seed=item.seed,
        tau=stats.tau, alpha=sum(stats.accepted) / max(1, sum(stats.reached)),
        survival=tuple(stats.survival), **fields,
    )  # fmt: skip


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Finished rows by target, method and variant, in the order of their first one: a row a seed."""
    out: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.progress == 1.0:
            out.setdefault((row.target, row.method, row.variant), []).append(row)
    return out


def identities(rows: Sequence[Row]) -> set[Identity]:
    """The work that these rows are the whole result of."""
    return {(row.target, row.method, row.variant, row.seed) for row in rows if row.progress == 1.0}
