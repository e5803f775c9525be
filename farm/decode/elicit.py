"""Prompts that a target makes up itself, for those that come without any (Magpie, arXiv 2406.08464).

An instruction-tuned model that reads its chat template up to where a user's words begin goes on with what a user would
say. A target without a template goes on from its BOS token, and what it says is a text to be continued.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from farm.config import Refused
from farm.data.chat import MARK, render_chat
from farm.decode.endpoint import Endpoint, ask_all
from farm.decode.engine import Engine, FinishReason, Request, Route
from farm.decode.sampling import SamplingParams
from farm.sections import ElicitSettings, Fault, RegenerateSettings
from farm.target.load import LoadedTarget

LOOP_WORDS, LOOP_TIMES = 4, 4  # so many words, more often than so many times

Answer = tuple[Sequence[int], FinishReason]
Decode = Callable[[Sequence[Request]], Sequence[Answer]]


@dataclass(frozen=True)
class Opening:
    """What a target reads before it makes up a user's words, and what ends them."""

    ids: tuple[int, ...]
    end: str  # text behind a user's words in the template; empty: anything ends them
    end_ids: frozenset[int]  # the special token that it begins with, if it does


@dataclass(frozen=True)
class Elicited:
    """Prompts in the order in which they were drawn, and how many draws were rejected, by reason."""

    prompts: tuple[str, ...]
    rejected: dict[str, int]


def opening_of(tokenizer: Any, template: str | None) -> Opening:
    """The part of the template before a user's words; the BOS token where there is none.

    Raises UserError where there is no template, Refused where it changes a user's words or nothing comes before them.
    """
    text = render_chat(tokenizer, [{"role": "user", "content": MARK}], template)
    before, mark, after = text.partition(MARK)
    if not mark:
        raise Refused(
            "its chat template changes a user's words, so that none can be sampled; give it prompts"
        )
    ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if not ids and first is None:
        raise Refused("nothing comes before a user's words, and it has no BOS token; give it prompts")
    end = after.strip()
    special = set(tokenizer(end, add_special_tokens=False)["input_ids"][:1]) & set(tokenizer.all_special_ids)
    return Opening(tuple(ids or [first]), end, frozenset(special))


def elicit_from(
    target: LoadedTarget, settings: ElicitSettings, regenerate: RegenerateSettings, endpoint: Endpoint | None
) -> tuple[Opening, Elicited]:
    """Prompts of a target, decoded here or at an `endpoint` that serves it; raises Refused as those do."""
    opening = opening_of(target.tokenizer, target.chat_template)
    stop_ids = target.stop_ids | opening.end_ids
    room = target.max_positions - len(opening.ids)
    settings = settings.model_copy(update={"max_new_tokens": min(settings.max_new_tokens, room)})

    def decode(requests: Sequence[Request]) -> Sequence[Answer]:
        if endpoint is not None:
            return [(one.tokens, one.finish_reason) for one in ask_all(endpoint, requests, stop_ids)]
        slots = min(regenerate.batch_rows, len(requests))
        engine = Engine(
            [Route(target.forward, stop_ids)],
            num_slots=slots, max_length=len(opening.ids) + settings.max_new_tokens, k=0,
        )  # fmt: skip
        return [(done.tokens, done.finish_reason) for done in engine.run(requests)]

    return opening, elicit(target.tokenizer, opening, stop_ids, settings, decode)


def elicit(
    tokenizer: Any,
    opening: Opening,
    stop_ids: frozenset[int],
    settings: ElicitSettings,
    decode: Decode,
) -> Elicited:
    """`settings.prompts` different prompts, or those that `settings.attempts` times as many draws gave.

    Which prompt a draw gives follows from its number, not from how many are drawn at once. `decode` has to end at the
    opening's `end_ids` and at `stop_ids`.
    """
    prompts: dict[str, str] = {}
    rejected: Counter[str] = Counter()
    for drawn in range(0, settings.prompts * settings.attempts, settings.prompts):
        if len(prompts) >= settings.prompts:
            break
        requests = [_request(opening, settings, drawn + number) for number in range(settings.prompts)]
        for tokens, reason in decode(requests):
            if len(prompts) >= settings.prompts:
                break
            text, ended = _user_turn(tokenizer, opening, tokens, reason, stop_ids)
            fault = _fault(text, ended or not opening.end, prompts)
            if fault is None:
                prompts[_normal(text)] = text
            else:
                rejected[fault] += 1
    return Elicited(tuple(prompts.values()), dict(sorted(rejected.items())))


def _request(opening: Opening, settings: ElicitSettings, number: int) -> Request:
    digest = hashlib.sha256(f"{settings.seed} elicit {number}".encode()).digest()
    params = SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=int.from_bytes(digest[:7], "big"),
        max_new_tokens=settings.max_new_tokens,
    )
    return Request(f"elicit-{number}", opening.ids, params)


def _user_turn(
    tokenizer: Any, opening: Opening, tokens: Sequence[int], reason: FinishReason, stop_ids: frozenset[int]
) -> tuple[str, bool]:
    """The text of a user's turn, and whether it came to its end."""
    ends = stop_ids | opening.end_ids
    kept = [token for token in tokens if token not in ends]
    text = str(tokenizer.decode(kept, skip_special_tokens=True))
    if opening.end and not opening.end_ids and opening.end in text:
        return text.partition(opening.end)[0].strip(), True
    return text.strip(), reason == "stop"


def _fault(text: str, ended: bool, prompts: dict[str, str]) -> Fault | None:
    """Why a draw is no prompt; None if it is one."""
    if not re.search(r"\w", text):
        return "empty"
    if not ended:
        return "truncated"
    if _loops(text):
        return "loop"
    return "duplicate" if _normal(text) in prompts else None


def _loops(text: str) -> bool:
    words = text.split()
    runs = Counter(tuple(words[at : at + LOOP_WORDS]) for at in range(len(words) - LOOP_WORDS + 1))
    return max(runs.values(), default=0) > LOOP_TIMES


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())
