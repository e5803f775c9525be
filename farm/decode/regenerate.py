# T tokens, H hidden
"""The target answers its prompts; what its decoding saw is kept as features, so that no second prefill is needed.

The task without the fleet: a loaded target and prompts in, answers out. EDA's regeneration (arXiv 2603.09527): a draft
learns from what the target itself says, partly greedy and partly sampled as in serving.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from farm.config import RegenerateSettings, UserError
from farm.data.chat import encode_chat, encode_pair
from farm.data.features import FEATURE_DTYPE, Answer
from farm.data.prompts import Prompt
from farm.decode.engine import Completion, Engine, Request
from farm.decode.sampling import SamplingParams
from farm.layers.cache import Rows
from farm.target.load import LoadedTarget


def regenerate_rows(
    target: LoadedTarget, prompts: Sequence[Prompt], settings: RegenerateSettings
) -> list[Answer]:
    """One answer a prompt, in order; a prompt that cannot be answered becomes an error row with its reason."""
    requests, failed = [], {}
    max_length = 0
    for prompt in prompts:
        try:
            ids = encode_chat(target.tokenizer, prompt.messages, target.chat_template)
            _check_room(ids, target)
        except UserError as error:
            failed[prompt.row] = str(error)
            continue
        params = sampling_of(prompt, settings)
        requests.append(Request(str(prompt.row), tuple(ids), params))
        max_length = max(max_length, len(ids) + settings.max_new_tokens)
    answers = {}
    if requests:
        num_slots = min(settings.batch_rows, len(requests))
        engine = Engine(
            target.forward, target.stop_ids, None,
            num_slots=num_slots, max_length=min(max_length, target.max_positions), k=0, capture=True,
        )  # fmt: skip
        for request, done in zip(requests, engine.run(requests), strict=True):
            answers[int(request.id)] = (request, done)
    return [
        _failed(prompt, failed[prompt.row])
        if prompt.row in failed
        else _answered(prompt, *answers[prompt.row])
        for prompt in prompts
    ]


def prefill_rows(
    target: LoadedTarget, prompts: Sequence[Prompt], settings: RegenerateSettings
) -> list[Answer]:
    """The prompts' own answers with the target's hidden states: one prefill a row, far cheaper than decoding."""
    return [_prefilled(target, prompt, settings) for prompt in prompts]


def sampling_of(prompt: Prompt, settings: RegenerateSettings) -> SamplingParams:
    """Greedy for a share of the rows, sampled for the rest; which and with which seed follows from the row's id."""
    digest = hashlib.sha256(f"{settings.seed} {prompt.id}".encode()).digest()
    greedy = int.from_bytes(digest[:4], "big") / 2**32 < settings.greedy_share
    return SamplingParams(
        temperature=0.0 if greedy else settings.temperature,
        top_p=1.0 if greedy else settings.top_p,
        seed=int.from_bytes(digest[4:11], "big"),
        max_new_tokens=settings.max_new_tokens,
    )


def _prefilled(target: LoadedTarget, prompt: Prompt, settings: RegenerateSettings) -> Answer:
    if prompt.answer is None:
        return _failed(prompt, "the row has no answer to prefill")
    try:
        ids, num_prompt = encode_pair(target.tokenizer, prompt.messages, prompt.answer, target.chat_template)
    except UserError as error:
        return _failed(prompt, str(error))
    ids = ids[: min(num_prompt + settings.max_new_tokens, target.max_positions)]
    if len(ids) <= num_prompt:
        return _failed(
            prompt, f"{num_prompt} prompt tokens leave no room in {target.max_positions} positions"
        )
    tokens_BT = torch.tensor([ids[:-1]], device=target.forward.device)
    cache = target.forward.new_cache(1, len(ids))
    hidden_TH = target.forward.forward(tokens_BT, Rows([0]), cache)[0].to(FEATURE_DTYPE).cpu()
    reason = "stop" if ids[-1] in target.stop_ids else "length"
    return Answer(
        prompt.row, prompt.id, tuple(ids[:num_prompt]), tuple(ids[num_prompt:]), reason, 0, 0.0, hidden_TH
    )  # fmt: skip


def _check_room(ids: Sequence[int], target: LoadedTarget) -> None:
    if len(ids) + 2 > target.max_positions:
        raise UserError(
            f"{len(ids)} prompt tokens leave no room in {target.max_positions} positions; shorten the prompt"
        )


def _answered(prompt: Prompt, request: Request, done: Completion) -> Answer:
    assert done.features is not None
    return Answer(
        row=prompt.row,
        id=prompt.id,
        prompt_ids=request.prompt_ids,
        answer_ids=done.tokens,
        finish_reason=done.finish_reason,
        seed=request.params.seed,
        temperature=request.params.temperature,
        features=done.features.to(FEATURE_DTYPE).cpu(),
    )


def _failed(prompt: Prompt, reason: str) -> Answer:
    return Answer(prompt.row, prompt.id, (), (), "error", 0, 0.0, None, reason)
