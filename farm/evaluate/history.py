"""What a store remembers of past adaptations: the rows of its runs' reports. Needs no torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from farm.evaluate.records import Report, TargetRow
from farm.evaluate.triage import TRAINING_SHARE, Cost, Past, Tier
from farm.store import NotFound, ObjectStore

# What triage offers for a tier of `adapt.tier`; those that are not named are experts, with or without low-rank changes.
OFFERED: Mapping[str, Tier] = {"low-rank": "low-rank", "eda": "full", "full": "full"}


def read_history(store: ObjectStore) -> tuple[Past, ...]:
    """Adaptations that were evaluated, in the order of their runs; a reused one counts once."""
    found: dict[tuple[str | None, str, str | None], Past] = {}
    for name in store.list("runs/"):
        if not name.endswith("/report.json"):
            continue
        try:
            report = Report.model_validate_json(store.get(name))
        except (
            NotFound,
            ValidationError,
        ):  # of another version of the farm: it says nothing that can be read
            continue
        for row in report.targets:
            past = _past(report, row)
            if past is not None:
                found[report.trunk_key, row.name, row.adapter_version] = past
    return tuple(found.values())


def typical_cost(history: Sequence[Past], kind: str, rows: int, trained: int | None = None) -> Cost | None:
    """Seconds of `rows` answers, `trained` of them adapted on (None: all), by the median of past runs.

    Those on this kind of target count, if there are any.
    Training seconds are an expert's, as `Cost` has them: another tier's are brought to that by its share.
    """
    known = [past for past in history if past.rows]
    known = [past for past in known if past.kind == kind] or known
    if not known:
        return None
    answers = statistics.median(past.answers_s / past.rows for past in known)
    training = statistics.median(
        past.training_s / TRAINING_SHARE[past.tier] / (past.trained or past.rows) for past in known
    )
    return Cost(answers * rows, training * (rows if trained is None else trained))


def _past(report: Report, row: TargetRow) -> Past | None:
    before, after, base = row.tau_base_draft, row.tau_adapted, report.tau_base_on_base
    answers_s, training_s = row.stage_seconds.get("regenerate"), row.stage_seconds.get("adapt")
    if before is None or after is None or base is None or answers_s is None or training_s is None:
        return None
    ended = row.finish_reasons  # of all answers, where `rows` are those that a selection has chosen
    answered = (row.rows or 0) if ended is None else ended.stop + ended.length + ended.error
    plain, drafted = row.tokens_per_s_autoregressive, row.tokens_per_s_base_draft
    return Past(
        target=row.name,
        kind=row.kind,
        tier=OFFERED.get(row.tier or "", "expert"),
        tau_before=before,
        tau_after=after,
        tau_base=base,
        rows=answered,
        trained=row.rows,
        answers_s=answers_s,
        training_s=training_s,
        plain_s=1 / plain if plain else None,
        round_s=before / drafted if drafted else None,
    )
