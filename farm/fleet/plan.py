"""What an onboarding will do: every stage's key, what the store has already, what each target will run.

Pure: reads the manifest, the checkpoints' digests, the prompts and the store, and starts nothing.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from farm.artifacts import TRUNK as TRUNK
from farm.artifacts import Artifacts, key_of
from farm.config import Manifest, Refused, UserError, dump
from farm.data.chat import read_template
from farm.data.prompts import (
    Prompt,
    PromptSet,
    first_of_equals,
    load_prompts,
    not_held_out,
    split_prompts,
)
from farm.evaluate.templates import base_spec
from farm.fleet.answers import ANSWERS, AnswersJob, answers_key, settings_key
from farm.fleet.chosen import (
    SELECT,
    answers_selection_key,
    answers_to_chosen,
    only_chosen,
    prompts_selection_key,
)
from farm.sections import ProbeSettings, RegenerateSettings, Rows, TargetSpec, TrainSettings
from farm.store import local_copy

ADAPT: Literal["adapt"] = "adapt"
CHECK, PROBE = "check", "probe"
EVALUATE = "evaluate"
PROMPTS, PROMPTS_FILE = "prompts", "prompts.jsonl"
TRUNK_FILE, EXPERT_FILE = "trunk.safetensors", "expert.safetensors"
TRUNK_FILES = ("draft.json", TRUNK_FILE, EXPERT_FILE)
BASE = "(base)"  # no target can have this name
# When a checkpoint is written and how files are called decides nothing about the weights.
_NOT_IN_KEY = {"save_every", "prompts", "rows"}
# Nor do a bound and the way that a step is cut: they are in the key as if they had been left out.
_AS_DEFAULT = {"cached_bytes", "micro_rows"}

Digest = Callable[[TargetSpec], str]


@dataclass(frozen=True)
class TargetPlan:
    """One target's way: its answers, the key of its private expert, the rows kept for the evaluation."""

    spec: TargetSpec
    digest: str  # sha256 of the checkpoint's files
    answers: AnswersJob  # with `select.before` to all prompts until their selection is in the store
    held_out: tuple[Prompt, ...]
    held_out_digest: str
    adapt_key: str
    reused: tuple[str, ...]  # stages whose artifact is in the store
    select_key: str | None = None  # of the rows that are adapted on, or answered at all; None: all
    origins: Mapping[int, str] = field(default_factory=dict)  # of the prompts' rows

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def kind(self) -> str:
        return "lora" if self.spec.lora else "full"


@dataclass(frozen=True)
class TrunkPlan:
    """Where the trunk comes from: the store, a given folder that is copied into it, or training."""

    key: str
    base: TargetSpec
    base_digest: str
    folder: Path | None  # the given trunk; None: trained
    answers: AnswersJob | None  # the base's own answers; None when nothing is to be trained
    held_out: tuple[Prompt, ...]  # not seen by the trunk: for the base draft's tau on the base
    reused: bool


@dataclass(frozen=True)
class Plan:
    manifest: Manifest
    trunk: TrunkPlan
    targets: tuple[TargetPlan, ...]  # those that can be planned, in the manifest's order
    refused: dict[str, str]  # target name -> why not


def make_plan(manifest: Manifest, artifacts: Artifacts, digest: Digest, *, stand_in: bool = False) -> Plan:
    """Plan the manifest against what `artifacts` holds; `digest` gives the sha256 of a checkpoint.

    Prompts that a target has yet to make up are refused, or with `stand_in` planned as so many short ones.

    A target whose checkpoint, prompts or selection cannot be read is refused alone; UserError concerns the
    whole manifest.
    """
    base = base_spec(manifest, BASE)
    base_digest = digest(base)
    drafts: list[TargetPlan] = []
    refused: dict[str, str] = {}
    for spec in manifest.targets:
        try:
            checkpoint = digest(spec)
            prompts = _prompts(manifest, artifacts, spec, checkpoint, stand_in=stand_in)
            drafts.append(_plan_answers(manifest, spec, checkpoint, prompts))
        except (UserError, OSError) as error:
            refused[spec.name] = str(error)
    trunk = _plan_trunk(manifest, artifacts, base, base_digest, drafts)
    targets: list[TargetPlan] = []
    for target in drafts:
        try:
            targets.append(_plan_adapt(manifest, artifacts, trunk, target))
        except (UserError, OSError) as error:
            refused[target.name] = str(error)
    return Plan(manifest, trunk, tuple(targets), refused)


def elicit_key(manifest: Manifest, spec: TargetSpec, digest: str) -> str:
    """The key of the prompts that a target without any makes up."""
    config = dump(manifest.elicit) | {"dtype": manifest.dtype, "engine": manifest.regenerate.engine}
    return key_of(PROMPTS, config | {"template": read_template(spec.chat_template)}, [digest])


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


def probe_key(
    manifest: Manifest,
    plan: TargetPlan | TrunkPlan,
    settings: ProbeSettings,
    trunk_key: str,
    timed_slots: int | None = None,
) -> str:
    """The key of the base draft's tau on a target, or on the base; one that was timed has a key of its own."""
    # What is done with a tau decides nothing about it.
    measured = dump(settings.model_copy(update={"skip_above": None}))
    config = {"settings": measured, "k": manifest.evaluate.k, "dtype": manifest.dtype}
    if timed_slots is not None:
        config["timed_slots"] = timed_slots
    # As with the trunk: a target that is added later must not change what all others are compared with.
    if isinstance(plan, TargetPlan) or manifest.train_trunk.prompts:
        config["prompts"] = [asdict(prompt) for prompt in plan.held_out[: settings.prompts]]
    digest = plan.digest if isinstance(plan, TargetPlan) else plan.base_digest
    return key_of(PROBE, config, [digest, trunk_key])


