# B rows, T tokens, H hidden, M answer tokens, V vocabulary
"""Makes a target: a checkpoint fine-tuned on prompts with answers, whole or as a LoRA. For trying the farm out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from farm.config import UserError
from farm.data.chat import encode_pair, read_template
from farm.data.prompts import Prompt
from farm.sections import Dtype, TargetSpec
from farm.target.load import load_model, load_tokenizer, placement, resolve_dtype, unreadable_is_refused
from farm.target.reference import with_given_states

IGNORED = -100


@dataclass(frozen=True)
class FinetuneSettings:
    """A fixed number of steps of `rows` conversations, each cut to `max_tokens` tokens."""

    steps: int = 80
    lr: float = 3e-4
    rows: int = 8
    max_tokens: int = 256
    lora_rank: int | None = None  # None trains every weight
    seed: int = 0
    dtype: Dtype = "auto"  # of products; weights are trained in float32


def finetune(
    spec: TargetSpec,
    prompts: Sequence[Prompt],
    settings: FinetuneSettings,
    out: Path,
    progress: Callable[[int, int], None],
) -> float:
    """Trains `spec.model` on the answers and writes it to `out`: a checkpoint, or a LoRA folder; returns the last loss.

    Raises UserError when no row has an answer that can be trained on, and Refused when the model cannot be loaded.
    """
    with_answer = [prompt for prompt in prompts if prompt.answer]
    if not with_answer:
        raise UserError(
            'no row has an answer to train on; give rows such as {"prompt": "...", "answer": "..."}'
        )
    with unreadable_is_refused(spec):
        model, tokenizer = load_model(spec), load_tokenizer(spec.model)
    if spec.chat_template is not None:
        tokenizer.chat_template = read_template(spec.chat_template)  # it is saved with the target
    if not tokenizer.chat_template:
        raise UserError(f"--chat-template: the tokenizer of {spec.model} has none; give a jinja file")
    encoded = _encoded(tokenizer, with_answer, settings)
    model = model.to(placement("auto")[1]).requires_grad_(True)
    if settings.lora_rank is not None:
        model = _with_lora(model, settings.lora_rank)
    loss = _train(model, _batches(encoded, settings), settings, progress)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    return loss


def _encoded(
    tokenizer: Any, prompts: Sequence[Prompt], settings: FinetuneSettings
) -> list[tuple[list[int], int]]:
    """Token ids and the prompt's length of rows whose answer begins before they are cut: a step needs one at least."""
    encoded = [encode_pair(tokenizer, prompt.messages, prompt.answer or "") for prompt in prompts]
    kept = [(ids, num_prompt) for ids, num_prompt in encoded if num_prompt < settings.max_tokens]
    if not kept:
        raise UserError(
            f"every prompt takes {settings.max_tokens} tokens or more, where rows are cut; give shorter ones"
        )
    return kept


def _with_lora(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    try:
        # Every product of the layers, whatever it is called there, and not the head.
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    except ValueError as error:
        kind = model.config.model_type
        raise UserError(
            f"--lora-rank: no LoRA can be put on {kind} models ({error}); train every weight instead"
        ) from error


def _train(
    model: Any,
    batches: Iterator[tuple[Tensor, Tensor]],
    settings: FinetuneSettings,
    progress: Callable[[int, int], None],
) -> float:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, settings.steps, pct_start=0.1)
    model.train()
    # A LoRA lies within the layers of its base.
    plain = model if settings.lora_rank is None else model.get_base_model()
    head = with_given_states(plain)
    dtype = getattr(torch, resolve_dtype(settings.dtype, model.device.type))
    last = float("nan")
    for step, batch in enumerate(batches):
        tokens_BT, labels_BT = (part.to(model.device) for part in batch)
        chosen_BT = labels_BT[:, 1:] != IGNORED
        with torch.autocast(tokens_BT.device.type, dtype, enabled=dtype != torch.float32):
            hidden_BTH = plain.base_model(tokens_BT).last_hidden_state[:, :-1]
            # Logits of answer tokens only: over a large vocabulary they cost as much as the layers.
            logits_MV = head(inputs_embeds=hidden_BTH[chosen_BT][None]).logits[0]
        loss = functional.cross_entropy(logits_MV.float(), labels_BT[:, 1:][chosen_BT])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        last = loss.item()
        progress(step + 1, settings.steps)
    model.eval()
    return last


def _batches(
    encoded: Sequence[tuple[list[int], int]], settings: FinetuneSettings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels [B, T] of every step; prompts and padding are ignored in the labels."""
    rng, order = random.Random(settings.seed), list[int]()
    for _ in range(settings.steps):
        while len(order) < settings.rows:
            order += rng.sample(range(len(encoded)), len(encoded))
        chosen = [encoded[order.pop()] for _ in range(settings.rows)]
        length = min(settings.max_tokens, max(len(ids) for ids, _ in chosen))
        tokens_BT = torch.zeros(settings.rows, length, dtype=torch.int64)
        labels_BT = torch.full((settings.rows, length), IGNORED)
        for row, (ids, num_prompt) in enumerate(chosen):
            kept = torch.tensor(ids[:length])
            tokens_BT[row, : len(kept)] = kept
            labels_BT[row, num_prompt : len(kept)] = kept[num_prompt:]
        yield tokens_BT, labels_BT
