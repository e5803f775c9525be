"""Onboarding a family: plan, prepare, the targets' stages, the report. A target's failure is a row of the
report.
"""

import os
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from farm.artifacts import Artifact, Artifacts
from farm.config import Manifest, UserError
from farm.evaluate import provenance
from farm.evaluate.records import Report
from farm.evaluate.report import write_report
from farm.evaluate.templates import with_templates
from farm.fleet.elicit import elicit_prompts, elicitation_lines
from farm.fleet.estimate import plan_table, trunk_table
from farm.fleet.plan import make_plan
from farm.fleet.prepare import check_targets, measure_base, prepare_trunk, skip_good_enough
from farm.fleet.publish import family_record
from farm.fleet.records import Plan
from farm.fleet.run import Run
from farm.fleet.selection import select_answers, select_prompts
from farm.fleet.session import check_cluster
from farm.fleet.stages import adapt, evaluate, regenerate_answers
from farm.fleet.trainers import Attempts
from farm.fleet.triage import planned_lines
from farm.fleet.trunk import close_trunk
from farm.fleet.trunk_plan import NO_PROMPTS
from farm.sections import TargetSpec
from farm.store import ObjectStore, open_store

Say = Callable[[str], None]


def plan_onboarding(manifest: Manifest) -> tuple[Table, list[str]]:
    """What `onboard` would run and reuse, what that costs at most, and a line a target on whether it pays.

    Starts nothing, needs no Ray.
    """
    artifacts = Artifacts(open_store(manifest.store))
    manifest = with_templates(manifest)
    plan = make_plan(manifest, artifacts, _digest, stand_in=True)
    lines = [*elicitation_lines(manifest, artifacts, _digest), *_endpoint_lines(manifest)]
    return plan_table(plan, artifacts), [*lines, *planned_lines(plan, artifacts)]


def _endpoint_lines(manifest: Manifest) -> list[str]:
    asked = manifest.regenerate
    if asked.engine == "farm":
        return []
    return [
        f"{spec.name}: answered by {spec.url or asked.url} as {spec.served_as or spec.name}"
        for spec in manifest.targets
    ]


def onboard(
    manifest: Manifest, say: Say, *, run_id: str | None = None, attempts: Attempts | None = None
) -> tuple[Report, str]:
    """Onboard every target that is not done; returns the report and the URI of the folder it was written to.

    Needs a connected cluster (`session.connect`). Stages that are finished in the store are not run again.
    Raises UserError for a mistake that concerns the whole manifest.
    """
    check_cluster(manifest)
    store = open_store(manifest.store)
    run_id = run_id or new_run_id()
    run = Run(run_id, _plan(manifest, Artifacts(store), say), store, say, attempts or Attempts())
    run.board.open(target.name for target in manifest.targets)
    say(f"run {run_id}: {len(manifest.targets)} targets, store {store.uri}")
    for name, reason in run.plan.refused.items():
        run.end(name, "refused", reason)
    check_targets(run)
    if run.remaining:
        _run_stages(run)
    report = _report(run)
    return report, _put_report(store, report)


def new_run_id() -> str:
    """Sorts by time; two runs that start in one second still differ."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def train_trunk(manifest: Manifest, say: Say) -> tuple[Path, float | None]:
    """Train the family's trunk, or find it; returns its folder and the base draft's tau on the base.

    Raises UserError for the user's mistakes, and whatever ended the training. Needs a connected cluster.
    """
    check_cluster(manifest)
    store = open_store(manifest.store)
    run = Run(f"trunk-{new_run_id()}", _plan(manifest, Artifacts(store), say), store, say, Attempts())
    for name, reason in run.plan.refused.items():
        say(f"{name}: refused: {reason}")
    try:
        trunk = prepare_trunk(run)
        measure_base(run, trunk)
    finally:
        run.board.forget()  # no target is decided here
    return run.artifacts.folder(trunk), run.tau_base_on_base


def plan_trunk_training(manifest: Manifest) -> tuple[Table, list[str]]:
    """What `train_trunk` would run and reuse, what that costs at most, and whose prompts there will be or will not.

    Starts nothing, needs no Ray. Raises UserError where `train_trunk` would for want of prompts.
    """
    artifacts = Artifacts(open_store(manifest.store))
    manifest = with_templates(manifest)
    plan = make_plan(manifest, artifacts, _digest, stand_in=True)
    refused = [f"{name}: refused: {reason}" for name, reason in plan.refused.items()]
    trunk = plan.trunk
    if trunk.answers is None and trunk.folder is None and not trunk.reused:
        raise UserError("; ".join([NO_PROMPTS, *refused]))
    return trunk_table(plan, artifacts), [*elicitation_lines(manifest, artifacts, _digest), *refused]


def exit_code(report: Report) -> int:
    """1 when a target was refused or failed, else 0."""
    return int(report.count("refused") + report.count("failed") > 0)


def _digest(spec: TargetSpec) -> str:
    from farm.target.load import target_digest

    return target_digest(spec)


def _plan(manifest: Manifest, artifacts: Artifacts, say: Say) -> Plan:
    """The plan, once every target has prompts."""
    manifest = with_templates(manifest)
    failures = elicit_prompts(manifest, artifacts, _digest, say)
    plan = make_plan(manifest, artifacts, _digest)
    return replace(plan, refused=plan.refused | failures)


def _run_stages(run: Run) -> None:
    """The stages from the trunk on. What breaks the trunk fails every target that waited for it.

    A mistake of the user in what all share is raised after that, since no target can be onboarded.
    """
    try:
        trunk = prepare_trunk(run)
        measure_base(run, trunk)
        skip_good_enough(run, trunk)
    except Exception as error:
        for target in run.remaining:
            run.fail(target.name, error)
        if isinstance(error, UserError):
            raise
        return
    _put_family(run, trunk)
    try:
        select_prompts(run)
        regenerate_answers(run, trunk)
        select_answers(run, trunk)
        adapt(run, trunk)
    finally:
        close_trunk(trunk.key)  # its actor is detached: it would outlive this run
    evaluate(run, trunk)


def _put_family(run: Run, trunk: Artifact) -> None:
    """Serving knows the family before its first adapter goes live.

    A target that is refused this time, for its prompts perhaps, is served on where it has a live version.
    """
    from farm.draft.checkpoint import read_config

    draft = read_config(run.artifacts.folder(trunk)).to_dict()
    refused = (name for name, row in run.ended.items() if row.decision == "refused")
    leave_out = {name for name in refused if run.registry.pointer(name).live is None}
    run.registry.put_family(family_record(run.plan, draft, leave_out))


def _report(run: Run) -> Report:
    settings = run.manifest.evaluate
    return Report(
        k=settings.k,
        temperature=settings.temperatures[0],
        threads=settings.threads or os.cpu_count() or 1,
        dtype=run.dtype,
        prompts=max((len(target.held_out) for target in run.plan.targets), default=settings.prompts),
        tau_base_on_base=run.tau_base_on_base,
        targets=tuple(run.ended[spec.name] for spec in run.manifest.targets),
        run_id=run.run_id,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        git_sha=provenance.git_sha(),
        versions=provenance.versions(),
        hardware=provenance.hardware(),
        base=run.manifest.base,
        trunk_key=run.trunk.key,
        stage_seconds=run.stage_seconds,
        curves=run.curves,
    )


def _put_report(store: ObjectStore, report: Report) -> str:
    folder = f"runs/{report.run_id}"
    with tempfile.TemporaryDirectory() as temporary:
        for path in write_report(Path(temporary), report):
            store.put(f"{folder}/{path.name}", path.read_bytes())
    return f"{store.uri}/{folder}"
