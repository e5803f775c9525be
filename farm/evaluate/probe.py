"""Probe: may this target use the base's draft at all, and how well does the base's draft do on it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from farm.config import Refused
from farm.data.prompts import Prompt
from farm.decode.sampling import SamplingParams
from farm.evaluate.bench import TauResult, measure_tau
from farm.evaluate.gate import ratio_interval
from farm.evaluate.target import OpenTrunk, encode_prompts
from farm.sections import Dtype, EvaluateSettings, ProbeSettings, TargetSpec
from farm.target.load import check_family, load_member, open_target


@dataclass(frozen=True)
class TauOfBaseDraft:
    """tau of the base's draft on one target; lists over draft positions 1..k, intervals are 95 % over prompts.

    `alpha` is the share of the reached drafted tokens that was accepted. Seconds are those of the machine: a batch's
    over all its tokens or rounds. None where they were not asked for.
    """

    tau: float
    survival: tuple[float, ...]
    alpha: float | None  # None where nothing was drafted
    tau_interval: tuple[float, float] | None  # None for a single prompt
    alpha_interval: tuple[float, float] | None
    plain_s: float | None = None  # a token without speculation, after the prefill
    round_s: float | None = None  # a round
    prefill_s: float | None = None  # of the prompts, the draft's reading among it, by token of their answers


def check_target(base: TargetSpec, target: TargetSpec) -> None:
    """Raises Refused when the target cannot be loaded, or is no member of the base's family.

    Neither's weights stay in memory: several checks may run on a node at a time.
    """
    check_family(load_member(base), load_member(target))


def probe(
    target: TargetSpec,
    trunk_folder: Path,
    prompts: Sequence[Prompt],
    settings: ProbeSettings,
    evaluate: EvaluateSettings,
    dtype: Dtype,
    *,
    timed_slots: int | None = None,
) -> TauOfBaseDraft:
    """tau of the base's draft on a few of the target's prompts, or of the base's own: what retention is made of.

    At the temperature at which an evaluation decides, the first of its own.
    `timed_slots` decodes the prompts with and without the draft in batches of that size, and takes the time.
    """
    loaded = open_target(target, dtype)
    draft = OpenTrunk.of(trunk_folder, loaded).draft(None)
    limits = evaluate.model_copy(update={"max_new_tokens": settings.max_new_tokens})
    ids = encode_prompts(loaded, prompts[: settings.prompts], limits)
    if not ids:
        raise Refused(
            f"{target.name}: no prompt leaves room for an answer of {settings.max_new_tokens} tokens; lower "
            "probe.max_new_tokens and evaluate.max_new_tokens"
        )
    temperature, longest = evaluate.temperatures[0], settings.max_new_tokens
    params = SamplingParams(temperature, seed=evaluate.seed, max_new_tokens=longest)
    if timed_slots is None:
        return _summary(measure_tau(loaded, draft, ids, params, k=evaluate.k))
    measure_tau(loaded, draft, ids[:1], params, k=evaluate.k)  # the first call pays for allocations
    result = measure_tau(loaded, draft, ids, params, k=evaluate.k, num_slots=timed_slots)
    plain = measure_tau(loaded, None, ids, params, k=0, num_slots=timed_slots)
    return replace(
        _summary(result),
        plain_s=plain.decode_s / max(1, plain.stats.emitted),
        round_s=result.decode_s / max(1, result.stats.rounds),
        prefill_s=result.prefill_s / max(1, result.stats.emitted),
    )


def _summary(result: TauResult) -> TauOfBaseDraft:
    stats, several = result.stats, len(result.counts) > 1
    accepted, reached = [pair[0] for pair in result.drafted], [pair[1] for pair in result.drafted]
    emitted, rounds = [one.emitted for one in result.counts], [one.rounds for one in result.counts]
    return TauOfBaseDraft(
        tau=stats.tau,
        survival=tuple(stats.survival),
        alpha=sum(accepted) / sum(reached) if sum(reached) else None,
        tau_interval=ratio_interval(emitted, rounds) if several else None,
        alpha_interval=ratio_interval(accepted, reached) if several and sum(reached) else None,
    )
