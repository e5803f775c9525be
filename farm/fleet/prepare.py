"""What comes before a target's own stages: who may join, the trunk, how good the base draft is on the
base.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from farm.artifacts import TRUNK, Artifact
from farm.config import UserError, dump
from farm.fleet import measure
from farm.fleet.answers import endpoint_key, feature_shards, finish_answers, missing_shards
from farm.fleet.datasets import regenerate
from farm.fleet.pool import cause_of, run_bounded
from farm.fleet.records import TargetPlan, TrunkPlan
from farm.fleet.run import Run
from farm.fleet.stage_keys import CHECK, PROBE, TRUNK_FILES, check_key, probe_key
from farm.fleet.trainers import TrainJob, train
from farm.fleet.trunk_plan import NO_PROMPTS
from farm.fleet.vocabulary import choose_vocabulary, token_files
from farm.sections import ProbeSettings, TargetSpec
from farm.store import local_copy

CHECKS_AT_ONCE = 2


def check_targets(run: Run) -> None:
    """Refuse every target that is no member of the base's family; a passed check is kept."""
    specs = {}
    for target in run.remaining:
        key = check_key(run.trunk, target)
        if run.artifacts.find(CHECK, key) is None:
            run.board.update(target.name, stage="check")
            specs[target.name] = (run.store.uri, key, run.trunk.base, target.spec)
    for outcome in run_bounded(specs, measure.check, CHECKS_AT_ONCE):
        if outcome.error is not None:
            run.fail(outcome.name, outcome.error)
    _check_endpoints(run)


def _check_endpoints(run: Run) -> None:
    """Refuse every target whose answers would come from an endpoint that cannot give them, before anything costs."""
    if run.manifest.regenerate.engine == "farm":
        return
    jobs = [target.answers for target in run.remaining]
    jobs = [job for job in jobs if missing_shards(run.artifacts, job)]
    if not jobs:
        return  # nor is its key needed
    key = endpoint_key(run.manifest.regenerate)
    specs = {job.name: (replace(job, prompts=job.prompts[:1]), key) for job in jobs}
    for outcome in run_bounded(specs, measure.check_endpoint, CHECKS_AT_ONCE):
        if outcome.error is not None:
            run.fail(outcome.name, outcome.error)


def prepare_trunk(run: Run) -> Artifact:
    """The trunk's artifact: found, copied from the given folder, or trained on the base's own answers."""
    found = run.artifacts.find(TRUNK, run.trunk.key)
    if found is None and run.trunk.folder is not None:
        files = {name: run.trunk.folder / name for name in TRUNK_FILES}
        found = run.artifacts.write(TRUNK, run.trunk.key, files, {"copied_from": str(run.trunk.folder)})
    if found is None:
        for target in run.remaining:
            run.board.update(target.name, stage="trunk")
        found = _train_trunk(run)
    if "seconds" in found.manifest:
        run.stage_seconds["trunk"] = found.manifest["seconds"]
        run.stage_seconds["trunk answers"] = found.manifest.get("answers_seconds")
    return found


def _train_trunk(run: Run) -> Artifact:
    job = run.trunk.answers
    if job is None:
        raise UserError(NO_PROMPTS)
    run.say(f"trunk: {len(job.prompts)} prompts to {job.spec.model}")
    failures = regenerate([job], run.store.uri, run.manifest.resources.regenerate)
    if failures:
        raise RuntimeError(f"the base's answers failed: {failures[job.name]}")
    answers = finish_answers(run.artifacts, job)
    shards = feature_shards(answers, run.artifacts)
    settings = run.manifest.train_trunk
    fitted = TrainJob(
        name="base",
        stage="trunk",
        key=run.trunk.key,
        task=_trunk_task(run, shards, choose_vocabulary(token_files(shards), run.manifest.draft.vocabulary)),
        store=run.store.uri,
        trunk=None,
        resources=run.manifest.resources.adapt,
        attempts=run.attempts,
        shown_as=(run.run_id, tuple(target.name for target in run.remaining)),
        record={
            "settings": dump(settings),
            "answers_key": job.key,
            "answers_seconds": answers.manifest["seconds"],
            "trained_tokens": answers.manifest["answer_tokens"] * settings.epochs,
        },
    )
    run.say(f"trunk: training on {answers.manifest['answer_tokens']} tokens")
    (outcome,) = run_bounded({"trunk": (fitted,)}, train, 1, max_retries=run.attempts.driver)
    if outcome.error is not None:
        raise cause_of(outcome.error)
    trained: Artifact = outcome.value
    return trained


