"""What clients may ask, strictly: a field that is not served is refused by name, null means absent."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    Strict,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core.core_schema import CoreSchema

from serve.errors import SHOWN_CHARS

MAX_CHOICES = 8
COLDEST = 1e-3
TOKEN_NAME = "[0-9]{1,9}"
NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields that are not served, with the values that ask for nothing
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
}

NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {  # as other servers' answers have them
    "annotations": ([],),
    "tool_calls": ([],),
}


def _whole(text: str) -> str:
    """JSON can name half a character (a lone surrogate), which is in no text."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("has a lone surrogate; send whole characters")
    return text


def _integral(value: Any) -> Any:
    """JSON has one kind of number: 2.0 is an integer, in a list too."""
    if isinstance(value, list):
        return [_integral(one) if isinstance(one, float) else one for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _token(name: Any) -> Any:
    """A token id as the name of a field."""
    if isinstance(name, str) and not re.fullmatch(TOKEN_NAME, name):
        raise ValueError("has to be a token id")
    return name


Text = Annotated[str, AfterValidator(_whole)]
Bool = Annotated[bool, Strict()]
Int = Annotated[int, Strict()]
Token = Annotated[int, BeforeValidator(_token)]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Stop = Annotated[Text, Field(min_length=1, max_length=1000)]
FourStops = Annotated[tuple[Stop, ...], Field(max_length=4)]
Stops = Annotated[
    FourStops,
    BeforeValidator(
        lambda stop: (stop,) if isinstance(stop, str) else stop, json_schema_input_type=Stop | FourStops
    ),
]


def _cold_is_greedy(temperature: float) -> float:
    """Below this, as clients write it to mean greedy, logits over temperature would overflow."""
    return temperature if temperature >= COLDEST else 0.0


class Asked(BaseModel):
    """A part of a request: unknown fields are refused, nulls and neutral fields dropped, 2.0 is an integer."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # as NEUTRAL

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        kept = {name: value for name, value in fields.items() if not cls._asks_nothing(name, value)}
        return {name: _integral(value) for name, value in kept.items()}

    @classmethod
    def _asks_nothing(cls, name: str, value: Any) -> bool:
        """`False == 0` in Python, but `best_of: true` is a mistake."""
        neutrals = cls.neutral.get(name, ())
        return value is None or any(
            value == same and isinstance(value, bool) == isinstance(same, bool) for same in neutrals
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Says also in OpenAPI that null is as good as absent, and which values of which fields ask for nothing."""
        schema = handler(core_schema)
        fields = handler.resolve_ref_schema(schema)
        for name, field in fields["properties"].items():
            if name not in fields.get("required", ()):
                fields["properties"][name] = {"anyOf": [field, {"type": "null"}]}
        for name, values in cls.neutral.items():
            fields["properties"][name] = {"enum": [*values, None], "description": "not supported"}
        return schema


def _joined(content: Any) -> Any:
    """The text of a list of text parts; whatever else is left to the validator of the field."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError("only parts of type 'text' are supported")
        if unknown := sorted(map(str, part.keys() - {"type", "text"})):
            raise ValueError(f"{unknown[0][:SHOWN_CHARS]!r} of a part is not supported; leave it out")
    return "".join(part["text"] for part in content)


class TextPart(BaseModel):
    """One of the parts in which a message's content may come; for OpenAPI only, `_joined` reads them."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(Asked):
    neutral = NEUTRAL_IN_MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart])]

    def as_template_sees_it(self) -> dict[str, str]:
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(Asked):
    include_usage: Bool = False
    include_obfuscation: Literal[False] = False
    include_rounds: bool = False  # not OpenAI's: chunks say what of their text was drafted


class Sampling(Asked):
    """The fields that chat and text completions share, with OpenAI's defaults."""

    neutral = NEUTRAL

    model: Text = Field(max_length=200, description="`target` or `target@version`")
    n: Int = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: Annotated[Float, AfterValidator(_cold_is_greedy)] = Field(default=1.0, ge=0, le=2)
    top_p: Float = Field(default=1.0, gt=0, le=1)
    # Not OpenAI's: these four. 0, 0 and 1 are off; max_drafted 0 decodes plainly.
    top_k: Int = Field(default=0, ge=0, lt=2**31)
    min_p: Float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: Float = Field(default=1.0, ge=0.01, le=10)
    max_drafted: Int | None = Field(default=None, ge=0)
    presence_penalty: Float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: Float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[Token, Annotated[Float, Field(ge=-100, le=100)]] = Field(
        default={}, max_length=1024, json_schema_extra={"propertyNames": {"pattern": f"^{TOKEN_NAME}$"}}
    )
    seed: Int | None = Field(default=None, ge=-(2**63), lt=2**63)
    max_tokens: Int | None = Field(default=None, ge=1)
    stop: Stops = ()
    stream: Bool = False
    stream_options: StreamOptions = StreamOptions()
    user: Text | None = None

    @property
    def asked_tokens(self) -> int | None:
        """The limit that the client set."""
        return self.max_tokens

    @property
    def limit_field(self) -> str:
        """The field that it set it by."""
        return "max_tokens"


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    messages: tuple[Message, ...] = Field(min_length=1)
    max_completion_tokens: Int | None = Field(default=None, ge=1)
    logprobs: Bool = False
    top_logprobs: Int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _top_of_what_is_asked_for(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives beside each token's log-probability; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def num_chars(self) -> int:
        return sum(len(message.content) for message in self.messages)

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def max_new_tokens(self) -> int | None:
        return self.asked_tokens


def _only_prompt(prompt: Any) -> Any:
    """That of a list of one, which many clients send; whatever else is left to the validator of the field."""
    if not (isinstance(prompt, list) and prompt and all(isinstance(one, str | list) for one in prompt)):
        return prompt
    if len(prompt) > 1:
        raise ValueError(f"has {len(prompt)} prompts; send one a request")
    return _integral(prompt[0])


OnePrompt = (
    Annotated[Text, Field(min_length=1)]
    | Annotated[tuple[Annotated[Int, Field(ge=0)], ...], Field(min_length=1)]
)
Prompt = Annotated[
    OnePrompt,
    BeforeValidator(
        _only_prompt,
        json_schema_input_type=OnePrompt | Annotated[list[OnePrompt], Field(min_length=1, max_length=1)],
    ),
]


class TextRequest(Sampling):
    """Body of POST /v1/completions: one prompt, as text or as token ids, alone or in a list."""

    prompt: Prompt
    logprobs: Int | None = Field(default=None, ge=0, le=5)
    # vLLM's and SGLang's: a choice has `prompt_token_ids` and `token_ids`, those of its end among them.
    return_token_ids: Bool = False

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_chars(self) -> int:
        return len(self.prompt)

    @property
    def max_new_tokens(self) -> int | None:
        return self.asked_tokens or 16  # OpenAI's default for text completions
