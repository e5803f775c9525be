"""What clients may ask, strictly: a field that is not served is refused by name, null means absent."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_PROMPT_CHARS = 2**20
NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields that are not served, with the values that ask for nothing
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "store": (False,),
}
Stops = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(lambda stop: (stop,) if isinstance(stop, str) else stop),
    Field(max_length=4),
]


class Asked(BaseModel):
    """A part of a request: unknown fields are refused, nulls are dropped."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


def _joined(content: Any) -> Any:
    """The text of a list of text parts; whatever else is left to the validator of the field."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError("only parts of type 'text' are supported")
    return "".join(part["text"] for part in content)


class Message(Asked):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined)]

    def as_template_sees_it(self) -> dict[str, str]:
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(Asked):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    include_rounds: bool = False  # not OpenAI's: chunks say what of their text was drafted


class Sampling(Asked):
    """The fields that chat and text completions share, with OpenAI's defaults."""

    model: str
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    # Not OpenAI's: these four. 0, 0 and 1 are off; max_drafted 0 decodes plainly.
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    max_drafted: int | None = Field(default=None, ge=0)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: Stops = ()
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_fields(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if not _is_neutral(name, value)}


def _is_neutral(name: str, value: Any) -> bool:
    """`False == 0` in Python, but `logprobs: 0` asks for something."""
    neutrals = NEUTRAL.get(name, ())
    return any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in neutrals)


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    messages: tuple[Message, ...] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @property
    def num_chars(self) -> int:
        return sum(len(message.content) for message in self.messages)

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextRequest(Sampling):
    """Body of POST /v1/completions: one prompt, as text or as token ids."""

    prompt: str | tuple[int, ...]

    @property
    def num_chars(self) -> int:
        return len(self.prompt)

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens or 16  # OpenAI's default for text completions


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


def mistake_in_body(details: list[Any]) -> ErrorBody:
    """The envelope for pydantic's list of mistakes: the first one, with the field's name."""
    first = details[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body") or None
    if first["type"] == "json_invalid":
        return ErrorBody(status=400, message="the body is not JSON")
    if first["type"] == "extra_forbidden":
        message = f"{field!r} is not supported; leave it out"
        return ErrorBody(status=400, message=message, param=field, code="unsupported_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return ErrorBody(status=400, message=f"{field or 'body'}: {message}", param=field, code="invalid_value")


def mistake_in_bias(bias: Iterable[tuple[int, float]], vocab_size: int) -> ErrorBody | None:
    """The envelope for the first (token, value) whose token the target does not have; None if it has all."""
    for token, _ in bias:
        if not 0 <= token < vocab_size:
            message = f"logit_bias: {token} is no token id; they are below {vocab_size}"
            return ErrorBody(status=400, message=message, param="logit_bias")
    return None


def unknown_model(name: str) -> ErrorBody:
    message = f"the model {name!r} is not served here; GET /v1/models lists those that are"
    return ErrorBody(status=404, message=message, param="model", code="model_not_found")


def context_exceeded(num_tokens: int, max_length: int) -> ErrorBody:
    message = f"the prompt has {num_tokens} tokens, prompt and answer have room for {max_length}; shorten it"
    return ErrorBody(status=400, message=message, param="messages", code="context_length_exceeded")


def unavailable(message: str) -> ErrorBody:
    return ErrorBody(status=503, message=message, type="server_error")


def too_large(num_chars: int) -> ErrorBody:
    message = f"the prompt has {num_chars} characters, at most {MAX_PROMPT_CHARS} are read"
    return ErrorBody(status=413, message=message, code="request_too_large")
