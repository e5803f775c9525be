"""One onboarding under way: where it writes, which targets are still in it, what is known of the others."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from farm.artifacts import Artifact, Artifacts
from farm.config import Manifest, Refused, UserError
from farm.evaluate.records import Decision, TargetRow
from farm.fleet.pool import cause_of, describe
from farm.fleet.records import Plan, TargetPlan, TrunkPlan
from farm.fleet.trainers import Attempts
from farm.registry import Registry
from farm.status import StatusBoard
from farm.store import ObjectStore


@dataclass
class Run:
    """The state that the stages share. A target with a row in `ended` takes no further part."""

    run_id: str
    plan: Plan
    store: ObjectStore
    say: Callable[[str], None]
    attempts: Attempts
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)  # of report rows, by target
    ended: dict[str, TargetRow] = field(default_factory=dict)
    answers: dict[str, Artifact] = field(default_factory=dict)
    selections: dict[str, Artifact] = field(default_factory=dict)  # empty where all answers are adapted on
    curves: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"  # that the evaluation decoded in
    stage_seconds: dict[str, float | None] = field(default_factory=dict)  # of what all targets share
    tau_base_on_base: float | None = None

    def __post_init__(self) -> None:
        self.artifacts = Artifacts(self.store)
        self.registry = Registry(self.store)
        self.board = StatusBoard(self.store, self.run_id)
        self.fields.update({target.name: {"stage_seconds": {}} for target in self.plan.targets})

    @property
    def manifest(self) -> Manifest:
        return self.plan.manifest

    @property
    def trunk(self) -> TrunkPlan:
        return self.plan.trunk

    @property
    def remaining(self) -> list[TargetPlan]:
        """Targets without a decision, in the manifest's order."""
        return [target for target in self.plan.targets if target.name not in self.ended]

    def replan(self, target: TargetPlan) -> None:
        """Go on with `target` in place of the plan of the same name."""
        targets = (target if one.name == target.name else one for one in self.plan.targets)
        self.plan = replace(self.plan, targets=tuple(targets))

    def end(self, target: str, decision: Decision, reason: str, error: str | None = None) -> None:
        """Decide a target: its row is complete, its status is final, the others go on."""
        spec = next(spec for spec in self.manifest.targets if spec.name == target)
        known = {"kind": "lora" if spec.lora else "full", **self.fields.get(target, {}), "name": target}
        row = TargetRow(**{**known, "decision": decision, "reason": reason, "error": error})
        self.ended[target] = row
        self.board.update(target, decision=decision, error=error and reason, version=row.adapter_version)
        self.say(f"{target}: {decision}: {reason}")

    def fail(self, target: str, error: BaseException) -> None:
        """Decide a target by what went wrong: `refused` for what the user can mend, else `failed`."""
        decision: Decision = "refused" if isinstance(cause_of(error), Refused) else "failed"
        reason = str(cause_of(error)) if decision == "refused" else describe(error)
        details = "".join(traceback.format_exception_only(error)).strip()
        self.end(target, decision, reason, details)

    @contextmanager
    def alone(self, target: str) -> Iterator[None]:
        """Decide a target whose own artifacts cannot be read inside the block; the others go on."""
        try:
            yield
        except (UserError, OSError) as error:
            self.fail(target, error)

    def took(self, target: str, stage: str, artifact: Artifact) -> None:
        """Note the seconds of a target's stage, those of an earlier run included."""
        self.fields[target]["stage_seconds"][stage] = artifact.manifest.get("seconds")
