"""One target's row of the report: the base draft, the live draft and the adapted draft on the same held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from farm.config import Refused, UserError
from farm.data.chat import encode_chat
from farm.data.prompts import Prompt
from farm.decode.drafting import longest_drafted
from farm.decode.sampling import SamplingParams
from farm.draft.checkpoint import EXPERT_FILE, load_adapter, load_trunk
from farm.draft.model import Draft
from farm.draft.trunk import Trunk
from farm.evaluate.bench import PromptIds, TauResult, measure_speed, measure_tau
from farm.evaluate.gate import LEAST_PROMPTS, gain_interval, tau_of
from farm.sections import Dtype, EvaluateSettings, TargetSpec
from farm.store import local_copy
from farm.target.load import LoadedTarget, load_model, open_target, placement


@dataclass(frozen=True)
class EvaluateTask:
    """What to compare on which prompts; trunk and experts are locations of a store."""

    target: TargetSpec
    settings: EvaluateSettings
    trunk_folder: str  # draft.json, trunk.safetensors, expert.safetensors (the base's)
    adapted: str | None  # the adapted expert; None measures the base draft alone
    live: str | None  # the live version's expert; None: the base draft is live
    prompts: tuple[Prompt, ...]
    dtype: Dtype


@dataclass(frozen=True)
class OpenTrunk:
    """A trunk's folder, opened once for every draft that is compared."""

    trunk: Trunk
    base_expert_path: Path

    @classmethod
    def of(cls, folder: Path, target: LoadedTarget) -> OpenTrunk:
        """The trunk in the target's dtype, on its device."""
        trunk = load_trunk(folder)
        return cls(trunk.to(target.forward.device, target.forward.dtype), folder / EXPERT_FILE)

    def draft(self, adapter: str | None) -> Draft:
        """The draft with an adapter's file, or with the base's private expert."""
        path = self.base_expert_path if adapter is None else local_copy(adapter)
        placed = self.trunk.fc.weight
        draft = Draft(self.trunk, *load_adapter(self.trunk.config, path))
        return draft.to(placed.device, placed.dtype).requires_grad_(False)


def evaluate_target(task: EvaluateTask) -> dict[str, Any]:
    """The measured fields of a report row (see records.TargetRow), lists over draft positions 1..k.

    tau at the first of `settings.temperatures` decides and stands at the top; temperature 1 is reported beside it.
    Raises Refused when too few prompts leave room for an answer.
    """
    torch.set_num_threads(task.settings.threads or torch.get_num_threads())
    target = open_target(task.target, task.dtype)
    opened = OpenTrunk.of(local_copy(task.trunk_folder), target)
    prompts = encode_prompts(target, task.prompts, task.settings)
    least = 1 if task.adapted is None else LEAST_PROMPTS
    if len(prompts) < least:
        raise Refused(
            f"{task.target.name}: of {len(task.prompts)} held-out prompts {len(prompts)} leave room for "
            f"evaluate.max_new_tokens {task.settings.max_new_tokens}, {least} are needed; lower it or add prompts"
        )
    row: dict[str, Any] = {"name": task.target.name, "kind": "full" if task.target.lora is None else "lora"}
    drafts = {"base_draft": opened.draft(None)}
    if task.adapted is not None:
        drafts["adapted"] = opened.draft(task.adapted)
    for temperature in task.settings.temperatures:
        measured = {name: _tau(target, draft, prompts, task, temperature) for name, draft in drafts.items()}
        fields = _tau_fields(measured)
        if temperature == task.settings.temperatures[0]:
            row |= fields
            if task.adapted is not None:
                row |= _gain(target, opened, prompts, task, measured)
        elif temperature == 1.0:
            row["temperature_1"] = fields
    row |= _speed_fields(target, drafts, prompts, task)
    return row


def encode_prompts(
    target: LoadedTarget, prompts: Sequence[Prompt], settings: EvaluateSettings
) -> list[PromptIds]:
    """Token ids of the prompts that the target's template takes and that leave room for an answer.

    Raises Refused when the template takes none.
    """
    encoded, errors = list[PromptIds](), list[UserError]()
    for prompt in prompts:
        try:
            encoded.append(tuple(encode_chat(target.tokenizer, prompt.messages, target.chat_template)))
        except UserError as error:
            errors.append(error)
    if errors and not encoded:
        raise Refused(f"{target.name}: none of its prompts can be encoded: {errors[0]}") from errors[0]
    room = min(target.max_positions, longest_drafted(settings.k)) - settings.max_new_tokens
    return [ids for ids in encoded if len(ids) <= room]


def _tau(
    target: LoadedTarget,
    draft: Draft,
    prompts: Sequence[PromptIds],
    task: EvaluateTask,
    temperature: float,
) -> TauResult:
    params = SamplingParams(temperature, seed=task.settings.seed, max_new_tokens=task.settings.max_new_tokens)
    return measure_tau(target, draft, prompts, params, k=task.settings.k)


def _tau_fields(measured: dict[str, TauResult]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, result in measured.items():
        fields[f"tau_{name}"] = result.stats.tau
        fields[f"survival_{name}"] = result.stats.survival
        fields[f"alpha_{name}"] = result.stats.alpha
    return fields


def _gain(
    target: LoadedTarget,
    opened: OpenTrunk,
    prompts: Sequence[PromptIds],
    task: EvaluateTask,
    measured: dict[str, TauResult],
) -> dict[str, Any]:
    """The adapted draft against the live one, which is the base draft until something was promoted."""
    live = measured["base_draft"]
    if task.live is not None:
        live = _tau(target, opened.draft(task.live), prompts, task, task.settings.temperatures[0])
    interval = gain_interval(measured["adapted"].counts, live.counts, seed=task.settings.seed)
    return {"gain_interval": interval, "tau_live": tau_of(live.counts)}


def _speed_fields(
    target: LoadedTarget,
    drafts: dict[str, Draft],
    prompts: Sequence[PromptIds],
    task: EvaluateTask,
) -> dict[str, Any]:
    settings = task.settings
    dtype, device = placement(task.dtype)
    speed = measure_speed(
        target, load_model(task.target, dtype).to(device), drafts, prompts[: settings.speed_prompts],
        k=settings.k, max_new_tokens=settings.max_new_tokens, rounds=settings.speed_rounds,
    )  # fmt: skip
    fields: dict[str, Any] = {f"tokens_per_s_{arm}": value for arm, value in speed.tokens_per_s.items()}
    if "adapted" in drafts:
        fields |= {"speedup_adapted": speed.ratio("adapted"), "speedup_interval": speed.interval("adapted")}
    return fields
