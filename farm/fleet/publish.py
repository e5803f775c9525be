"""The gate: an adapter is published once, and made live only when its gain is proven.

Rests on the registry alone, so that a run that was killed between any two steps can be repeated.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from farm.artifacts import Artifact, Artifacts, key_of
from farm.card import Fit, config_digest, tokenizer_digest, vocabulary_digest
from farm.config import Manifest, UserError, dump
from farm.data.chat import read_template
from farm.evaluate.gate import promotes
from farm.evaluate.provenance import git_sha, versions
from farm.evaluate.records import Decision
from farm.fleet.records import Plan, TargetPlan
from farm.fleet.stage_keys import ADAPT, EVALUATE, EXPERT_FILE, TRUNK_FILE
from farm.registry import Pointer, Registry, Version
from farm.sections import TargetSpec


@dataclass(frozen=True)
class Verdict:
    decision: Decision
    reason: str
    version: str | None = None


def opponent_of(registry: Registry, target: str, adapt_key: str, trunk_key: str) -> Version | None:
    """The version a new adapter has to beat: the live one, or None for the base draft.

    An adapter of another trunk is no opponent. For the adapter that is live itself, it is the one that was
    beaten, so that the evaluation which promoted it is found again.
    """
    live = registry.live(target)
    if live is None or live.card["trunk_key"] != trunk_key:
        return None
    if live.card["adapt_key"] != adapt_key:
        return live
    beaten = live.card["opponent"]
    return next((version for version in registry.versions(target) if version.version == beaten), None)


def evaluation_key(manifest: Manifest, target: TargetPlan, opponent: Version | None) -> str:
    """The key of a target's evaluation against `opponent`; what the gate does with its figures decides none of them."""
    settings = dump(manifest.evaluate)
    config = {name: value for name, value in settings.items() if name not in ("min_gain", "rows", "prompts")}
    config |= {"dtype": manifest.dtype, "held_out": [asdict(prompt) for prompt in target.held_out]}
    against = opponent.card["adapt_key"] if opponent else "base draft"
    return key_of(EVALUATE, config, [target.adapt_key, against, target.digest])


def family_fit(artifacts: Artifacts, plan: Plan, trunk: Artifact) -> Fit:
    """What every adapter over this trunk has to find again where it is loaded."""
    from farm.draft.checkpoint import read_config, read_tensors, split_vocabulary
    from farm.target.load import load_tokenizer

    folder = artifacts.folder(trunk)
    config, kept = read_config(folder), split_vocabulary(read_tensors(folder / TRUNK_FILE))[1]
    return Fit(
        trunk_key=trunk.key,
        trunk_digest=trunk.manifest["files"][TRUNK_FILE]["sha256"],
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        vocabulary_digest=vocabulary_digest(None if kept is None else kept.tolist()),
        tokenizer_digest=tokenizer_digest(load_tokenizer(plan.manifest.base).get_vocab()),
    )


def publish(
    registry: Registry, artifacts: Artifacts, plan: Plan, target: TargetPlan, evaluation: Artifact, fit: Fit
) -> Verdict:
    """Publish the adapter unless it is there, and promote it when the gate lets it pass."""
    # Before all else: what another run does after this look is seen below, or stops the promotion.
    pointer = registry.pointer(target.name)
    opponent = opponent_of(registry, target.name, target.adapt_key, plan.trunk.key)
    # By the key: under another name of the target, or published again, the same adapter has another number.
    is_current = evaluation.key == evaluation_key(plan.manifest, target, opponent)
    published = _published(registry, target)
    if not published:
        opponent_name = opponent.version if opponent else None
        against = opponent_name if is_current else evaluation.manifest["opponent"]
        published = [_publish(registry, artifacts, plan, target, evaluation, fit, against)]
    if pointer.live in published:
        least = plan.manifest.evaluate.min_gain
        return Verdict("promoted", f"live since it was promoted: gain above {least:g}", pointer.live)
    version, interval = published[-1], evaluation.manifest["row"]["gain_interval"]
    reason = _kept(plan.manifest, pointer, published, target, interval)
    if reason is not None:
        return Verdict("kept", reason, version)
    if is_current and registry.promote(target.name, version, pointer.live):
        return Verdict("promoted", f"gain in tau is above {interval[0]:.3f} with 95 % confidence", version)
    return Verdict("kept", "the live version moved meanwhile; run again to compare with it", version)


def _kept(
    manifest: Manifest,
    pointer: Pointer,
    published: Sequence[str],
    target: TargetPlan,
    interval: Any,  # as a report's row has it
) -> str | None:
    """Why an adapter, of which these versions are published, is not promoted; None where nothing speaks against it."""
    least = manifest.evaluate.min_gain
    measured = interval is not None and None not in interval
    if not (measured and promotes(interval, least)):
        low = f"{interval[0]:.3f}" if measured else "unknown"
        return f"lower bound of the gain in tau is {low}, not above {least:g}"
    withdrawn = (
        one for one in pointer.withdrawn if one.version in published or one.adapt_key == target.adapt_key
    )
    ended = next(withdrawn, None)
    if ended is None:
        return None
    version = ended.version if ended.version in published else published[-1]  # the former may be deleted
    again = f"`farm registry promote {target.name} {version}` makes it live all the same"
    return f"{ended.version} was rolled back ({ended.reason}); {again}"


def _published(registry: Registry, target: TargetPlan) -> list[str]:
    """Versions that have this adapter, oldest first: two runs at once may each have published it."""
    versions = registry.versions(target.name)
    return [one.version for one in versions if one.card.get("adapt_key") == target.adapt_key]


def _publish(
    registry: Registry,
    artifacts: Artifacts,
    plan: Plan,
    target: TargetPlan,
    evaluation: Artifact,
    fit: Fit,
    opponent: str | None,
) -> str:
    adapted = artifacts.find(ADAPT, target.adapt_key)
    assert adapted is not None  # an evaluation exists only of a finished adapter
    config = {
        name: dump(getattr(plan.manifest, name)) for name in ("regenerate", "select", "adapt", "evaluate")
    }
    version = registry.publish(
        target.name,
        {EXPERT_FILE: artifacts.path(adapted, EXPERT_FILE).read_bytes()},
        {
            **fit.model_dump(),
            "adapt_key": target.adapt_key,
            "tier": plan.manifest.adapt.tier,
            "answers_key": target.answers.key,
            "select_key": target.select_key,
            "evaluate_key": evaluation.key,
            "base_digest": plan.trunk.base_digest,
            "target_digest": target.digest,
            "opponent": opponent,
            "evaluation": evaluation.manifest["row"],
            "config": config,
            "config_digest": config_digest(config),
            "git_sha": git_sha(),
            "library_versions": versions(),
        },
    )
    return version.version


def family_record(plan: Plan, draft: Mapping[str, Any], leave_out: Collection[str]) -> dict[str, Any]:
    """What serving needs of this family; targets in `leave_out` are not served."""
    fields = ("model", "lora", "revision")
    return {
        "base": plan.manifest.base,
        "dtype": plan.manifest.dtype,
        "trunk_key": plan.trunk.key,
        "draft": dict(draft),
        "targets": {
            spec.name: {field: getattr(spec, field) for field in fields} | {"chat_template": _template(spec)}
            for spec in plan.manifest.targets
            if spec.name not in leave_out
        },
    }


def _template(spec: TargetSpec) -> str | None:
    """The template itself: its file may lie in a job's copy of the working directory, which goes with the job."""
    try:
        return read_template(spec.chat_template)
    except UserError:  # the target is refused for it; a live version of it stays in the record
        return spec.chat_template
