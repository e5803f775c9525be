"""Answers of an OpenAI-compatible endpoint that serves a target already, as exact token ids.

Prompts go as token ids to /v1/completions with `return_token_ids`, which vLLM (0.10.2 and later), SGLang (merged July
2026) and `farm serve` answer with `token_ids` in every choice. What an endpoint would add by itself (the penalties and
filters of a generation config) is switched off, so that greedy answers are those of the target alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import openai
from openai.types import CompletionChoice
from pydantic import SecretStr

from farm.config import Refused
from farm.decode.engine import FinishReason, Request
from farm.decode.sampling import SamplingParams
from farm.sections import RegenerateSettings, TargetSpec

OF_THE_ROW = (400, 413, 422)  # statuses that speak of one request: its row fails alone
OF_THE_REQUEST = "the endpoint refuses the request"
CHECK_RETRIES = 2
ALL_TOKENS = 2**30  # top_k: engines differ in which number switches the filter off, none minds a large one


@dataclass(frozen=True)
class Endpoint:
    """Where a target is served, under which name, and how it is asked."""

    target: str
    url: str
    model: str
    concurrency: int  # requests at once
    retries: int  # of a request, with growing pauses; after them the target is refused
    timeout_s: float  # of one request
    key: SecretStr | None = None

    @classmethod
    def of(cls, spec: TargetSpec, settings: RegenerateSettings, key: SecretStr | None) -> Endpoint:
        """The one that a manifest names for a target."""
        url = spec.url or settings.url
        assert url is not None  # the manifest is refused without
        return cls(
            spec.name, url.rstrip("/"), spec.served_as or spec.name,
            settings.concurrency, settings.retries, settings.timeout_s, key,
        )  # fmt: skip

    def trouble(self, what: str) -> Refused:
        """What went wrong here; the key is in no message."""
        if self.key is not None and self.key.get_secret_value():
            what = what.replace(self.key.get_secret_value(), "***")
        return Refused(f"{self.target}: {self.url}: {what}")


@dataclass(frozen=True)
class Answered:
    """What came back for one request: tokens with the stop token, or why there are none."""

    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason = "length"
    error: str | None = None


def ask_all(endpoint: Endpoint, requests: Sequence[Request], stop_ids: Collection[int]) -> list[Answered]:
    """One answer a request, in order, at most `concurrency` under way.

    A request that the endpoint finds wrong is an answer with an error. Raises Refused, naming the endpoint and the
    target, when it cannot be reached, does not serve the target, or returns no token ids.
    """
    return asyncio.run(_ask_all(endpoint, requests, stop_ids))


def check(endpoint: Endpoint, prompt_ids: tuple[int, ...]) -> None:
    """One token from the endpoint, for what would go wrong with every row; raises Refused as `ask_all` does."""
    request = Request("check", prompt_ids, SamplingParams(max_new_tokens=1))
    (answered,) = ask_all(replace(endpoint, retries=CHECK_RETRIES), [request], stop_ids=())
    if answered.error is not None and answered.error.startswith(OF_THE_REQUEST):
        raise endpoint.trouble(answered.error)


async def _ask_all(
    endpoint: Endpoint, requests: Sequence[Request], stop_ids: Collection[int]
) -> list[Answered]:
    room = asyncio.Semaphore(endpoint.concurrency)
    key = "none" if endpoint.key is None else endpoint.key.get_secret_value()
    async with openai.AsyncOpenAI(
        base_url=endpoint.url, api_key=key, max_retries=endpoint.retries, timeout=endpoint.timeout_s
    ) as client:

        async def ask(request: Request) -> Answered:
            async with room:
                return await _ask(client, endpoint, request, stop_ids)

        try:
            async with asyncio.TaskGroup() as group:  # the first trouble ends all others
                tasks = [group.create_task(ask(request)) for request in requests]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _ask(
    client: openai.AsyncOpenAI, endpoint: Endpoint, request: Request, stop_ids: Collection[int]
) -> Answered:
    try:
        done = await client.completions.create(
            model=endpoint.model, prompt=list(request.prompt_ids), **_fields(request.params)
        )
    except openai.APIStatusError as error:
        if error.status_code in OF_THE_ROW:
            return Answered(error=f"{OF_THE_REQUEST}: {_said(error)}")
        raise endpoint.trouble(_remedy(endpoint, error)) from None
    except openai.APIConnectionError as error:  # a timeout too
        raise endpoint.trouble(
            f"no answer after {endpoint.retries + 1} attempts ({error}); start it, or correct the url"
        ) from None
    if not done.choices:
        raise endpoint.trouble("its answer has no choices; is it an OpenAI-compatible /v1?")
    return _read(endpoint, request, done.choices[0], stop_ids)


def _fields(params: SamplingParams) -> dict[str, Any]:
    """The request's sampling; `extra_body` has what OpenAI does not know."""
    return {
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "seed": params.seed,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "extra_body": {
            "return_token_ids": True,
            "top_k": ALL_TOKENS,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        },
    }


def _read(
    endpoint: Endpoint, request: Request, choice: CompletionChoice, stop_ids: Collection[int]
) -> Answered:
    """Tokens up to the target's first stop token, as decoding here would have ended."""
    says = choice.model_dump()
    tokens, prompt = says.get("token_ids"), says.get("prompt_token_ids")
    if tokens is None:
        raise endpoint.trouble(
            "it returns no token ids, and text read again gives other tokens; use vLLM 0.10.2 or later, an SGLang with "
            "return_token_ids, farm serve, or regenerate.engine: farm"
        )
    if prompt is not None and tuple(prompt) != request.prompt_ids:
        raise endpoint.trouble("it read another prompt than it was sent; switch its own prompt template off")
    ended = says.get("stop_reason") or says.get("matched_stop")  # vLLM's and SGLang's name of the stop token
    if choice.finish_reason == "stop" and not set(stop_ids) & set(tokens) and ended in stop_ids:
        tokens = [*tokens, ended]  # where it is left out of the ids
    end = next((at + 1 for at, token in enumerate(tokens) if token in stop_ids), None)
    if end is not None:
        return Answered(tuple(tokens[:end]), "stop")
    if choice.finish_reason != "length":
        return Answered(error=f"it ended by {choice.finish_reason!r} without a stop token of the target")
    return Answered(tuple(tokens), "length")


def _remedy(endpoint: Endpoint, error: openai.APIStatusError) -> str:
    said = f"{error.status_code}: {_said(error)}"
    if error.status_code in (401, 403):
        return f"{said}; set regenerate.api_key_env to the variable that holds its key"
    if error.status_code == 404:
        return (
            f"{said}; it does not serve {endpoint.model!r} there: correct the target's served_as, or the url"
        )
    return f"{said}, after {endpoint.retries + 1} attempts; lower regenerate.concurrency, or mend it"


def _said(error: openai.APIStatusError) -> str:
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return str(message or error.message)[:300]
