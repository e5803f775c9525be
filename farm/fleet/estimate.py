"""What a plan will cost, in rows, tokens, bytes and seconds, and the table that `--dry-run` prints.

Seconds come from the rates of stages that this store has finished, else from a rough model of a small CPU:
they are for planning a day, not for comparing runs.
"""

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from farm.artifacts import TRUNK, Artifacts
from farm.config import UserError
from farm.fleet.answers import ANSWERS, AnswersJob
from farm.fleet.chosen import SELECT
from farm.fleet.publish import evaluation_key, opponent_of
from farm.fleet.records import Plan, TargetPlan
from farm.fleet.stage_keys import ADAPT, EVALUATE
from farm.registry import Registry
from farm.store import NotFound, local_copy

# Without history: decoding moves all weights once a step, a row of the batch gets one token of it.
ASSUMED_BYTES_PER_S = 4e9
ASSUMED_TRAIN_TOKENS_PER_S = 3000.0
PROMPT_TOKENS = 48  # a prompt, before it was tokenized
FEATURE_BYTES = 2  # bfloat16, for each hidden unit of each token


@dataclass(frozen=True)
class Rates:
    """Seconds per generated token and per trained token, measured or assumed; sizes of the base."""

    decode_s: float
    train_s: float
    hidden_size: int | None
    measured: bool


@dataclass(frozen=True)
class Estimate:
    """Upper bounds for one line of the plan; 0 for a stage that is reused."""

    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(
            self.rows + other.rows,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
        )


def read_rates(plan: Plan, artifacts: Artifacts) -> Rates:
    """Rates from the manifests in the store, or the assumed ones."""
    decode = _rate(artifacts, ANSWERS, lambda manifest: manifest["answer_tokens"])
    train = _rate(artifacts, ADAPT, lambda manifest: manifest["trained_tokens"])
    weights = _checkpoint_bytes(plan.manifest.base)
    assumed = weights / ASSUMED_BYTES_PER_S / plan.manifest.regenerate.batch_rows
    return Rates(
        decode_s=assumed if decode is None else decode,
        train_s=1 / ASSUMED_TRAIN_TOKENS_PER_S if train is None else train,
        hidden_size=_hidden_size(plan.manifest.base),
        measured=decode is not None,
    )


def _rate(artifacts: Artifacts, stage: str, tokens: Callable[[dict[str, float]], float]) -> float | None:
    """Seconds a token over all finished artifacts of a stage; None without any."""
    seconds = total = 0.0
    for name in artifacts.store.list(f"artifacts/{stage}/"):
        if not name.endswith("/manifest.json"):
            continue
        try:
            manifest = json.loads(artifacts.store.get(name))
            seconds, total = seconds + manifest["seconds"], total + tokens(manifest)
        except (NotFound, KeyError, ValueError):
            continue
    return seconds / total if total else None


def _checkpoint_bytes(model: str) -> int:
    """Of its weights as far as they are there; 0 where its index cannot be read: running it will say so."""
    from farm.target.weights import weight_files

    path = local_copy(model)
    try:
        files = [path] if path.is_file() else weight_files(path)
    except UserError:
        return 0
    return sum(file.stat().st_size for file in files if file.is_file())


def _hidden_size(model: str) -> int | None:
    try:
        return int(json.loads((local_copy(model) / "config.json").read_text())["hidden_size"])
    except (OSError, ValueError, KeyError):
        return None


def rows_to_answer(plan: Plan, target: TargetPlan) -> int:
    """Prompts that a target answers: what its selection has chosen, or will choose at most."""
    rows, settings = len(target.answers.prompts), plan.manifest.select
    return round(rows * settings.fraction) if settings.before and SELECT not in target.reused else rows


def rows_to_train(plan: Plan, target: TargetPlan) -> int:
    """Answers that a target is adapted on, at most: what a selection among them leaves."""
    rows, settings = rows_to_answer(plan, target), plan.manifest.select
    return rows if target.select_key is None or settings.before else round(rows * settings.fraction)


def planned_epochs(plan: Plan, target: TargetPlan) -> int:
    """Of adapting, as `adapt.epochs` or `adapt.tokens` say."""
    settings, longest = plan.manifest.adapt, target.answers.settings.max_new_tokens
    if settings.tokens is None:
        return settings.epochs
    return max(1, round(settings.tokens / max(1, rows_to_train(plan, target) * longest)))


