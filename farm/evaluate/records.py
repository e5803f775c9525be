"""The records of a report: what one run measured and decided, as `report.json` holds it.

`tau`, `survival` and `alpha` are defined in `docs/method.md`. A figure that was not measured (a refused,
failed or skipped target, an arm that was left out) is None, never 0 and never NaN: JSON has no NaN.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from farm.sections import Strict

Decision = Literal["promoted", "kept", "skipped", "refused", "failed"]


def _finite_or_none(value: Any) -> Any:
    """NaN and infinities become None, so that every report that can be built can be written and read back."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


Figure = Annotated[float | None, BeforeValidator(_finite_or_none)]
Interval = tuple[Figure, Figure]  # lower, upper


class Sampled(Strict):
    """The tau measures of one target at temperature 1. Lists run over draft positions 1..k."""

    tau_base_draft: Figure = None
    tau_adapted: Figure = None
    survival_base_draft: tuple[Figure, ...] = ()
    survival_adapted: tuple[Figure, ...] = ()
    alpha_base_draft: tuple[Figure, ...] = ()
    alpha_adapted: tuple[Figure, ...] = ()


class FinishReasons(Strict):
    """How the regenerated answers ended, in rows."""

    stop: int = 0
    length: int = 0
    error: int = 0


class TargetRow(Strict):
    """One target of the report. Lists run over draft positions 1..k; speeds are tokens / wall second."""

    name: str
    kind: str  # "full" or "lora"
    decision: Decision
    reason: str = ""
    tau_base_draft: Figure = None
    tau_adapted: Figure = None
    survival_base_draft: tuple[Figure, ...] = ()
    survival_adapted: tuple[Figure, ...] = ()
    tokens_per_s_transformers: Figure = None
    tokens_per_s_autoregressive: Figure = None
    tokens_per_s_base_draft: Figure = None
    tokens_per_s_adapted: Figure = None
    speedup_adapted: Figure = None  # over our own autoregressive decoding, median of per-round ratios
    speedup_interval: Interval | None = None  # 90 %
    stage_seconds: dict[str, Figure] = Field(default_factory=dict)  # in the order in which the stages ran
    adapter_version: str | None = None

    temperature_1: Sampled | None = None
    alpha_base_draft: tuple[Figure, ...] = ()
    alpha_adapted: tuple[Figure, ...] = ()
    finish_reasons: FinishReasons | None = None
    tier: str | None = None  # that was adapted; None: nothing was, or an older report does not say
    rows: int | None = None  # that were regenerated, or chosen of these
    faults: dict[str, int] = Field(default_factory=dict)  # of their answers, by name
    rejected: int | None = None  # answers that are not trained on because of theirs
    selected: Figure = None  # their share of all; None: all
    coverage: Figure = None  # share of answer tokens inside the draft vocabulary
    retention: Figure = None  # tau_base_draft / tau_base_on_base
    tau_live: Figure = None  # of the version that was live before; None: the base draft was
    gain_interval: Interval | None = None  # 95 % of tau_adapted - tau_live, paired bootstrap over prompts
    error: str | None = None  # traceback of a failed target

    @property
    def gain(self) -> float | None:
        """tau_adapted - tau_live: what the gate judges; None if either was not measured."""
        live = self.tau_base_draft if self.tau_live is None else self.tau_live
        return None if self.tau_adapted is None or live is None else self.tau_adapted - live

    @property
    def total_seconds(self) -> float | None:
        """Seconds of all stages together; None if no stage was timed."""
        known = [seconds for seconds in self.stage_seconds.values() if seconds is not None]
        return sum(known) if known else None


class Report(Strict):
    """`report.json`: what one onboarding measured and decided."""

    k: int  # drafted tokens a round
    temperature: float  # of the top-level tau, survival and alpha
    threads: int
    dtype: str
    prompts: int  # held-out prompts a target
    tau_base_on_base: Figure = None
    targets: tuple[TargetRow, ...] = ()

    run_id: str
    created: str | None = None  # ISO 8601, UTC
    git_sha: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: dict[str, str | int | float] = Field(default_factory=dict)
    base: str | None = None
    trunk_key: str | None = None
    # Of stages that all targets share, such as the trunk's.
    stage_seconds: dict[str, Figure] = Field(default_factory=dict)
    curves: dict[str, tuple[tuple[int, Figure], ...]] = Field(default_factory=dict)  # target -> (step, loss)

    def count(self, decision: Decision) -> int:
        """Number of targets that ended with this decision."""
        return sum(row.decision == decision for row in self.targets)


def figure(value: float | None, digits: int = 2, suffix: str = "") -> str:
    """A number for people; an en dash for what was not measured."""
    return "–" if value is None else f"{value:.{digits}f}{suffix}"
