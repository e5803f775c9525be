"""OpenAI's error envelope, and everything that a request can be told is wrong with it."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

MAX_PROMPT_CHARS = 2**20
SHOWN_CHARS = 100  # of a client's own words in an error


class ErrorBody(BaseModel):
    """OpenAI's error envelope, `{"error": {...}}`; `status` is the HTTP status and stays outside of it."""

    model_config = ConfigDict(frozen=True)

    status: int = Field(exclude=True)
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None

    def envelope(self) -> dict[str, Any]:
        return {"error": self.model_dump()}


def shown(words: object, most: int = SHOWN_CHARS) -> str:
    """A client's words as an error may repeat them: not at any length, and always text (JSON has half characters)."""
    text = str(words).encode("utf-8", "replace").decode()
    return text if len(text) <= most else f"{text[:most]}..."


def mistake_in_body(details: list[Any]) -> ErrorBody:
    """The envelope for pydantic's list of mistakes: the first one, with the field's name."""
    first = details[0]
    field = shown(".".join(_path(first["loc"]))) or None
    if first["type"] == "json_invalid":
        return ErrorBody(status=400, message="the body is not JSON")
    if first["type"] == "extra_forbidden":
        message = f"{field!r} is not supported; leave it out"
        return ErrorBody(status=400, message=message, param=field, code="unsupported_parameter")
    message = shown(first["msg"].removeprefix("Value error, "), most=500)
    return ErrorBody(status=400, message=f"{field or 'body'}: {message}", param=field, code="invalid_value")


def _path(loc: Iterable[int | str]) -> list[str]:
    """The field's names and indices, without those that pydantic gives to the members of a union."""
    parts = [str(part) for part in loc if part != "body"]
    return [part for i, part in enumerate(parts) if i == 0 or not (part == "str" or "[" in part)]


def mistake_in_bias(bias: Iterable[tuple[int, float]], vocab_size: int) -> ErrorBody | None:
    """The envelope for the first (token, value) whose token the target does not have; None if it has all."""
    for token, _ in bias:
        if not 0 <= token < vocab_size:
            message = f"logit_bias: {token} is no token id; they are below {vocab_size}"
            return ErrorBody(status=400, message=message, param="logit_bias")
    return None


def unknown_model(name: str) -> ErrorBody:
    message = f"the model {shown(name)!r} is not served here; GET /v1/models lists those that are"
    return ErrorBody(status=404, message=message, param="model", code="model_not_found")


def context_exceeded(num_tokens: int, max_length: int, param: str) -> ErrorBody:
    message = f"the prompt has {num_tokens} tokens, prompt and answer have room for {max_length}; shorten it"
    return ErrorBody(status=400, message=message, param=param, code="context_length_exceeded")


def unavailable(message: str) -> ErrorBody:
    return ErrorBody(status=503, message=message, type="server_error")


def too_large(num_chars: int) -> ErrorBody:
    message = f"the prompt has {num_chars} characters, at most {MAX_PROMPT_CHARS} are read"
    return ErrorBody(status=413, message=message, code="request_too_large")


def too_many_tokens(num_tokens: int, most: int | None) -> ErrorBody:
    message = f"the prompt has {num_tokens} tokens, at most {most} are allowed here; shorten it"
    return ErrorBody(status=413, message=message, code="request_too_large")
