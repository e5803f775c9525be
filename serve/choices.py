"""The choices of one answer: tokens as they come from the engine become pieces of text with their log-probabilities."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence

from farm.decode.engine import FinishReason
from farm.decode.logprobs import TokenLogprob
from serve.detokenize import TextStream
from serve.errors import ErrorBody, unavailable, unknown_model
from serve.lanes import Progress
from serve.records import Delta, Item, Spelled, SpelledToken
from serve.spelling import Spelling

Mail = tuple[int, Progress]  # the choice's index, and what it got from a step


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index` of a request: its own for the first, unrelated ones for the others."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


class Choice:
    """One of an answer's choices. Text that may begin a stop string is held back, and its tokens' entries with it."""

    def __init__(
        self,
        index: int,
        text: TextStream,
        spell: Spelling | None,
        *,
        tells_rounds: bool = False,
        prompt_ids: tuple[int, ...] | None = None,
    ) -> None:
        """`spell`: how tokens are written; None if no log-probabilities are wanted.

        `tells_rounds`: whether a piece says which of its text was drafted. `prompt_ids`: None unless pieces say which
        tokens they are made of.
        """
        self._index, self._text, self._spell, self._tells_rounds = index, text, spell, tells_rounds
        self._spans: list[tuple[str, bool]] = []
        self._prompt_ids = prompt_ids
        self._tells_ids = prompt_ids is not None
        self._ids: list[int] = []
        self._num_rounds = self._num_emitted = 0
        self._progress: Progress | None = None
        self._piece = ""
        self._entries: list[SpelledToken] = []
        self._num_sent = 0  # entries
        self._told = False  # whether the finish reason was given out

    @property
    def finish_reason(self) -> FinishReason | None:
        if self._text.stopped:
            return "stop"
        return None if self._progress is None else self._progress.finish_reason

    @property
    def has_piece(self) -> bool:
        return bool(self._piece) or (self.finish_reason is not None and not self._told)

    def take(self, progress: Progress) -> None:
        """A step's tokens; nothing once the choice has ended."""
        if self.finish_reason is not None:
            return
        self._progress = progress
        before, drafted = self._text.num_tokens, progress.num_drafted or 0
        if progress.num_drafted is not None:
            self._num_rounds += 1
            self._num_emitted += len(progress.tokens) + (progress.finish_reason == "stop")
        self._say(self._text.push(progress.tokens[:drafted]), drafted=True)
        self._say(self._text.push(progress.tokens[drafted:]), drafted=False)
        if progress.finish_reason is not None:
            self._say(self._text.finish(), drafted=False)
        if self._tells_ids:
            self._ids += progress.tokens[: self._text.num_tokens - before]  # none behind a stop string
            if progress.stop_token is not None and not self._text.stopped:
                self._ids.append(progress.stop_token)
        if self._spell is not None:
            offsets = self._text.offsets[before:]
            pairs = zip(progress.logprobs, offsets, strict=False)  # no offsets behind a stop string
            self._entries += [_spelled(self._spell, token, offset) for token, offset in pairs]

    def _say(self, text: str, *, drafted: bool) -> None:
        self._piece += text
        if text and self._tells_rounds:
            self._spans.append((text, drafted))

    def piece(self, num_prompt_tokens: int) -> Delta:
        """What has not been given out yet."""
        assert self._progress is not None
        reason, entries = self.finish_reason, None
        if self._spell is not None:
            entries = tuple(self._entries[self._num_sent : self._text.num_given])
            self._num_sent += len(entries)
        text, self._piece, self._told = self._piece, "", reason is not None
        spans, self._spans = tuple(self._spans), []
        ids, self._ids = tuple(self._ids) if self._tells_ids else None, []
        prompt_ids, self._prompt_ids = self._prompt_ids, None
        return Delta(
            text, reason, num_prompt_tokens, self._text.num_tokens, self._progress.version,
            index=self._index, logprobs=entries,
            num_rounds=self._num_rounds, num_emitted=self._num_emitted, spans=spans,
            token_ids=ids, prompt_token_ids=prompt_ids,
        )  # fmt: skip


async def answer(
    mailbox: "asyncio.Queue[Mail]", choices: Sequence[Choice], num_prompt_tokens: int
) -> AsyncIterator[Item]:
    """A request's progress as pieces; what came while the last one was sent goes into one piece a choice."""
    while any(choice.finish_reason is None for choice in choices):
        index, progress = await mailbox.get()
        error = _error(progress)
        if error is not None:
            yield error
            return
        choices[index].take(progress)
        ready = choices if mailbox.empty() else [choices[index]] if choices[index].finish_reason else []
        for choice in ready:
            if choice.has_piece:
                yield choice.piece(num_prompt_tokens)


def _error(progress: Progress) -> ErrorBody | None:
    if progress.unhosted is not None:
        return unknown_model(progress.unhosted)
    if progress.refused is not None:
        return ErrorBody(status=400, message=progress.refused)
    if progress.failed is not None:
        return unavailable("the engine stopped; send the request again")
    return None


def _spelled(spell: Spelling, token: TokenLogprob, offset: int) -> SpelledToken:
    chosen, *top = (Spelled(*spell(one), value) for one, value in ((token.token, token.logprob), *token.top))
    return SpelledToken(chosen, offset, tuple(top))
