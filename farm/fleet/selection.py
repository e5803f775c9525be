"""Selection as a stage: one Ray task a target, one artifact of the rows kept.

It lies between a target's answers and its adaptation, or with `select.before` before its answers: then the target goes
on with the prompts that were chosen. The artifact holds every scored row in scores.parquet; its manifest says what was
realised.
"""

import io
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from farm.artifacts import Artifact, Artifacts
from farm.config import dump
from farm.fleet.answers import feature_shards
from farm.fleet.chosen import SCORES_FILE, SELECT, chosen_rows, only_chosen
from farm.fleet.pool import run_bounded
from farm.fleet.records import TargetPlan
from farm.fleet.run import Run
from farm.status import StatusBoard
from farm.store import ObjectStore, open_store

if TYPE_CHECKING:
    from farm.train.scoring import PromptTask, Selection, SelectTask

AT_ONCE = 2


def select_prompts(run: Run) -> None:
    """Choose the prompts that every remaining target answers; nothing happens unless `select.before` asks for it."""
    if not run.manifest.select.before:
        return
    found = _select(run, "prompts", choose_prompts, lambda target: _prompt_task(run, target))
    for target in run.remaining:
        with run.alone(target.name):
            answers = only_chosen(target.answers, run.artifacts, found[target.name])
            run.replan(replace(target, answers=answers))


def select_answers(run: Run, trunk: Artifact) -> None:
    """Choose the answers of every remaining target; nothing happens where all of them are adapted on."""
    if not run.manifest.select.before:
        run.selections |= _select(run, "answers", choose, lambda target: _task(run, target, trunk))


def _select(
    run: Run, what: str, task: Any, arguments: Callable[[TargetPlan], "PromptTask | SelectTask"]
) -> dict[str, Artifact]:
    """The finished selections of the remaining targets; a target whose selection fails is decided and left out."""
    found: dict[str, Artifact] = {}
    specs = {}
    for target in run.remaining:
        if target.select_key is None:
            continue
        artifact = run.artifacts.find(SELECT, target.select_key)
        if artifact is not None:
            found[target.name] = artifact
            continue
        with run.alone(target.name):
            specs[target.name] = (run.store.uri, target.select_key, arguments(target), run.run_id)

    def started(name: str) -> None:
        run.board.update(name, stage=SELECT)
        run.say(f"{name}: selecting {what} by {run.manifest.select.strategy}")

    num_gpus = run.manifest.resources.regenerate.num_gpus
    for outcome in run_bounded(specs, task, AT_ONCE, started, num_gpus=num_gpus):
        if outcome.error is not None:
            run.fail(outcome.name, outcome.error)
        else:
            found[outcome.name] = outcome.value
            run.say(f"{outcome.name}: {summary(outcome.value)}")
    for name, artifact in found.items():
        run.took(name, SELECT, artifact)
        chosen = artifact.manifest
        run.fields[name] |= {"rows": chosen["chosen"], "selected": chosen["realised_fraction"]}
    return found


def selected_rows(run: Run, target: str) -> frozenset[int] | None:
    """Numbers of the rows of its answers that a target is adapted on; None: all."""
    artifact = run.selections.get(target)
    return None if artifact is None else chosen_rows(run.artifacts, artifact)


def summary(artifact: Artifact) -> str:
    """One line: how much was kept, and how far the cheap proxy would have agreed where that is known."""
    chosen, agreement = artifact.manifest, artifact.manifest["rank_correlation"]
    what = "prompts" if chosen["settings"]["before"] else "answers"
    line = (
        f"{chosen['chosen']} of {chosen['rows']} {what} kept ({chosen['realised_fraction']:.1%}, "
        f"asked for {chosen['settings']['fraction']:.1%})"
    )
    if chosen["unscored"]:
        line += f"; {chosen['unscored']} could not be scored"
    return line if agreement is None else f"{line}; shift and mahalanobis rank alike to {agreement:.2f}"


def write_selection(
    artifacts: Artifacts, key: str, task: "PromptTask | SelectTask", selection: "Selection"
) -> Artifact:
    """The artifact of a selection, of prompts or of answers."""
    chosen, kind = selection.rows, "prompt" if task.settings.before else "answer"
    columns = {
        "row": [row.row for row in selection.scored],
        "id": [row.id for row in selection.scored],
        "score": [row.score for row in selection.scored],
        "length_bucket": [row.stratum[0] for row in selection.scored],
        "origin": [row.stratum[1] for row in selection.scored],
        "chosen": [row.row in chosen for row in selection.scored],
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return artifacts.write(
        SELECT,
        key,
        {SCORES_FILE: buffer.getvalue()},
        {
            "target": task.target.name,
            "settings": dump(task.settings),
            "rows": len(selection.scored),
            "chosen": len(chosen),
            "realised_fraction": selection.realised_fraction,
            "pilot_rows": selection.num_pilot,
            "unscored": sum(not math.isfinite(row.score) for row in selection.scored),
            f"{kind}_tokens": sum(selection.num_tokens[row] for row in chosen),
            "rank_correlation": None if math.isnan(selection.agreement) else selection.agreement,
            "seconds": selection.seconds,
        },
    )


def _task(run: Run, target: TargetPlan, trunk: Artifact) -> "SelectTask":
    from farm.train.scoring import SelectTask

    return SelectTask(
        settings=run.manifest.select,
        base=run.trunk.base,
        target=target.spec,
        dtype=run.manifest.dtype,
        trunk_folder=run.artifacts.folder_location(trunk),
        shards=feature_shards(run.answers[target.name], run.artifacts),
        origins=target.origins,
    )


def _prompt_task(run: Run, target: TargetPlan) -> "PromptTask":
    from farm.train.scoring import PromptTask

    return PromptTask(
        settings=run.manifest.select,
        regenerate=run.manifest.regenerate,
        base=run.trunk.base,
        target=target.spec,
        dtype=run.manifest.dtype,
        prompts=target.answers.prompts,
        origins=target.origins,
    )


@ray.remote(num_cpus=1, max_retries=1)
def choose(store: str, key: str, task: "SelectTask", run_id: str) -> Artifact:
    """Score one target's answers and keep the decision as an artifact; rows done go to the run's status records."""
    from farm.train.scoring import select_rows

    opened = open_store(store)
    return write_selection(Artifacts(opened), key, task, select_rows(task, _rows_done(opened, run_id, task)))


@ray.remote(num_cpus=1, max_retries=1)
def choose_prompts(store: str, key: str, task: "PromptTask", run_id: str) -> Artifact:
    """The same of one target's prompts."""
    from farm.train.prompt_scoring import select_prompt_rows

    opened = open_store(store)
    return write_selection(
        Artifacts(opened), key, task, select_prompt_rows(task, _rows_done(opened, run_id, task))
    )


def _rows_done(
    store: ObjectStore, run_id: str, task: "PromptTask | SelectTask"
) -> Callable[[int, int], None]:
    board = StatusBoard(store, run_id)

    def show(done: int, of: int) -> None:
        board.update(task.target.name, rows_done=done, rows_total=of)

    return show