def _trunk_task(run: Run, shards: tuple[str, ...], vocabulary: tuple[int, ...] | None) -> Any:
    from farm.draft.config import DraftConfig
    from farm.train.loop import FitTask

    sizes = run.manifest.draft
    return FitTask(
        kind="trunk",
        settings=run.manifest.train_trunk,
        draft=DraftConfig.for_base(_base_config(run.trunk.base), sizes.shared_width, sizes.private_width),
        target=run.trunk.base,
        shards=shards,
        expert=None,
        vocabulary=vocabulary,
        dtype=run.manifest.dtype,
    )


def _base_config(base: TargetSpec) -> Any:
    from transformers import AutoConfig

    path = local_copy(base.model)
    if path.suffix == ".gguf":
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    return AutoConfig.from_pretrained(path)


def measure_base(run: Run, trunk: Artifact) -> None:
    """tau of the base draft on the base, on prompts that the trunk never saw: what retention is a share
    of.
    """
    if not run.trunk.held_out:
        return  # no target can be used, each with its reason, and the trunk has no prompts of its own
    settings = run.manifest.evaluate
    like_evaluation = ProbeSettings(prompts=settings.prompts, max_new_tokens=settings.max_new_tokens)
    for tau in _probe(run, trunk, {run.trunk.base.name: (run.trunk, like_evaluation)}).values():
        run.tau_base_on_base = tau


def skip_good_enough(run: Run, trunk: Artifact) -> None:
    """Leave out targets on which the base draft keeps more than `probe.skip_above` of its tau on the base."""
    settings = run.manifest.probe
    if settings.skip_above is None:
        return
    base = run.trunk.base.name
    plans: dict[str, tuple[TargetPlan | TrunkPlan, ProbeSettings]] = {base: (run.trunk, settings)}
    plans |= {target.name: (target, settings) for target in run.remaining}
    taus = _probe(run, trunk, plans)
    for name, tau in taus.items():
        if name != base and base in taus and tau / taus[base] > settings.skip_above:
            share = tau / taus[base]
            run.fields[name] |= {"tau_base_draft": tau, "retention": share}
            run.end(
                name,
                "skipped",
                f"the base draft keeps {share:.0%} of its tau, above {settings.skip_above:.0%}",
            )


def _probe(
    run: Run, trunk: Artifact, plans: Mapping[str, tuple[TargetPlan | TrunkPlan, ProbeSettings]]
) -> dict[str, float]:
    """tau of the base draft by target; a target that cannot be measured is decided and left out."""
    folder = run.artifacts.folder_location(trunk)
    specs, taus = {}, {}
    num_gpus = run.manifest.resources.regenerate.num_gpus
    for name, (plan, settings) in plans.items():
        spec = plan.base if isinstance(plan, TrunkPlan) else plan.spec
        prompts = plan.held_out[: settings.prompts]
        key = probe_key(run.manifest, plan, settings, trunk.key)
        if (found := run.artifacts.find(PROBE, key)) is not None:
            taus[name] = float(found.manifest["tau"])
            continue
        if isinstance(plan, TargetPlan):
            run.board.update(name, stage="probe")
        specs[name] = (
            run.store.uri,
            key,
            spec,
            folder,
            prompts,
            (settings, run.manifest.evaluate),
            run.manifest.dtype,
        )
    for outcome in run_bounded(specs, measure.probe_tau, CHECKS_AT_ONCE, num_gpus=num_gpus):
        if outcome.error is None:
            taus[outcome.name] = float(outcome.value.manifest["tau"])
        elif outcome.name == run.trunk.base.name:
            raise cause_of(outcome.error)
        else:
            run.fail(outcome.name, outcome.error)
    return taus
