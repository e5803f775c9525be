"""Selection as a stage: one Ray task a target between its answers and its adaptation, one artifact of the rows kept.

The artifact holds every scored row in scores.parquet; its manifest says what was realised.
"""

import io
import math
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from farm.artifacts import Artifact, Artifacts
from farm.config import dump
from farm.fleet.answers import feature_shards
from farm.fleet.plan import SELECT, TargetPlan
from farm.fleet.pool import run_bounded
from farm.fleet.run import Run
from farm.status import StatusBoard
from farm.store import open_store

if TYPE_CHECKING:
    from farm.train.scoring import Selection, SelectTask

SCORES_FILE = "scores.parquet"
AT_ONCE = 2


def select_answers(run: Run, trunk: Artifact) -> None:
    """Choose the answers of every remaining target; nothing happens where all of them are adapted on."""
    found: dict[str, Artifact] = {}
    specs = {}
    for target in run.remaining:
        if target.select_key is None:
            continue
        artifact = run.artifacts.find(SELECT, target.select_key)
        if artifact is None:
            specs[target.name] = (run.store.uri, target.select_key, _task(run, target, trunk), run.run_id)
        else:
            found[target.name] = artifact

    def started(name: str) -> None:
        run.board.update(name, stage=SELECT)
        run.say(f"{name}: selecting by {run.manifest.select.strategy}")

    num_gpus = run.manifest.resources.regenerate.num_gpus
    for outcome in run_bounded(specs, choose, AT_ONCE, started, num_gpus=num_gpus):
        if outcome.error is not None:
            run.fail(outcome.name, outcome.error)
        else:
            found[outcome.name] = outcome.value
            run.say(f"{outcome.name}: {summary(outcome.value)}")
    for name, artifact in found.items():
        run.selections[name] = artifact
        run.took(name, SELECT, artifact)
        chosen = artifact.manifest
        run.fields[name] |= {"rows": chosen["chosen"], "selected": chosen["realised_fraction"]}


def selected_rows(run: Run, target: str) -> frozenset[int] | None:
    """Numbers of the rows that a target is adapted on; None: all."""
    artifact = run.selections.get(target)
    if artifact is None:
        return None
    table = pq.read_table(run.artifacts.path(artifact, SCORES_FILE), columns=["row", "chosen"])
    return frozenset(row["row"] for row in table.to_pylist() if row["chosen"])


def summary(artifact: Artifact) -> str:
    """One line: how much was kept, and how far the cheap proxy would have agreed where that is known."""
    chosen, agreement = artifact.manifest, artifact.manifest["rank_correlation"]
    line = (
        f"{chosen['chosen']} of {chosen['rows']} answers kept ({chosen['realised_fraction']:.1%}, "
        f"asked for {chosen['settings']['fraction']:.1%})"
    )
    return line if agreement is None else f"{line}; shift and mahalanobis rank alike to {agreement:.2f}"


def write_selection(artifacts: Artifacts, key: str, task: "SelectTask", selection: "Selection") -> Artifact:
    """The artifact of a selection."""
    chosen = selection.rows
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
    artifacts.put_file(SELECT, key, SCORES_FILE, buffer.getvalue())
    return artifacts.finish(
        SELECT,
        key,
        {
            "target": task.target.name,
            "settings": dump(task.settings),
            "rows": len(selection.scored),
            "chosen": len(chosen),
            "realised_fraction": selection.realised_fraction,
            "pilot_rows": selection.num_pilot,
            "answer_tokens": sum(selection.answer_tokens[row] for row in chosen),
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


@ray.remote(num_cpus=1, max_retries=1)
def choose(store: str, key: str, task: "SelectTask", run_id: str) -> Artifact:
    """Score one target's answers and keep the decision as an artifact; rows done go to the run's status records."""
    from farm.train.scoring import select_rows

    opened = open_store(store)
    board = StatusBoard(opened, run_id)

    def show(done: int, of: int) -> None:
        board.update(task.target.name, rows_done=done, rows_total=of)

    return write_selection(Artifacts(opened), key, task, select_rows(task, show))