def estimate_answers(job: AnswersJob, rates: Rates, rows: int | None = None) -> Estimate:
    """Regenerating and capturing one target, every answer as long as it may be; `rows` of its prompts, None: all."""
    rows = len(job.prompts) if rows is None else rows
    answered = rows * job.settings.max_new_tokens
    tokens = answered + rows * PROMPT_TOKENS
    features = tokens * FEATURE_BYTES * (rates.hidden_size or 0)
    kept = min(features, job.feature_bytes * job.num_shards)
    return Estimate(rows, tokens, kept, answered * rates.decode_s)


def estimate_training(rows: int, max_new_tokens: int, epochs: int, rates: Rates) -> Estimate:
    """Fitting on answers of `rows` prompts."""
    return Estimate(seconds=rows * (max_new_tokens + PROMPT_TOKENS) * epochs * rates.train_s)


def estimate_target(plan: Plan, target: TargetPlan, rates: Rates) -> Estimate:
    """What one target still needs before it is evaluated."""
    total = Estimate()
    if ADAPT in target.reused:
        return total
    if ANSWERS not in target.reused:
        total += estimate_answers(target.answers, rates, rows_to_answer(plan, target))
    longest, epochs = target.answers.settings.max_new_tokens, planned_epochs(plan, target)
    return total + estimate_training(rows_to_train(plan, target), longest, epochs, rates)


def trunk_stages(plan: Plan, artifacts: Artifacts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the trunk runs, and what it reuses."""
    if plan.trunk.reused:
        return (), (TRUNK,)
    if plan.trunk.folder is not None:
        return ("copy",), ()
    job = plan.trunk.answers
    if job is not None and artifacts.find(ANSWERS, job.key) is not None:
        return ("train",), (ANSWERS,)
    return (ANSWERS, "train"), ()


def estimate_trunk(plan: Plan, runs: Collection[str], rates: Rates) -> Estimate:
    """What the trunk still needs, by the stages that it runs."""
    job = plan.trunk.answers
    if job is None or plan.trunk.reused:
        return Estimate()
    training = estimate_training(
        len(job.prompts), job.settings.max_new_tokens, plan.manifest.train_trunk.epochs, rates
    )
    return training + estimate_answers(job, rates) if ANSWERS in runs else training


def trunk_table(plan: Plan, artifacts: Artifacts) -> Table:
    """The part of the plan that makes the trunk."""
    rates = read_rates(plan, artifacts)
    table = _table(rates)
    _add_trunk(table, plan, artifacts, rates)
    return table


def plan_table(plan: Plan, artifacts: Artifacts) -> Table:
    """The plan for people: what each target runs, what it reuses, and what that will cost at most."""
    rates = read_rates(plan, artifacts)
    table = _table(rates)
    total = _add_trunk(table, plan, artifacts, rates)
    registry = Registry(artifacts.store)
    for target in plan.targets:
        cost = estimate_target(plan, target, rates)
        total += cost
        reused = list(target.reused)
        opponent = opponent_of(registry, target.name, target.adapt_key, plan.trunk.key)
        if artifacts.find(EVALUATE, evaluation_key(plan.manifest, target, opponent)) is not None:
            reused.append(EVALUATE)
        runs = [stage for stage in _stages(plan, target) if stage not in reused]
        _add(table, target.name, runs, reused, cost)
    for name, reason in plan.refused.items():
        table.add_row(Text(name), Text(f"refused: {reason}", style="red"))
    table.add_section()
    _add(table, "together", (), (), total)
    return table


def _table(rates: Rates) -> Table:
    table = Table(
        caption="seconds from finished runs" if rates.measured else "seconds from a rough model of a CPU"
    )
    for heading in ("target", "runs", "reuses"):
        table.add_column(heading, overflow="fold")
    for heading in ("rows", "tokens", "MiB", "seconds"):
        table.add_column(heading, justify="right")
    return table


def _add_trunk(table: Table, plan: Plan, artifacts: Artifacts, rates: Rates) -> Estimate:
    runs, reuses = trunk_stages(plan, artifacts)
    cost = estimate_trunk(plan, runs, rates)
    _add(table, "trunk", runs, reuses, cost)
    return cost


def _stages(plan: Plan, target: TargetPlan) -> tuple[str, ...]:
    """A target's stages in the order in which they run."""
    if target.select_key is None:
        return ANSWERS, ADAPT, EVALUATE
    first = (SELECT, ANSWERS) if plan.manifest.select.before else (ANSWERS, SELECT)
    return *first, ADAPT, EVALUATE


def _add(table: Table, name: str, runs: Iterable[str], reuses: Iterable[str], cost: Estimate) -> None:
    table.add_row(
        Text(name),
        ", ".join(runs) or "–",
        ", ".join(reuses) or "–",
        f"{cost.rows:,}",
        f"{cost.tokens:,}",
        f"{cost.bytes / 2**20:,.1f}",
        f"{cost.seconds:,.0f}",
    )
