# B rows, T tokens, H hidden, M compared positions
"""The target answers its prompts; what its decoding saw is kept as features, so that no second prefill is needed.

The task without the fleet: a loaded target and prompts in, answers out. EDA's regeneration (arXiv 2603.09527): a draft
learns from what the target itself says, partly greedy and partly sampled as in serving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch
from torch import Tensor

from farm.config import UserError
from farm.data.chat import encode_pair
from farm.data.features import FEATURE_DTYPE, Answer
from farm.data.prompts import Prompt
from farm.decode.control import Control
from farm.decode.conversation import Conversation, check_known
from farm.decode.drafting import longest_drafted
from farm.decode.endpoint import Endpoint, ask_all
from farm.decode.engine import OFFLINE_PREFILL_TOKENS, Engine, FinishReason, Request, Route
from farm.decode.renewal import Cost
from farm.draft.model import Draft
from farm.layers.cache import Rows
from farm.layers.lora import LoraRows
from farm.sections import Dtype, RegenerateSettings, TargetSpec
from farm.target.load import LoadedTarget, open_target

RECAPTURED_ROWS = 16
CHECKED_TOKENS = 32  # of a greedy answer from an endpoint, compared with what the checkpoint predicts
LEAST_AGREEMENT = 0.9  # share of them; rounding of another engine costs a few
MOST_DRAFTED = 8  # tokens of a round


@dataclass(frozen=True)
class Speculation:
    """Drafts one target's greedy answers, as long as its control finds that faster.

    The control learns from rounds: one of these serves all shards of its target.
    """

    draft: Draft
    control: Control = field(default_factory=lambda: Cost(MOST_DRAFTED))


def regenerate_rows(
    target: LoadedTarget,
    prompts: Sequence[Prompt],
    settings: RegenerateSettings,
    endpoint: Endpoint | None = None,
    speculation: Speculation | None = None,
) -> list[Answer]:
    """One answer a prompt, in order; a prompt that cannot be answered becomes an error row with its reason.

    The target decodes here, perhaps with `speculation`, or else at an `endpoint`, whose tokens are prefilled here for
    their features. Raises Refused when the endpoint cannot be used, or greedy answers show that it serves another
    model.
    """
    asked: list[Conversation] = []
    answers: dict[int, Answer] = {}
    for prompt in prompts:
        try:
            asked.append(Conversation.of(target, prompt, settings))
        except UserError as error:
            answers[prompt.row] = _failed(prompt, str(error))
    if endpoint is None:
        _decode(target, asked, settings, speculation)
    else:
        _ask(target, asked, settings, endpoint)
    answers |= {one.prompt.row: one.answer() for one in asked}
    return [answers[prompt.row] for prompt in prompts]


def _turns(asked: Sequence[Conversation]) -> Iterator[list[tuple[Conversation, Request]]]:
    """What is asked next, in all conversations that go on, until none does; each is to be heard before the next."""
    while under_way := [(one, request) for one in asked if (request := one.request()) is not None]:
        yield under_way


def _decode(
    target: LoadedTarget,
    asked: Sequence[Conversation],
    settings: RegenerateSettings,
    speculation: Speculation | None,
) -> None:
    for under_way in _turns(asked):
        if speculation is not None:
            under_way = _greedy_first(under_way)
        requests = [request for _, request in under_way]
        max_length = max(len(request.prompt_ids) + request.params.max_new_tokens for request in requests)
        too_long = max_length > longest_drafted(MOST_DRAFTED)
        draft = None if speculation is None or too_long else speculation.draft
        engine = Engine(
            [Route(target.forward, target.stop_ids, draft, target.lora)],
            num_slots=min(settings.batch_rows, len(requests)),
            max_length=max_length,
            k=0 if draft is None else MOST_DRAFTED,
            control=None if speculation is None else speculation.control,
            prefill_tokens=OFFLINE_PREFILL_TOKENS, capture=True,
        )  # fmt: skip
        for (one, _), done in zip(under_way, engine.run(requests), strict=True):
            one.hear(done.tokens, done.finish_reason, done.features)


def _greedy_first(under_way: Sequence[tuple[Conversation, Request]]) -> list[tuple[Conversation, Request]]:
    """Those that are drafted share batches with few that are not; the others draft nothing."""
    greedy = [pair for pair in under_way if pair[1].params.temperature == 0]
    sampled = [
        (one, replace(request, params=replace(request.params, max_drafted=0)))
        for one, request in under_way
        if request.params.temperature > 0
    ]
    return greedy + sampled


def _ask(
    target: LoadedTarget, asked: Sequence[Conversation], settings: RegenerateSettings, endpoint: Endpoint
) -> None:
    for under_way in _turns(asked):
        found = ask_all(endpoint, [request for _, request in under_way], target.stop_ids)
        for (one, _), answered in zip(under_way, found, strict=True):
            if answered.error is None:
                one.hear(answered.tokens, answered.finish_reason)
            else:
                one.fail(answered.error)
    told, right, checked = [one for one in asked if one.turns], 0, 0
    for index, hidden_TH in _prefill(target, [one.ids for one in told], settings.batch_rows):
        one = told[index]
        # A copy, since a batch's states are one tensor, most of it padding.
        one.features = hidden_TH.to("cpu", FEATURE_DTYPE, copy=True)
        if one.params.temperature == 0:
            start, end = one.turns[0]
            said_M = torch.tensor(one.ids[start : min(end, start + CHECKED_TOKENS)], device=hidden_TH.device)
            meant_M = target.forward.logits(hidden_TH[start - 1 : start - 1 + len(said_M)]).argmax(dim=-1)
            right, checked = right + int((said_M == meant_M).sum()), checked + len(said_M)
    if right < LEAST_AGREEMENT * checked:
        raise endpoint.trouble(
            f"{right / checked:.0%} of its greedy tokens are those of the target's checkpoint: as {endpoint.model!r} "
            "it serves another model; correct served_as or url, or serve this checkpoint"
        )


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
    for at, hidden_TH in _prefill(target, [ids for _, ids, _ in encoded], settings.batch_rows):
        index, ids, num_prompt = encoded[at]
        reason: FinishReason = "stop" if ids[-1] in target.stop_ids else "length"
        prompt, tokens = prompts[index], (tuple(ids[:num_prompt]), tuple(ids[num_prompt:]))
        features = hidden_TH.to(FEATURE_DTYPE).cpu()
        answers[index] = Answer(prompt.row, prompt.id, *tokens, reason, 0, 0.0, features)
    return [answers[index] for index in range(len(prompts))]


class Recapture:
    """A `farm.data.features.Capture` by prefills of a target, which is opened when it is first needed."""

    def __init__(self, open_one: Callable[[], LoadedTarget], batch_rows: int = RECAPTURED_ROWS) -> None:
        self._open, self._batch_rows = cache(open_one), batch_rows

    @classmethod
    def of(cls, spec: TargetSpec, dtype: Dtype) -> Recapture:
        """Of the target that a manifest names, on this process's device."""
        return cls(partial(open_target, spec, dtype))

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        found = _prefill(self._open(), rows, self._batch_rows)
        # A copy, since decoding's tensors cannot be trained on.
        by_index = {index: hidden_TH.to("cpu", FEATURE_DTYPE, copy=True) for index, hidden_TH in found}
        return [by_index[index] for index in range(len(rows))]


