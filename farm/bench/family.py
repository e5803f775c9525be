"""What a benchmark measures: an onboarded family's targets with their drafts, and `transformers` beside them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from farm.config import Manifest, UserError
from farm.data.prompts import load_prompts, split_rows
from farm.draft.model import Draft
from farm.evaluate.bench import PromptIds
from farm.evaluate.published import Published, spec_of
from farm.evaluate.target import OpenTrunk, encode_prompts
from farm.sections import TargetSpec
from farm.target.load import LoadedTarget, load_model, open_target

TRIAL_TOKENS = 16  # generated in each dtype to find the one in which `transformers` is faster


@dataclass(frozen=True)
class Member:
    """One target of the family, loaded with everything that is compared on it."""

    name: str
    target: LoadedTarget
    base_draft: Draft
    adapted: Draft | None  # None until the target has a live adapter
    reference: Any  # its `transformers` model, in its faster dtype
    reference_dtype: str
    prompts: tuple[PromptIds, ...]


def members(manifest: Manifest, names: Sequence[str]) -> Iterator[Member]:
    """The named targets, or every full one, opened one at a time so that only one is in memory.

    Raises UserError when the store holds no family or no such target.
    """
    published = Published.of(manifest.store)
    full = [spec.name for spec in manifest.targets if spec.lora is None]
    for spec in [spec_of(manifest, name) for name in names or full]:
        live = published.live_expert(spec.name)
        yield _open(manifest, spec, published.trunk_folder, None if live is None else str(live.file))


def _open(manifest: Manifest, spec: TargetSpec, folder: Path, expert: str | None) -> Member:
    target = open_target(spec, manifest.dtype)
    trunk = OpenTrunk.of(folder, target)
    prompts = held_out(manifest, spec, target)
    dtype, reference = _faster(spec, str(target.forward.device), prompts[0])
    adapted = None if expert is None else trunk.draft(expert)
    return Member(spec.name, target, trunk.draft(None), adapted, reference, dtype, prompts)


def held_out(manifest: Manifest, spec: TargetSpec, target: LoadedTarget) -> tuple[PromptIds, ...]:
    """The target's prompts that nothing was adapted on. Raises UserError when none leaves room for an answer."""
    found, settings = load_prompts(spec.prompts), manifest.evaluate
    _, rows = split_rows(found.num_rows, manifest.regenerate.rows, settings.rows, settings.prompts)
    chosen = [prompt for prompt in found.prompts if prompt.row in rows]
    encoded = encode_prompts(target, chosen, settings)
    if not encoded:
        raise UserError(f"{spec.prompts}: no held-out prompt leaves room for an answer")
    return tuple(encoded)


def _faster(spec: TargetSpec, device: str, ids: PromptIds) -> tuple[str, Any]:
    """The dtype in which `generate` is faster here, and the model in it."""
    found: list[tuple[float, str, Any]] = []
    for dtype in ("float32", "bfloat16"):
        model = load_model(spec, dtype).to(device)
        tokens_1T = torch.tensor([ids], device=device)
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            generate(model, tokens_1T, TRIAL_TOKENS)
            seconds.append(time.perf_counter() - started)
        found.append((min(seconds), dtype, model))
    _, dtype, model = min(found, key=lambda item: item[0])
    return dtype, model


@torch.inference_mode()
def generate(model: Any, tokens_BT: torch.Tensor, num_new: int, **options: Any) -> torch.Tensor:
    """`transformers` greedy decoding of exactly `num_new` tokens a row; prompts padded on the left with id 0."""
    mask_BT = options.pop("attention_mask", torch.ones_like(tokens_BT))
    out: torch.Tensor = model.generate(
        tokens_BT, attention_mask=mask_BT, max_new_tokens=num_new, min_new_tokens=num_new,
        do_sample=False, eos_token_id=None, pad_token_id=0, **options,
    )  # fmt: skip
    return out
