"""What crosses the handle between gateway and replica: a request, pieces of its answer, who is hosted."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from serve.errors import ErrorBody
from serve.schemas import ChatRequest, TextRequest

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
    version: str | None = None  # of the target, where the client named one
    num_choices: int = 1
    max_prompt_tokens: int | None = None
    include_rounds: bool = False  # whether pieces say which of their text was drafted
    return_token_ids: bool = False  # whether pieces say which tokens they are made of

    @property
    def model(self) -> str:
        """As the client named it."""
        return self.target if self.version is None else f"{self.target}@{self.version}"


def ask_of(
    request: ChatRequest | TextRequest, max_new_tokens: int | None, max_prompt_tokens: int | None = None
) -> Ask:
    """The request as it goes to the engine host, under an id of its own, within the caller's limits."""
    messages: tuple[dict[str, str], ...] = ()
    prompt: str | tuple[int, ...] = ""
    if isinstance(request, ChatRequest):
        messages = tuple(message.as_template_sees_it() for message in request.messages)
    else:
        prompt = request.prompt
    bias = tuple(sorted(request.logit_bias.items()))
    target, version = named(request.model)
    sampling = {name: getattr(request, name) for name in SAMPLING}
    return Ask(
        id=f"{'chatcmpl' if messages else 'cmpl'}-{uuid.uuid4().hex}",
        target=target,
        version=version,
        messages=messages,
        prompt=prompt,
        sampling=sampling | {"logit_bias": bias, "logprobs": request.num_logprobs},
        seed=request.seed,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        stop=request.stop,
        num_choices=request.n,
        include_rounds=request.stream_options.include_rounds,
        return_token_ids=isinstance(request, TextRequest) and request.return_token_ids,
    )


def named(model: str) -> tuple[str, str | None]:
    """The target and the version that a request's `model` names: `target` or `target@version`."""
    target, at, version = model.partition("@")
    return target, version if at else None


@dataclass(frozen=True)
class Spelled:
    """A token as it is written, and its log-probability. `bytes`: None where they are not known."""

    text: str
    bytes: tuple[int, ...] | None
    logprob: float


@dataclass(frozen=True)
class SpelledToken:
    """A token of an answer, `offset` characters after its beginning, and the most likely ones in its place."""

    chosen: Spelled
    offset: int
    top: tuple[Spelled, ...]


@dataclass(frozen=True)
class Delta:
    """A piece of one choice of an answer; the counts are those of the whole choice so far."""

    text: str
    finish_reason: Literal["stop", "length"] | None
    num_prompt_tokens: int
    num_new_tokens: int
    version: str
    index: int = 0
    logprobs: tuple[SpelledToken, ...] | None = None  # of the piece's tokens; None: not asked for
    num_rounds: int = 0
    num_emitted: int = 0  # by those rounds, a stop token among them
    spans: tuple[tuple[str, bool], ...] = ()  # the text in parts, and whether each was drafted; if asked for
    token_ids: tuple[int, ...] | None = None  # of the piece, the stop token among them; None: not asked for
    prompt_token_ids: tuple[int, ...] | None = None  # in the first piece, if asked for


@dataclass(frozen=True)
class Hosted:
    """A version that a replica hosts.

    New requests go to the current one and, by its share, to the canary; any other finishes its last ones. `reason` is
    empty for an adapter that drafts, else it begins with "base", "plain" or "kept" and says what is wrong if anything.
    """

    target: str
    version: str
    is_current: bool
    share: float  # of the new requests for the target
    reason: str
    e_value: float | None  # evidence that a canary is worse than the current version; None: it is no canary
    num_open: int  # requests not finished, waiting ones too
    num_live: int  # requests in a slot
    rounds: int
    emitted: int
    pid: int
    canary: str | None = None  # version that a share of the target's requests goes to beside this one


Item = Delta | ErrorBody
