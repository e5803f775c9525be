"""What crosses the handle between gateway and replica: a request, pieces of its answer, who is hosted."""

from dataclasses import dataclass
from typing import Literal

from serve.schemas import ErrorBody


@dataclass(frozen=True)
class Ask:
    """One checked request. `prompt`: a conversation, a text, or token ids."""

    id: str
    target: str
    prompt: tuple[dict[str, str], ...] | str | tuple[int, ...]
    is_chat: bool
    temperature: float
    top_p: float
    seed: int | None
    max_new_tokens: int | None  # None: up to the end of the context
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Delta:
    """A piece of an answer; the counts are those of the whole answer so far."""

    text: str
    finish_reason: Literal["stop", "length"] | None
    num_prompt_tokens: int
    num_new_tokens: int
    version: str


@dataclass(frozen=True)
class Hosted:
    """One engine of a replica. `is_current`: new requests go to it; else it finishes its last ones."""

    target: str
    version: str
    is_current: bool
    num_open: int  # requests not finished, waiting ones too
    num_live: int  # requests in a slot
    rounds: int
    emitted: int
    pid: int


Item = Delta | ErrorBody
