"""A target's own stages, in order. Each one asks the store first and starts work only for what is missing."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farm.artifacts import Artifact
from farm.card import Fit
from farm.config import UserError, dump
from farm.data.rejects import listed
from farm.fleet import measure
from farm.fleet.answers import AnswersJob, feature_shards, finish_answers, kept_bytes, missing_shards
from farm.fleet.base_draft import BaseDraft
from farm.fleet.datasets import ShardResult, regenerate
from farm.fleet.footprint import Footprint
from farm.fleet.packs import fit_runs, in_runs, jobs_of
from farm.fleet.pool import run_bounded
from farm.fleet.publish import evaluation_key, family_fit, opponent_of, publish
from farm.fleet.records import TargetPlan
from farm.fleet.run import Run
from farm.fleet.selection import selected_rows
from farm.fleet.session import cpus_of_largest_node
from farm.fleet.stage_keys import ADAPT, EVALUATE, EXPERT_FILE, TRUNK_FILE
from farm.fleet.trainers import CURVE_FILE, PackJob, TrainJob
from farm.fleet.vocabulary import coverage, token_files

if TYPE_CHECKING:
    from farm.draft.config import DraftConfig

LOW_COVERAGE = 0.99


class _RowCounter:
    """Keeps the rows done of each target on the status board, and the features' bytes, while shards come in.

    Decides a target whose finished shards cannot be read.
    """

    def __init__(self, run: Run, jobs: list[AnswersJob]) -> None:
        self._run, self._rows, held = run, {}, 0
        for job in jobs:
            with run.alone(job.name):
                missing = missing_shards(run.artifacts, job)
                self._rows[job.name] = len(job.prompts) - sum(len(job.shard(number)) for number in missing)
                held += kept_bytes(run.artifacts, job)
        self.footprint = Footprint.of(jobs, held)

    def __call__(self, result: ShardResult) -> None:
        self._rows[result.target] += result.rows
        self._run.board.update(result.target, rows_done=self._rows[result.target])
        self.footprint.add(result.feature_bytes)


def regenerate_answers(run: Run, trunk: Artifact) -> None:
    """Every remaining target answers its prompts; one pipeline for all of them, which `trunk` may draft for."""
    jobs = [target.answers for target in run.remaining]
    for job in jobs:
        if missing_shards(run.artifacts, job):
            run.say(f"{job.name}: regenerating {len(job.prompts)} answers")
            run.board.update(job.name, stage="regenerate", rows_done=0, rows_total=len(job.prompts))
    counter = _RowCounter(run, jobs)
    jobs = [target.answers for target in run.remaining]
    draft = BaseDraft.of(run.artifacts, trunk) if run.manifest.regenerate.draft == "base" else None
    failures = regenerate(jobs, run.store.uri, run.manifest.resources.regenerate, counter, draft)
    if counter.footprint.peak.total:
        run.say(counter.footprint.line())
    for target in run.remaining:
        if target.name in failures:
            run.fail(target.name, failures[target.name])
            continue
        try:
            artifact = finish_answers(run.artifacts, target.answers)
        except (UserError, OSError) as error:
            run.fail(target.name, error)
            continue
        run.answers[target.name] = artifact
        run.took(target.name, "regenerate", artifact)
        made = artifact.manifest
        names = ("rows", "finish_reasons", "faults", "rejected")
        run.fields[target.name] |= {name: made[name] for name in names}
        if made["rejected"]:
            faults = listed(made["faults"], target.answers.settings.reject)
            run.say(f"{target.name}: {made['rejected']} answers are not trained on: {faults}")


def adapt(run: Run, trunk: Artifact) -> None:
    """Fit every remaining target's private expert, a bounded number of runs at a time."""
    missing = []
    for target in run.remaining:
        found = run.artifacts.find(ADAPT, target.adapt_key)
        if found is None:
            missing.append(target)
        else:
            _adapted(run, target.name, found)

    def started(one: PackJob | TrainJob) -> None:
        for job in jobs_of(one):
            run.board.update(job.name, stage="adapt")
        run.say(f"{one.name}: adapting")

    shared = _shared(run, trunk)
    jobs: list[TrainJob] = []
    for target in missing:
        with run.alone(target.name):
            jobs.append(_adapt_job(run, target, shared))
    for ended in fit_runs(in_runs(jobs), started):
        if ended.artifact is not None:
            _adapted(run, ended.name, ended.artifact)
        elif ended.error is not None:
            run.fail(ended.name, ended.error)


def adapt_jobs(run: Run, trunk: Artifact, targets: Sequence[TargetPlan]) -> list[TrainJob]:
    """What fits the private expert of each of these targets, whose answers the run has.

    Raises UserError when the artifacts of one are damaged.
    """
    shared = _shared(run, trunk)
    return [_adapt_job(run, target, shared) for target in targets]


@dataclass(frozen=True)
class _Shared:
    """What all adapt jobs of a run have in common."""

    expert: str  # location of the base's private expert
    trunk_file: str  # location
    draft: "DraftConfig"
    vocabulary: tuple[int, ...] | None
    revision: str


