"""What an onboarding will do: every stage's key, what the store has already, what each target will run.

Pure: reads the manifest, the checkpoints' digests, the prompts and the store, and starts nothing.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from farm.artifacts import Artifacts, key_of
from farm.config import Manifest, Refused, UserError
from farm.data.prompts import Prompt, PromptSet, load_prompts, split_prompts
from farm.evaluate.gate import LEAST_PROMPTS
from farm.evaluate.templates import base_spec
from farm.fleet.answers import ANSWERS, AnswersJob, answers_key
from farm.fleet.chosen import (
    SELECT,
    answers_selection_key,
    answers_to_chosen,
    only_chosen,
    prompts_selection_key,
)
from farm.fleet.records import Plan, TargetPlan, TrunkPlan
from farm.fleet.stage_keys import ADAPT, PROMPTS, PROMPTS_FILE, elicit_key, training_key
from farm.fleet.trunk_plan import plan_trunk
from farm.sections import TargetSpec

BASE = "(base)"  # no target can have this name

Digest = Callable[[TargetSpec], str]


def make_plan(manifest: Manifest, artifacts: Artifacts, digest: Digest, *, stand_in: bool = False) -> Plan:
    """Plan the manifest against what `artifacts` holds; `digest` gives the sha256 of a checkpoint.

    Prompts that a target has yet to make up are refused, or with `stand_in` planned as so many short ones.

    A target whose checkpoint, prompts or selection cannot be read is refused alone; UserError concerns the
    whole manifest.
    """
    base = base_spec(manifest, BASE)
    # Without a template that targets lend it: one that is added, or cannot be read today, must not change the trunk.
    base_digest = digest(base.model_copy(update={"chat_template": None}))
    drafts: list[TargetPlan] = []
    refused: dict[str, str] = {}
    for spec in manifest.targets:
        try:
            checkpoint = digest(spec)
            prompts = _prompts(manifest, artifacts, spec, checkpoint, stand_in=stand_in)
            drafts.append(_plan_answers(manifest, spec, checkpoint, prompts))
        except (UserError, OSError) as error:
            refused[spec.name] = str(error)
    trunk = plan_trunk(manifest, artifacts, base, base_digest, drafts)
    targets: list[TargetPlan] = []
    for target in drafts:
        try:
            targets.append(_plan_adapt(manifest, artifacts, trunk, target))
        except (UserError, OSError) as error:
            refused[target.name] = str(error)
    return Plan(manifest, trunk, tuple(targets), refused)


def _prompts(
    manifest: Manifest, artifacts: Artifacts, spec: TargetSpec, digest: str, *, stand_in: bool
) -> PromptSet:
    """The given prompts, else those that the target has made up."""
    if spec.prompts:
        return load_prompts(spec.prompts)
    made = artifacts.find(PROMPTS, elicit_key(manifest, spec, digest))
    if made is not None:
        return load_prompts(artifacts.location(made, PROMPTS_FILE))
    if not stand_in:
        raise Refused("it has no prompts; `farm onboard` has it make some up, or give it a file")
    rows = range(manifest.elicit.prompts)
    texts = [f"{spec.name} {row}" for row in rows]  # no two targets make up the same
    prompts = tuple(
        Prompt(row, text, ({"role": "user", "content": text},), None) for row, text in enumerate(texts)
    )
    return PromptSet("", "", prompts, (), len(prompts), dict.fromkeys(rows, ""))


def _plan_answers(manifest: Manifest, spec: TargetSpec, digest: str, found: PromptSet) -> TargetPlan:
    """The target with its rows split for adapting and evaluating; keys that need the trunk are empty."""
    try:
        split = split_prompts(
            found, manifest.regenerate.rows, manifest.evaluate.rows, manifest.evaluate.prompts
        )
    except UserError as error:
        raise Refused(f"{found.source}: {error}") from error
    if not split.prompts or not split.held_out:
        which = "held out" if split.prompts else "to adapt on"
        why = "".join(f" (row {error.row} {error.reason})" for error in split.errors[:1] if not split.prompts)
        raise Refused(f"{found.source}: no usable row {which}{why}; repair its rows")
    if len(split.held_out) < LEAST_PROMPTS:
        raise Refused(
            f"{found.source}: {len(split.held_out)} usable row held out, {LEAST_PROMPTS} are needed to tell a gain "
            "from noise; raise evaluate.prompts, widen evaluate.rows, or repair its rows"
        )
    key = answers_key(
        spec, manifest.regenerate, "regenerate", manifest.dtype, digest, split.prompts, found.digest
    )
    source: dict[str, Any] = {
        "target_digest": digest,
        "prompts": found.source,
        "prompts_digest": found.digest,
        "row_errors": [asdict(error) for error in split.errors],
    }
    if not spec.prompts:
        source["prompts_key"] = elicit_key(manifest, spec, digest)  # so that cleaning up keeps them
    selected = manifest.select.strategy != "all" and not manifest.select.before
    answers = AnswersJob(
        spec, manifest.regenerate, key, split.prompts, dtype=manifest.dtype, source=source, selected=selected
    )
    return TargetPlan(
        spec, digest, answers, split.held_out, found.digest, adapt_key="", reused=(), origins=found.origins
    )


def _plan_adapt(manifest: Manifest, artifacts: Artifacts, trunk: TrunkPlan, target: TargetPlan) -> TargetPlan:
    settings = training_key(manifest.adapt)
    target = _plan_selection(manifest, artifacts, trunk, target)
    inputs, select_key = [target.answers.key, trunk.key, target.digest], target.select_key
    if select_key is not None and not manifest.select.before:
        inputs.append(select_key)
    key = key_of(ADAPT, settings, inputs)
    stages = {SELECT: select_key, ANSWERS: target.answers.key, ADAPT: key}
    order = (SELECT, ANSWERS, ADAPT) if manifest.select.before else (ANSWERS, SELECT, ADAPT)
    reused = (stage for stage in order if (of := stages[stage]) is not None and artifacts.find(stage, of))
    return replace(target, adapt_key=key, reused=tuple(reused))


def _plan_selection(
    manifest: Manifest, artifacts: Artifacts, trunk: TrunkPlan, target: TargetPlan
) -> TargetPlan:
    """With the key of its selection; a finished one of prompts leaves only those that it chose."""
    answers, origins, digests = target.answers, target.origins, [trunk.base_digest, target.digest]
    key = prompts_selection_key(manifest, answers, origins, [target.held_out_digest, *digests])
    if key is None:
        key = answers_selection_key(manifest, answers, origins, [trunk.key, *digests])
        return replace(target, select_key=key)
    answers, found = answers_to_chosen(answers, key), artifacts.find(SELECT, key)
    if found is not None:
        answers = only_chosen(answers, artifacts, found)
    return replace(target, answers=answers, select_key=key)
