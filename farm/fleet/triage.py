"""Triage of a family: what each target's base draft is worth now, and what adapting it would bring. Needs no Ray.

Probes run in this process, one target after the other, and are artifacts: a second look costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from farm.artifacts import TRUNK, Artifact, Artifacts
from farm.config import Manifest, Refused, UserError
from farm.evaluate.history import read_history, typical_cost
from farm.evaluate.templates import with_templates
from farm.evaluate.triage import (
    SERVED_TOKENS,
    Cost,
    Past,
    Seen,
    Verdict,
    decide,
    line,
    offers,
)
from farm.fleet.estimate import (
    Rates,
    estimate_answers,
    estimate_training,
    planned_epochs,
    read_rates,
    rows_to_answer,
    rows_to_train,
)
from farm.fleet.plan import make_plan
from farm.fleet.records import Plan, TargetPlan, TrunkPlan
from farm.fleet.stage_keys import ADAPT, CHECK, PROBE, check_key, probe_key
from farm.sections import ProbeSettings
from farm.store import open_store

PROBE_PROMPTS = 32  # a target


@dataclass(frozen=True)
class Triage:
    """Verdicts in the manifest's order; why the other targets have none; how many past adaptations were known."""

    verdicts: tuple[Verdict, ...]
    refused: dict[str, str]
    num_past: int


def triage(
    manifest: Manifest,
    *,
    prompts: int = PROBE_PROMPTS,
    served_tokens: float = SERVED_TOKENS,
    progress: Callable[[str, int, int], None] | None = None,
) -> Triage:
    """Probe the base and every target, and decide for each; `progress(name, done, of all)`.

    Raises UserError when there is no trunk yet. A target that does not fit the base is refused alone.
    """
    from farm.target.load import target_digest

    artifacts = Artifacts(open_store(manifest.store))
    plan = make_plan(with_templates(manifest), artifacts, target_digest)
    if not plan.targets:
        return Triage((), plan.refused, len(read_history(artifacts.store)))
    probes = _Probes(plan, artifacts, _trunk_folder(plan, artifacts), _settings(manifest, prompts))
    history, rates = read_history(artifacts.store), read_rates(plan, artifacts)
    verdicts, refused, total = [], dict(plan.refused), len(plan.targets) + 1
    base = Seen.of_probe(probes.of(plan.trunk).manifest)
    for done, target in enumerate(plan.targets, 1):
        if progress is not None:
            progress(target.name, done, total)
        try:
            seen = Seen.of_probe(probes.of(target).manifest)
        except Refused as error:
            refused[target.name] = str(error)
            continue
        verdicts.append(_verdict(plan, target, seen, base.tau, history, rates, served_tokens))
    if progress is not None:
        progress("", total, total)
    return Triage(tuple(verdicts), refused, len(history))


def planned_lines(plan: Plan, artifacts: Artifacts) -> list[str]:
    """One line a target from what the store knows already: a probe, or an earlier run's evaluation."""
    history, rates = read_history(artifacts.store), read_rates(plan, artifacts)
    settings = _settings(plan.manifest, PROBE_PROMPTS)
    found_base = _find_probe(plan, artifacts, plan.trunk, settings)
    lines = []
    for target in plan.targets:
        if ADAPT in target.reused:
            lines.append(f"{target.name}: adapted already")
            continue
        found = _find_probe(plan, artifacts, target, settings)
        earlier = [past for past in history if past.target == target.name]
        if found is not None and found_base is not None:
            seen, tau_base = Seen.of_probe(found.manifest), float(found_base.manifest["tau"])
        elif earlier:
            past = earlier[-1]
            seen, tau_base = Seen(past.tau_before, past.plain_s, past.round_s), past.tau_base
        else:
            lines.append(f"{target.name}: not probed; `farm probe` says whether adapting it pays")
            continue
        lines.append(line(_verdict(plan, target, seen, tau_base, history, rates, SERVED_TOKENS)))
    return lines


class _Probes:
    """Finds a probe in the store, or runs it and keeps it."""

    def __init__(self, plan: Plan, artifacts: Artifacts, folder: Path, settings: ProbeSettings) -> None:
        self._plan, self._artifacts, self._folder, self._settings = plan, artifacts, folder, settings

    def of(self, member: TargetPlan | TrunkPlan) -> Artifact:
        """Raises Refused for a target that cannot be loaded, or is no member of the base's family."""
        from farm.evaluate.probe import probe

        found = _find_probe(self._plan, self._artifacts, member, self._settings)
        if found is not None:
            return found
        spec = member.base if isinstance(member, TrunkPlan) else member.spec
        if isinstance(member, TargetPlan):
            self._check(member)
        manifest, slots = self._plan.manifest, self._plan.manifest.serve.num_slots
        result = probe(
            spec, self._folder, member.held_out, self._settings, manifest.evaluate, manifest.dtype,
            timed_slots=slots,
        )  # fmt: skip
        key = _key(self._plan, member, self._settings)
        return self._artifacts.finish(PROBE, key, {"target": spec.name, **asdict(result)})

    def _check(self, target: TargetPlan) -> None:
        from farm.evaluate.probe import check_target

        key = check_key(self._plan.trunk, target)
        if self._artifacts.find(CHECK, key) is None:
            check_target(self._plan.trunk.base, target.spec)
            self._artifacts.finish(CHECK, key, {"target": target.name})


def _settings(manifest: Manifest, prompts: int) -> ProbeSettings:
    return manifest.probe.model_copy(update={"prompts": prompts, "skip_above": None})


def _key(plan: Plan, member: TargetPlan | TrunkPlan, settings: ProbeSettings) -> str:
    return probe_key(plan.manifest, member, settings, plan.trunk.key, plan.manifest.serve.num_slots)


def _find_probe(
    plan: Plan, artifacts: Artifacts, member: TargetPlan | TrunkPlan, settings: ProbeSettings
) -> Artifact | None:
    return artifacts.find(PROBE, _key(plan, member, settings))


def _trunk_folder(plan: Plan, artifacts: Artifacts) -> Path:
    found = artifacts.find(TRUNK, plan.trunk.key)
    if found is not None:
        return artifacts.folder(found)
    if plan.trunk.folder is not None:
        return plan.trunk.folder
    raise UserError(
        "there is no trunk to probe with; run `farm train-trunk` on this manifest, or give it a trunk"
    )


def _verdict(
    plan: Plan,
    target: TargetPlan,
    seen: Seen,
    tau_base: float,
    history: Sequence[Past],
    rates: Rates,
    served_tokens: float,
) -> Verdict:
    made = offers(seen, tau_base, _cost(plan, target, rates, history), target.kind, history)
    return decide(target.name, seen, tau_base, made, served_tokens, plan.manifest.probe.skip_above)


def _cost(plan: Plan, target: TargetPlan, rates: Rates, history: Sequence[Past]) -> Cost:
    """What adapting a target takes from its prompts on: as past runs did, else as the plan's estimate says."""
    rows, trained = rows_to_answer(plan, target), rows_to_train(plan, target)
    known = typical_cost(history, target.kind, rows, trained)
    if known is not None:
        return known
    longest = target.answers.settings.max_new_tokens
    training = estimate_training(trained, longest, planned_epochs(plan, target), rates)
    return Cost(estimate_answers(target.answers, rates, rows).seconds, training.seconds)
