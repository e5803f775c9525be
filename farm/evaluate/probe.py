"""Probe: may this target use the base's draft at all, and how well does the base's draft do on it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from farm.config import Dtype, EvaluateSettings, ProbeSettings, TargetSpec
from farm.data.prompts import Prompt
from farm.decode.sampling import SamplingParams
from farm.evaluate.bench import measure_tau
from farm.evaluate.target import OpenTrunk, encode_prompts
from farm.target.load import check_family, load_target, open_target


@dataclass(frozen=True)
class TauOfBaseDraft:
    """tau of the base's draft on one target, greedy; `survival` over draft positions 1..k."""

    tau: float
    survival: tuple[float, ...]


def check_target(base: TargetSpec, target: TargetSpec) -> None:
    """Raises Refused when the target cannot be loaded, or is no member of the base's family."""
    check_family(load_target(base), load_target(target))


def probe(
    target: TargetSpec,
    trunk_folder: Path,
    prompts: Sequence[Prompt],
    settings: ProbeSettings,
    evaluate: EvaluateSettings,
    dtype: Dtype,
) -> TauOfBaseDraft:
    """tau of the base's draft on a few of the target's prompts, or of the base's own: what retention is made of."""
    loaded = open_target(target, dtype)
    opened = OpenTrunk.of(trunk_folder, loaded)
    limits = evaluate.model_copy(update={"max_new_tokens": settings.max_new_tokens})
    ids = encode_prompts(loaded, prompts[: settings.prompts], limits)
    params = SamplingParams(max_new_tokens=settings.max_new_tokens)
    result = measure_tau(loaded, opened.draft(None), ids, params, k=evaluate.k)
    return TauOfBaseDraft(result.stats.tau, tuple(result.stats.survival))