def _shared(run: Run, trunk: Artifact) -> _Shared:
    from farm.draft.checkpoint import read_config, read_tensors, split_vocabulary

    folder = run.artifacts.folder(trunk)
    vocabulary = split_vocabulary(read_tensors(folder / TRUNK_FILE))[1]
    kept = None if vocabulary is None else tuple(int(token) for token in vocabulary)
    expert, weights = (run.artifacts.location(trunk, name) for name in (EXPERT_FILE, TRUNK_FILE))
    return _Shared(expert, weights, read_config(folder), kept, trunk.key)


def _adapt_job(run: Run, target: TargetPlan, shared: _Shared) -> TrainJob:
    from farm.train.loop import FitTask

    answers, settings = run.answers[target.name], run.manifest.adapt
    chosen = run.selections.get(target.name, answers)
    shards = feature_shards(answers, run.artifacts)
    covered = coverage(token_files(shards), shared.vocabulary)
    if covered < LOW_COVERAGE:
        run.say(f"{target.name}: warning: the draft vocabulary holds {covered:.1%} of its answers' tokens")
    return TrainJob(
        name=target.name,
        stage=ADAPT,
        key=target.adapt_key,
        task=FitTask(
            kind="expert",
            settings=settings,
            draft=shared.draft,
            target=target.spec,
            shards=shards,
            expert=shared.expert,
            vocabulary=shared.vocabulary,
            rows=selected_rows(run, target.name),
            dtype=run.manifest.dtype,
        ),
        store=run.store.uri,
        trunk=(shared.revision, shared.trunk_file),
        resources=run.manifest.resources.adapt,
        attempts=run.attempts,
        shown_as=(run.run_id, (target.name,)),
        record={
            "target": target.name,
            "settings": dump(settings),
            "answers_key": target.answers.key,
            "trunk_key": shared.revision,
            "coverage": covered,
            "trained_tokens": settings.tokens or chosen.manifest["answer_tokens"] * settings.epochs,
        },
    )


def _adapted(run: Run, name: str, artifact: Artifact) -> None:
    run.took(name, ADAPT, artifact)
    run.fields[name]["coverage"] = artifact.manifest["coverage"]
    with run.alone(name):
        run.curves[name] = json.loads(run.artifacts.path(artifact, CURVE_FILE).read_text())


def evaluate(run: Run, trunk: Artifact) -> None:
    """Measure every remaining target on its held-out prompts, one at a time so that nothing else runs
    meanwhile.
    """
    specs: dict[str, tuple[Any, ...]] = {}
    found: dict[str, Artifact] = {}
    for target in run.remaining:
        with run.alone(target.name):
            spec = _evaluation(run, target, trunk)
            artifact = run.artifacts.find(EVALUATE, spec[1])
            if artifact is None:
                specs[target.name] = spec
            else:
                found[target.name] = artifact

    def started(name: str) -> None:
        run.board.update(name, stage="evaluate")
        run.say(f"{name}: evaluating")

    for name, spec in specs.items():
        (outcome,) = run_bounded({name: spec}, measure.evaluate, 1, started, **_whole_node(run))
        if outcome.error is not None:
            run.fail(outcome.name, outcome.error)
        else:
            found[outcome.name] = outcome.value
    if run.remaining:
        fit = family_fit(run.artifacts, run.plan, trunk)
        for target in run.remaining:
            _conclude(run, target, found[target.name], fit)


def _whole_node(run: Run) -> dict[str, float]:
    """What the next evaluation asks of Ray: every free CPU of a node, and the GPU share that a target decodes on."""
    num_gpus = run.manifest.resources.regenerate.num_gpus
    return {"num_cpus": cpus_of_largest_node(num_gpus), "num_gpus": num_gpus}


def _evaluation(run: Run, target: TargetPlan, trunk: Artifact) -> tuple[Any, ...]:
    """Arguments of the evaluation task: store, key, what to compare, what to record."""
    from farm.evaluate.target import EvaluateTask

    adapted = run.artifacts.find(ADAPT, target.adapt_key)
    assert adapted is not None  # every remaining target was adapted
    opponent = opponent_of(run.registry, target.name, target.adapt_key, trunk.key)
    key = evaluation_key(run.manifest, target, opponent)
    task = EvaluateTask(
        target=target.spec,
        settings=run.manifest.evaluate,
        trunk_folder=run.artifacts.folder_location(trunk),
        adapted=run.artifacts.location(adapted, EXPERT_FILE),
        live=run.registry.location(opponent, EXPERT_FILE) if opponent else None,
        prompts=target.held_out,
        dtype=run.manifest.dtype,
    )
    record = {"target": target.name, "opponent": opponent.version if opponent else None}
    return run.store.uri, key, task, record


def _conclude(run: Run, target: TargetPlan, evaluation: Artifact, fit: Fit) -> None:
    """Through the gate: publish, promote or keep, and close the target's row."""
    fields = run.fields[target.name]
    fields |= {name: value for name, value in evaluation.manifest["row"].items() if name != "stage_seconds"}
    run.took(target.name, EVALUATE, evaluation)
    fields["tier"] = run.manifest.adapt.tier
    run.dtype = evaluation.manifest["dtype"]
    tau = fields.get("tau_base_draft")
    if tau is not None and run.tau_base_on_base:
        fields["retention"] = tau / run.tau_base_on_base
    try:
        verdict = publish(run.registry, run.artifacts, run.plan, target, evaluation, fit)
    except (OSError, ValueError) as error:
        run.fail(target.name, error)
        return
    fields["adapter_version"] = verdict.version
    run.end(target.name, verdict.decision, verdict.reason)
