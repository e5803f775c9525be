"""OpenAI's response objects, whole and as server-sent events, out of an answer's pieces."""

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from openai import BaseModel
from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta

from serve.records import Delta, Item
from serve.schemas import ErrorBody

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Head:
    """What every object of one answer repeats."""

    id: str
    target: str
    created: int
    tells_rounds: bool = False

    @classmethod
    def of(cls, request_id: str, target: str, *, tells_rounds: bool = False) -> "Head":
        return cls(request_id, target, int(time.time()), tells_rounds)

    def rounds(self, delta: Delta) -> dict[str, Any]:
        """Ours, for a request that asked: the text in parts, each drafted or not, and counts so far."""
        counts = {"rounds": delta.num_rounds, "emitted": delta.num_emitted, "tokens": delta.num_new_tokens}
        return {"farm": {"spans": delta.spans, **counts}} if self.tells_rounds else {}

    def fields(self, version: str) -> dict[str, Any]:
        """`system_fingerprint` names the draft that served, so that a client can tell versions apart."""
        named = {"id": self.id, "model": self.target, "created": self.created}
        return {**named, "system_fingerprint": f"{self.target}@{version}"}


class Style(Protocol):
    """One of OpenAI's two endpoints: how an answer, and a piece of it, look."""

    opening: dict[str, str]  # what only the first piece says

    def whole(self, head: Head, text: str, last: Delta) -> BaseModel: ...

    def piece(self, head: Head, delta: Delta, said: dict[str, str]) -> dict[str, Any]:
        """A chunk's fields, without usage. `said`: `opening` in the first piece, empty afterwards."""
        ...

    def chunk(self, fields: dict[str, Any]) -> BaseModel: ...


class ChatStyle:
    """/v1/chat/completions"""

    opening = {"role": "assistant"}

    def whole(self, head: Head, text: str, last: Delta) -> BaseModel:
        message = ChatCompletionMessage(role="assistant", content=text, refusal=None)
        choice = Choice(index=0, message=message, finish_reason=last.finish_reason or "stop", logprobs=None)
        return ChatCompletion(
            **head.fields(last.version), object="chat.completion", choices=[choice], usage=usage(last)
        )

    def piece(self, head: Head, delta: Delta, said: dict[str, str]) -> dict[str, Any]:
        spoken = ChoiceDelta.model_validate({"content": delta.text, **said})
        choice = ChunkChoice(index=0, delta=spoken, finish_reason=delta.finish_reason, logprobs=None)
        return {**head.fields(delta.version), "choices": [choice]}

    def chunk(self, fields: dict[str, Any]) -> BaseModel:
        return ChatCompletionChunk(**fields, object="chat.completion.chunk")


class TextStyle:
    """/v1/completions"""

    opening: dict[str, str] = {}

    def whole(self, head: Head, text: str, last: Delta) -> BaseModel:
        reason = last.finish_reason or "stop"
        choice = CompletionChoice(index=0, text=text, finish_reason=reason, logprobs=None)
        return self.chunk({**head.fields(last.version), "choices": [choice], "usage": usage(last)})

    def piece(self, head: Head, delta: Delta, said: dict[str, str]) -> dict[str, Any]:
        # OpenAI's type wants a finish reason in every piece: hence construct, which checks nothing
        choice = CompletionChoice.construct(
            index=0, text=delta.text, finish_reason=delta.finish_reason, logprobs=None, **said
        )
        return {**head.fields(delta.version), "choices": [choice]}

    def chunk(self, fields: dict[str, Any]) -> BaseModel:
        return Completion.construct(**fields, object="text_completion")


async def whole(
    style: Style, head: Head, first: Delta, rest: AsyncGenerator[Item, None]
) -> BaseModel | ErrorBody:
    """The complete answer; the error instead if one comes."""
    texts, last = [first.text], first
    async with aclosing(rest):
        async for item in rest:
            if isinstance(item, ErrorBody):
                return item
            texts.append(item.text)
            last = item
    return style.whole(head, "".join(texts), last)


async def events(
    style: Style, head: Head, first: Delta, rest: AsyncGenerator[Item, None], *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """Server-sent events, one a piece; after an error nothing more comes, not even `[DONE]`."""
    silent = {"usage": None} if include_usage else {}  # OpenAI names it in every chunk once it was asked for
    yield _event(style.chunk({**style.piece(head, first, style.opening), **silent, **head.rounds(first)}))
    last = first
    async with aclosing(rest):
        async for item in rest:
            if isinstance(item, ErrorBody):
                yield b"data: " + json.dumps(item.envelope()).encode() + b"\n\n"
                return
            yield _event(style.chunk({**style.piece(head, item, {}), **silent, **head.rounds(item)}))
            last = item
    if include_usage:
        yield _event(style.chunk({**head.fields(last.version), "choices": [], "usage": usage(last)}))
    yield DONE


def usage(last: Delta) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=last.num_prompt_tokens,
        completion_tokens=last.num_new_tokens,
        total_tokens=last.num_prompt_tokens + last.num_new_tokens,
    )


def _event(chunk: BaseModel) -> bytes:
    return b"data: " + body(chunk) + b"\n\n"


def body(answer: BaseModel) -> bytes:
    """JSON without the fields that nobody set."""
    return answer.model_dump_json(exclude_unset=True).encode()