def _encode_answer(
    target: LoadedTarget, prompt: Prompt, settings: RegenerateSettings
) -> tuple[list[int], int]:
    """Ids of prompt and answer, cut to the settings' limit, and how many belong to the prompt."""
    if prompt.answer is None:
        raise UserError("the row has no answer to prefill")
    ids, num_prompt = encode_pair(target.tokenizer, prompt.messages, prompt.answer, target.chat_template)
    check_known(ids, target)
    ids = ids[: min(num_prompt + settings.max_new_tokens, target.max_positions)]
    if len(ids) <= num_prompt:
        raise UserError(f"{num_prompt} prompt tokens leave no room in {target.max_positions} positions")
    return ids, num_prompt


def _prefill(
    target: LoadedTarget, rows: Sequence[Sequence[int]], batch_rows: int
) -> Iterator[tuple[int, Tensor]]:
    """Index and hidden states [T - 1, H] of every row of T tokens, the shortest first; a row's last token is not read.

    Padding comes last, where causal attention never sees it.
    """
    # Rows of one length waste no padding.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(rows), batch_rows):
        batch = order[start : start + batch_rows]
        length = len(rows[batch[-1]]) - 1
        padded = [[*rows[index][:-1], *[0] * (length + 1 - len(rows[index]))] for index in batch]
        tokens_BT = torch.tensor(padded, device=target.forward.device)
        cache = target.forward.new_cache(len(batch), length)
        loras = None
        if target.lora is not None:
            loras = LoraRows([target.lora], [0] * len(batch), length, target.forward.device)
        hidden_BTH = target.forward.forward(tokens_BT, Rows([0] * len(batch)), cache, loras)
        for index, hidden_TH in zip(batch, hidden_BTH, strict=True):
            yield index, hidden_TH[: len(rows[index]) - 1]


def _failed(prompt: Prompt, reason: str) -> Answer:
    return Answer(prompt.row, prompt.id, (), (), "error", 0, 0.0, None, reason)
