"""What crosses the handle between gateway and replica: a request, pieces of its answer, who is hosted."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from serve.schemas import ChatRequest, ErrorBody, TextRequest

SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "max_drafted",
    "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """One checked request: a conversation in `messages`, or else a text or token ids in `prompt`."""

    id: str
    target: str
    messages: tuple[dict[str, str], ...]
    prompt: str | tuple[int, ...]
    sampling: Mapping[str, Any]  # fields of farm.decode.sampling.SamplingParams
    seed: int | None
    max_new_tokens: int | None  # None: up to the end of the context
    stop: tuple[str, ...]
    include_rounds: bool = False  # whether pieces say which of their text was drafted


def ask_of(request: ChatRequest | TextRequest) -> Ask:
    """The request as it goes to the engine host, under an id of its own."""
    messages: tuple[dict[str, str], ...] = ()
    prompt: str | tuple[int, ...] = ""
    if isinstance(request, ChatRequest):
        messages = tuple(message.as_template_sees_it() for message in request.messages)
    else:
        prompt = request.prompt
    bias = tuple(sorted(request.logit_bias.items()))
    return Ask(
        id=f"{'chatcmpl' if messages else 'cmpl'}-{uuid.uuid4().hex}",
        target=request.model,
        messages=messages,
        prompt=prompt,
        sampling={name: getattr(request, name) for name in SAMPLING} | {"logit_bias": bias},
        seed=request.seed,
        max_new_tokens=request.max_new_tokens,
        stop=request.stop,
        include_rounds=request.stream_options.include_rounds,
    )


@dataclass(frozen=True)
class Delta:
    """A piece of an answer; the counts are those of the whole answer so far."""

    text: str
    finish_reason: Literal["stop", "length"] | None
    num_prompt_tokens: int
    num_new_tokens: int
    version: str
    num_rounds: int = 0
    num_emitted: int = 0  # by those rounds, a stop token among them
    spans: tuple[tuple[str, bool], ...] = ()  # the text in parts, and whether each was drafted; if asked for


@dataclass(frozen=True)
class Hosted:
    """A version that a replica hosts. `is_current`: new requests go to it; else it finishes its last ones."""

    target: str
    version: str
    is_current: bool
    num_open: int  # requests not finished, waiting ones too
    num_live: int  # requests in a slot
    rounds: int
    emitted: int
    pid: int


Item = Delta | ErrorBody
