"""Names of stages and of their files; keys of made-up prompts, checks, probes and what decides trained weights."""

from dataclasses import asdict
from typing import Any, Literal

from farm.artifacts import key_of
from farm.config import Manifest, dump
from farm.data.chat import read_template
from farm.fleet.records import TargetPlan, TrunkPlan
from farm.sections import ProbeSettings, TargetSpec, TrainSettings

ADAPT: Literal["adapt"] = "adapt"
CHECK, PROBE = "check", "probe"
EVALUATE = "evaluate"
PROMPTS, PROMPTS_FILE = "prompts", "prompts.jsonl"
TRUNK_FILE, EXPERT_FILE = "trunk.safetensors", "expert.safetensors"
TRUNK_FILES = ("draft.json", TRUNK_FILE, EXPERT_FILE)
# When a checkpoint is written and how files are called decides nothing about the weights.
_NOT_IN_KEY = {"save_every", "prompts", "rows"}
# Nor do a bound and the way that a step is cut: they are in the key as if they had been left out.
_AS_DEFAULT = {"cached_bytes", "micro_rows"}


def elicit_key(manifest: Manifest, spec: TargetSpec, digest: str) -> str:
    """The key of the prompts that a target without any makes up."""
    config = dump(manifest.elicit) | {"dtype": manifest.dtype, "engine": manifest.regenerate.engine}
    return key_of(PROMPTS, config | {"template": read_template(spec.chat_template)}, [digest])


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
    if temperature := manifest.evaluate.temperatures[0]:
        config |= {"temperature": temperature, "seed": manifest.evaluate.seed}
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


def training_key(settings: TrainSettings) -> dict[str, Any]:
    """The settings that decide the weights."""
    fields = type(settings).model_fields
    return {
        name: fields[name].default if name in _AS_DEFAULT else value
        for name, value in dump(settings).items()
        if name not in _NOT_IN_KEY
    }
