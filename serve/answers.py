"""OpenAI's response objects, whole and as server-sent events, out of an answer's pieces."""

import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from openai import BaseModel
from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionTokenLogprob,
)
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs

from serve.errors import ErrorBody
from serve.records import Delta, Item, Spelled, SpelledToken

DONE = b"data: [DONE]\n\n"
UNLIKELY = -9999.0  # OpenAI's value for log-probabilities below it; JSON has no infinity


@dataclass(frozen=True)
class Head:
    """What every object of one answer repeats."""

    id: str
    model: str  # as the client named it
    target: str
    created: int
    tells_rounds: bool = False

    @classmethod
    def of(cls, answer_id: str, model: str, target: str, *, tells_rounds: bool = False) -> "Head":
        return cls(answer_id, model, target, int(time.time()), tells_rounds)

    def rounds(self, delta: Delta) -> dict[str, Any]:
        """Ours, for a request that asked: the text in parts, each drafted or not, and counts so far."""
        counts = {"rounds": delta.num_rounds, "emitted": delta.num_emitted, "tokens": delta.num_new_tokens}
        return {"farm": {"spans": delta.spans, **counts}} if self.tells_rounds else {}

    def fields(self, version: str) -> dict[str, Any]:
        """`system_fingerprint` names the draft that served, so that a client can tell versions apart."""
        named = {"id": self.id, "model": self.model, "created": self.created}
        return {**named, "system_fingerprint": f"{self.target}@{version}"}


class Style(Protocol):
    """One of OpenAI's two endpoints: how an answer, and a piece of it, look."""

    opening: dict[str, str]  # what only the first piece of a choice says

    def whole(self, head: Head, choices: Sequence[Delta]) -> BaseModel: ...

    def piece(self, head: Head, delta: Delta, said: dict[str, str]) -> dict[str, Any]:
        """A chunk's fields, without usage. `said`: `opening` in a choice's first piece, empty afterwards."""
        ...

    def chunk(self, fields: dict[str, Any]) -> BaseModel: ...


class ChatStyle:
    """/v1/chat/completions"""

    opening = {"role": "assistant"}

    def whole(self, head: Head, choices: Sequence[Delta]) -> BaseModel:
        return ChatCompletion(
            **head.fields(choices[0].version),
            object="chat.completion",
            choices=[self._choice(one) for one in choices],
            usage=usage(choices),
        )

    def _choice(self, one: Delta) -> Choice:
        message = ChatCompletionMessage(role="assistant", content=one.text, refusal=None)
        logprobs = None if one.logprobs is None else ChoiceLogprobs(**_chat_logprobs(one.logprobs))
        reason = one.finish_reason or "stop"
        return Choice(index=one.index, message=message, finish_reason=reason, logprobs=logprobs)

    def piece(self, head: Head, delta: Delta, said: dict[str, str]) -> dict[str, Any]:
        spoken = ChoiceDelta.model_validate({"content": delta.text, **said})
        logprobs = None if delta.logprobs is None else ChunkLogprobs(**_chat_logprobs(delta.logprobs))
        choice = ChunkChoice(
            index=delta.index, delta=spoken, finish_reason=delta.finish_reason, logprobs=logprobs
        )
        return {**head.fields(delta.version), "choices": [choice]}

    def chunk(self, fields: dict[str, Any]) -> BaseModel:
        return ChatCompletionChunk(**fields, object="chat.completion.chunk")


class TextStyle:
    """/v1/completions"""

    opening: dict[str, str] = {}

    def whole(self, head: Head, choices: Sequence[Delta]) -> BaseModel:
        made = [
            CompletionChoice(
                index=one.index,
                text=one.text,
                finish_reason=one.finish_reason or "stop",
                logprobs=_text_logprobs(one.logprobs),
                **_token_ids(one),
            )
            for one in choices
        ]
        return self.chunk({**head.fields(choices[0].version), "choices": made, "usage": usage(choices)})

    def piece(self, head: Head, delta: Delta, said: dict[str, str]) -> dict[str, Any]:
        # OpenAI's type wants a finish reason in every piece: hence construct, which checks nothing
        choice = CompletionChoice.construct(
            index=delta.index,
            text=delta.text,
            finish_reason=delta.finish_reason,
            logprobs=_text_logprobs(delta.logprobs),
            **_token_ids(delta),
            **said,
        )
        return {**head.fields(delta.version), "choices": [choice]}

    def chunk(self, fields: dict[str, Any]) -> BaseModel:
        return Completion.construct(**fields, object="text_completion")


