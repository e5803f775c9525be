# T tokens, H hidden
"""A prompt's conversation with the target: every turn of the user's is answered by the target, in exact token ids.

What a data set's assistant said in between is left out, since the target would not have said it. Between two answers
stands what the chat template writes there, so that no answer is decoded to text and read again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from farm.config import UserError
from farm.data.chat import behind_answer, encode_chat, user_turns
from farm.data.features import FEATURE_DTYPE, Answer
from farm.data.prompts import Prompt
from farm.decode.engine import FinishReason, Request
from farm.decode.sampling import SamplingParams
from farm.decode.scheduler import unknown_token
from farm.sections import RegenerateSettings
from farm.target.load import LoadedTarget

ENDED = "said"  # what stands for an earlier answer where only what follows a later one is rendered


@dataclass
class Conversation:
    """One row under way. `ids` is all that was read and said, `turns` the stretches of it that the target said."""

    prompt: Prompt
    opening: tuple[int, ...]  # up to the first answer
    following: list[list[int]]  # behind each answer but the last: what comes before the next one
    params: SamplingParams
    room: int  # positions of the target
    ids: list[int] = field(default_factory=list)
    turns: list[tuple[int, int]] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    features: Tensor | None = None
    error: str | None = None

    @classmethod
    def of(cls, target: LoadedTarget, prompt: Prompt, settings: RegenerateSettings) -> Conversation:
        """Raises UserError when the prompt leaves no room or is not the target's, or the chat template fails on it."""
        tokenizer, template = target.tokenizer, target.chat_template
        first, *others = user_turns(prompt.messages) if settings.turns == "all" else [list(prompt.messages)]
        opening = tuple(encode_chat(tokenizer, first, template))
        if target.max_positions - len(opening) < 2:
            raise UserError(
                f"{len(opening)} prompt tokens leave no room in {target.max_positions} positions; shorten the prompt"
            )
        following, messages = [], list(first)
        for turn in others:
            text = behind_answer(tokenizer, messages, turn, template)
            following.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
            messages += [{"role": "assistant", "content": ENDED}, *turn]
        for ids in (opening, *following):
            check_known(ids, target)
        return cls(prompt, opening, following, sampling_of(prompt, settings), target.max_positions)

    def request(self) -> Request | None:
        """For the next answer; None when there is none to come, or no room for one."""
        turn = len(self.turns)
        if self.error is not None or self.finish_reason != "stop" or turn > len(self.following):
            return None
        ids, _ = self._read()
        room = self.room - len(ids)
        if room < 2:
            return None
        params = replace(
            self.params,
            max_new_tokens=min(self.params.max_new_tokens, room),
            seed=_seed(f"{self.params.seed} turn {turn}") if turn else self.params.seed,
        )
        return Request(f"{self.prompt.row}-{turn}", tuple(ids), params)

    def _read(self) -> tuple[list[int], int]:
        """What the target reads before its next answer, and how much of it is what was read and said before."""
        if not self.turns:
            return list(self.opening), 0
        between = self.following[len(self.turns) - 1]
        # The template ends an answer, too: mostly by the token that the target ended it with.
        if between[:1] == self.ids[-1:]:
            return [*self.ids, *between[1:]], len(self.ids)
        return [*self.ids[:-1], *between], len(self.ids) - 1

    def hear(self, tokens: tuple[int, ...], reason: FinishReason, features_TH: Tensor | None = None) -> None:
        """The answer to `request`; features [T - 1, H] are of all T tokens so far but the last."""
        read, kept = self._read()
        if self.turns:
            self.turns[-1] = self.turns[-1][0], kept
        self.turns.append((len(read), len(read) + len(tokens)))
        self.ids, self.finish_reason = [*read, *tokens], reason
        self.features = None if features_TH is None else features_TH.to(FEATURE_DTYPE).cpu()

    def fail(self, reason: str) -> None:
        """No answer came; those before stay."""
        self.error = reason

    def answer(self) -> Answer:
        """The row: all turns together, or why there is none."""
        prompt, start = self.prompt, len(self.opening)
        if not self.turns:
            return Answer(prompt.row, prompt.id, (), (), "error", 0, 0.0, None, self.error)
        return Answer(
            row=prompt.row,
            id=prompt.id,
            prompt_ids=self.opening,
            answer_ids=tuple(self.ids[start:]),
            finish_reason=self.finish_reason,
            seed=self.params.seed,
            temperature=self.params.temperature,
            features=self.features,
            turns=tuple((first - start, end - start) for first, end in self.turns)
            if len(self.turns) > 1
            else (),
        )


def check_known(ids: Sequence[int], target: LoadedTarget) -> None:
    """Raises UserError for a token id that the tokenizer writes and the target's embedding has no row for."""
    stranger = unknown_token(ids, target.forward.vocab_size)
    if stranger is not None:
        raise UserError(
            f"prompt token {stranger} is outside the target's {target.forward.vocab_size} tokens; "
            "give the tokenizer that belongs to this checkpoint"
        )


def sampling_of(prompt: Prompt, settings: RegenerateSettings) -> SamplingParams:
    """Greedy for a share of the rows, sampled for the rest; which and with which seed follows from the row's id."""
    digest = hashlib.sha256(f"{settings.seed} {prompt.id}".encode()).digest()
    greedy = int.from_bytes(digest[:4], "big") / 2**32 < settings.greedy_share
    return SamplingParams(
        temperature=0.0 if greedy else settings.temperature,
        top_p=1.0 if greedy else settings.top_p,
        seed=int.from_bytes(digest[4:11], "big"),
        max_new_tokens=settings.max_new_tokens,
    )


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