def check_key(trunk: TrunkPlan, target: TargetPlan) -> str:
    """The key of a passed check that a target belongs to the base's family."""
    return key_of(CHECK, {}, [trunk.base_digest, target.digest])


def _plan_adapt(manifest: Manifest, artifacts: Artifacts, trunk: TrunkPlan, target: TargetPlan) -> TargetPlan:
    settings = _training_key(manifest.adapt)
    target = _plan_selection(manifest, artifacts, trunk, target)
    inputs, select_key = [target.answers.key, trunk.key, target.digest], target.select_key
    if select_key is not None and not manifest.select.before:
        inputs.append(select_key)
    key = key_of(ADAPT, settings, inputs)
    stages = {SELECT: select_key, ANSWERS: target.answers.key, ADAPT: key}
    order = (SELECT, ANSWERS, ADAPT) if manifest.select.before else (ANSWERS, SELECT, ADAPT)
    reused = (stage for stage in order if (of := stages[stage]) is not None and artifacts.find(stage, of))
    return replace(target, adapt_key=key, reused=tuple(reused))


def _training_key(settings: TrainSettings) -> dict[str, Any]:
    """The settings that decide the weights."""
    fields = type(settings).model_fields
    return {
        name: fields[name].default if name in _AS_DEFAULT else value
        for name, value in dump(settings).items()
        if name not in _NOT_IN_KEY
    }


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


def _plan_trunk(
    manifest: Manifest,
    artifacts: Artifacts,
    base: TargetSpec,
    base_digest: str,
    targets: Sequence[TargetPlan],
) -> TrunkPlan:
    prompts, held_out, digests, rows = _base_prompts(manifest, targets)
    folder, answers = None, None
    if manifest.trunk is not None:
        folder = local_copy(manifest.trunk)
        key = key_of(TRUNK, {}, [base_digest, _folder_digest(folder)])
    else:
        settings = manifest.train_trunk
        regenerate = _base_regenerate(manifest)
        config = _training_key(settings) | {
            "draft": dump(manifest.draft),
            "regenerate": settings_key(regenerate),
            "dtype": manifest.dtype,
        }
        # Without prompts of its own, a trunk is trained once on those of the targets known then: a target
        # that is added later must not change the trunk that all others were adapted to.
        own = [*digests, rows] if settings.prompts else []
        key = key_of(TRUNK, config | {"own": own}, [base_digest])
        joined = key_of("prompts", {}, digests)
        source = {"target_digest": base_digest, "prompts_digest": joined, "row_errors": []}
        mode, dtype = settings.answers, manifest.dtype
        answers_id = answers_key(base, regenerate, mode, dtype, base_digest, prompts, joined)
        answers = AnswersJob(base, regenerate, answers_id, prompts, mode, dtype, source)
    reused = artifacts.find(TRUNK, key) is not None
    return TrunkPlan(
        key, base, base_digest, folder, answers if prompts and not reused else None, held_out, reused
    )


def _base_prompts(
    manifest: Manifest, targets: Sequence[TargetPlan]
) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...], list[str], Rows | None]:
    """Prompts for the trunk, prompts held out from it, the digests of their sources, the rows of its own source."""
    settings, wanted = manifest.train_trunk, manifest.evaluate.prompts
    each = -(-wanted // max(1, len(targets)))
    held_out = tuple(prompt for target in targets for prompt in target.held_out[:each])[:wanted]
    # What is held out for one target stays out of the trunk, which drafts for all, whoever else asks it.
    measured_on = [prompt for target in targets for prompt in target.held_out]
    if not settings.prompts:
        asked = first_of_equals(prompt for target in targets for prompt in target.answers.prompts)
        # Rows are numbered anew: each source counts its own from 0.
        numbered = enumerate(not_held_out(asked, measured_on))
        prompts = tuple(replace(prompt, row=row) for row, prompt in numbered)
        return prompts, held_out, [target.held_out_digest for target in targets], None
    found = load_prompts(settings.prompts)
    rows = settings.rows or (0, max(1, found.num_rows - wanted))
    used = range(found.num_rows)[slice(*rows)]
    outside = tuple(prompt for prompt in found.prompts if prompt.row not in used)[-wanted:]
    prompts = tuple(prompt for prompt in found.prompts if prompt.row in used)
    if not prompts:
        raise UserError(f"train_trunk.rows: selects none of the {found.num_rows} rows of {found.source}")
    return not_held_out(prompts, [*measured_on, *outside]), outside or held_out, [found.digest], rows


def _base_regenerate(manifest: Manifest) -> RegenerateSettings:
    settings = manifest.train_trunk
    return manifest.regenerate.model_copy(
        update={
            "rows": None,
            "engine": "farm",
            "draft": "off",  # there is no trunk yet
            "max_new_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "greedy_share": settings.greedy_share,
            "seed": settings.seed,
        }
    )


def _folder_digest(folder: Path) -> str:
    """Names the content of a given trunk's folder."""
    digest = hashlib.sha256()
    for name in TRUNK_FILES:
        path = folder / name
        if not path.is_file():
            raise UserError(f"trunk: {path} does not exist; give a folder that `farm train-trunk` wrote")
        digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()