def _token_ids(delta: Delta) -> dict[str, Any]:
    """vLLM's and SGLang's fields of a choice, for a request that asked for them."""
    fields = {"token_ids": delta.token_ids, "prompt_token_ids": delta.prompt_token_ids}
    return {name: list(ids) for name, ids in fields.items() if ids is not None}


def _chat_logprobs(tokens: Sequence[SpelledToken]) -> dict[str, Any]:
    content = [
        {**_entry(one.chosen), "top_logprobs": [TopLogprob(**_entry(other)) for other in one.top]}
        for one in tokens
    ]
    return {"content": [ChatCompletionTokenLogprob(**fields) for fields in content], "refusal": None}


def _entry(spelled: Spelled) -> dict[str, Any]:
    return {
        "token": spelled.text,
        "bytes": None if spelled.bytes is None else list(spelled.bytes),
        "logprob": max(spelled.logprob, UNLIKELY),
    }


def _text_logprobs(tokens: Sequence[SpelledToken] | None) -> Logprobs | None:
    """OpenAI's older form: the token itself is among its alternatives too, so there may be one more than asked for."""
    if tokens is None:
        return None
    return Logprobs(
        tokens=[one.chosen.text for one in tokens],
        token_logprobs=[max(one.chosen.logprob, UNLIKELY) for one in tokens],
        top_logprobs=[
            {other.text: max(other.logprob, UNLIKELY) for other in (*one.top, one.chosen)} for one in tokens
        ],
        text_offset=[one.offset for one in tokens],
    )


async def whole(
    style: Style, head: Head, first: Delta, rest: AsyncGenerator[Item, None]
) -> BaseModel | ErrorBody:
    """The complete answer; the error instead if one comes."""
    pieces = {first.index: [first]}
    async with aclosing(rest):
        async for item in rest:
            if isinstance(item, ErrorBody):
                return item
            pieces.setdefault(item.index, []).append(item)
    return style.whole(head, [_joined(pieces[index]) for index in sorted(pieces)])


def _joined(pieces: Sequence[Delta]) -> Delta:
    """A choice in one piece."""
    last, asked = pieces[-1], pieces[0].logprobs is not None
    tokens = tuple(token for piece in pieces for token in piece.logprobs or ())
    ids = tuple(token for piece in pieces for token in piece.token_ids or ())
    return replace(
        last,
        text="".join(piece.text for piece in pieces),
        logprobs=tokens if asked else None,
        token_ids=None if last.token_ids is None else ids,
        prompt_token_ids=pieces[0].prompt_token_ids,
    )


async def events(
    style: Style, head: Head, first: Delta, rest: AsyncGenerator[Item, None], *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """Server-sent events, one a piece; after an error nothing more comes, not even `[DONE]`."""
    silent = {"usage": None} if include_usage else {}  # OpenAI names it in every chunk once it was asked for
    yield _event(style.chunk({**style.piece(head, first, style.opening), **silent, **head.rounds(first)}))
    last = {first.index: first}
    async with aclosing(rest):
        async for item in rest:
            if isinstance(item, ErrorBody):
                yield b"data: " + json.dumps(item.envelope()).encode() + b"\n\n"
                return
            said = {} if item.index in last else style.opening
            yield _event(style.chunk({**style.piece(head, item, said), **silent, **head.rounds(item)}))
            last[item.index] = item
    if include_usage:
        fields = head.fields(first.version)
        yield _event(style.chunk({**fields, "choices": [], "usage": usage(list(last.values()))}))
    yield DONE


def usage(choices: Sequence[Delta]) -> CompletionUsage:
    """Of the last pieces of all choices; they share one prompt."""
    prompt, new = choices[0].num_prompt_tokens, sum(one.num_new_tokens for one in choices)
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)


def _event(chunk: BaseModel) -> bytes:
    return b"data: " + body(chunk) + b"\n\n"


def body(answer: BaseModel) -> bytes:
    """JSON without the fields that nobody set."""
    return answer.model_dump_json(exclude_unset=True).encode()
