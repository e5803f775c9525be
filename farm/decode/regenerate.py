# B rows, T tokens, H hidden
"""The target answers its prompts; what its decoding saw is kept as features, so that no second prefill is needed.

The task without the fleet: a loaded target and prompts in, answers out. EDA's regeneration (arXiv 2603.09527): a draft
learns from what the target itself says, partly greedy and partly sampled as in serving.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from farm.config import UserError
from farm.data.chat import encode_chat, encode_pair
from farm.data.features import FEATURE_DTYPE, Answer
from farm.data.prompts import Prompt
from farm.decode.engine import OFFLINE_PREFILL_TOKENS, Completion, Engine, FinishReason, Request, Route
from farm.decode.sampling import SamplingParams
from farm.layers.cache import Rows
from farm.sections import RegenerateSettings
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
            [Route(target.forward, target.stop_ids)],
            num_slots=num_slots, max_length=min(max_length, target.max_positions), k=0,
            prefill_tokens=OFFLINE_PREFILL_TOKENS, capture=True,
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
    """The prompts' own answers with the target's hidden states: prefills of `batch_rows`, far cheaper than decoding."""
    encoded: list[
        tuple[int, list[int], int]
    ] = []  # index of the prompt, its ids with the answer's, prompt tokens
    answers: dict[int, Answer] = {}
    for index, prompt in enumerate(prompts):
        try:
            encoded.append((index, *_encode_answer(target, prompt, settings)))
        except UserError as error:
            answers[index] = _failed(prompt, str(error))
    encoded.sort(key=lambda item: len(item[1]))  # rows of one length waste no padding
    for start in range(0, len(encoded), settings.batch_rows):
        batch = encoded[start : start + settings.batch_rows]
        features = _prefill(target, [ids[:-1] for _, ids, _ in batch])
        for (index, ids, num_prompt), hidden_TH in zip(batch, features, strict=True):
            reason: FinishReason = "stop" if ids[-1] in target.stop_ids else "length"
            prompt, tokens = prompts[index], (tuple(ids[:num_prompt]), tuple(ids[num_prompt:]))
            answers[index] = Answer(prompt.row, prompt.id, *tokens, reason, 0, 0.0, hidden_TH)
    return [answers[index] for index in range(len(prompts))]


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


def _encode_answer(
    target: LoadedTarget, prompt: Prompt, settings: RegenerateSettings
) -> tuple[list[int], int]:
    """Ids of prompt and answer, cut to the settings' limit, and how many belong to the prompt."""
    if prompt.answer is None:
        raise UserError("the row has no answer to prefill")
    ids, num_prompt = encode_pair(target.tokenizer, prompt.messages, prompt.answer, target.chat_template)
    ids = ids[: min(num_prompt + settings.max_new_tokens, target.max_positions)]
    if len(ids) <= num_prompt:
        raise UserError(f"{num_prompt} prompt tokens leave no room in {target.max_positions} positions")
    return ids, num_prompt


def _prefill(target: LoadedTarget, rows: Sequence[list[int]]) -> list[Tensor]:
    """Hidden states [T, H] of every row; padding comes last, where causal attention never sees it."""
    length = max(map(len, rows))
    tokens_BT = torch.tensor(
        [[*ids, *[0] * (length - len(ids))] for ids in rows], device=target.forward.device
    )
    cache = target.forward.new_cache(len(rows), length)
    hidden_BTH = target.forward.forward(tokens_BT, Rows([0] * len(rows)), cache).to(FEATURE_DTYPE).cpu()
    return [hidden_TH[: len(ids)] for hidden_TH, ids in zip(hidden_BTH, rows, strict=True)]


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
