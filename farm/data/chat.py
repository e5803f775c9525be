"""Messages to token ids by the target's chat template, with the length of the prompt as the loss mask."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farm.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
# Stands for words that are not known yet while a template is rendered.
MARK = "\N{BLACK STAR}7f3a\N{BLACK STAR}"
# For a target that has none: its prompts are texts, and it goes on with them.
TEXT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


def read_template(value: str | None) -> str | None:
    """The template's text from a manifest's `chat_template`: a jinja file's path, or the text itself."""
    if value is None or "{" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{value}: chat_template cannot be read ({error}); give a jinja file or its text"
        ) from error


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: Messages, template: str | None = None
) -> list[int]:
    """Token ids of the conversation up to where the assistant's answer begins; never empty.

    `template` is the template's text; None: the tokenizer's own. UserError if there is none, or if it fails.
    """
    return _apply(tokenizer, messages, template, add_generation_prompt=True)


def user_turns(messages: Messages) -> list[list[Mapping[str, str]]]:
    """What comes before each answer: the first with all that stands before it; the assistant's own words left out."""
    turns: list[list[Mapping[str, str]]] = [[]]
    for message in messages:
        if message["role"] != "assistant":
            turns[-1].append(message)
        elif turns[-1]:
            turns.append([])
    return [turn for turn in turns if turn] or [list(messages)]


def behind_answer(
    tokenizer: "PreTrainedTokenizerBase", messages: Messages, turn: Messages, template: str | None = None
) -> str:
    """What the template writes behind an answer to `messages`, with the user's `turn`, up to where the next begins.

    UserError as `encode_chat`, and if it changes an assistant's words.
    """
    words = {"role": "assistant", "content": MARK}
    text = render_chat(tokenizer, [*messages, words, *turn], template, add_generation_prompt=True)
    _, mark, after = text.rpartition(MARK)
    if not mark:
        raise UserError(
            "chat_template: changes an assistant's words, so that turns cannot be answered one by one; set "
            "regenerate.turns: last"
        )
    return after


def encode_pair(
    tokenizer: "PreTrainedTokenizerBase", messages: Messages, answer: str, template: str | None = None
) -> tuple[list[int], int]:
    """Token ids of prompt and answer, and how many of them are the prompt.

    The ids begin with exactly `encode_chat(messages)`, so that an answer is trained on in the position it is
    decoded in; the end token that the template writes after an answer belongs to it.
    """
    prompt_ids = encode_chat(tokenizer, messages, template)
    prompt = render_chat(tokenizer, messages, template, add_generation_prompt=True)
    whole = render_chat(
        tokenizer,
        [*messages, {"role": "assistant", "content": answer}],
        template,
        add_generation_prompt=False,
    )
    end = tokenizer.eos_token or ""
    rest = whole[len(prompt) :] if whole.startswith(prompt) else answer + end
    if end and end in rest:
        rest = rest[: rest.rindex(end) + len(end)]  # decoding stops there: no template newline after it
    rest_ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    return prompt_ids + [int(token) for token in rest_ids], len(prompt_ids)


def _apply(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Messages,
    template: str | None,
    *,
    add_generation_prompt: bool,
) -> list[int]:
    text = render_chat(tokenizer, messages, template, add_generation_prompt=add_generation_prompt)
    # the template writes the special tokens itself: adding them here would double the first one
    ids = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise UserError("chat_template: renders to no token; correct the template or the prompt")
    return ids


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Messages,
    template: str | None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as text, with or without the beginning of an answer; UserError as `encode_chat`."""
    from jinja2 import TemplateError

    if template is None and not tokenizer.chat_template:
        raise UserError(
            "chat_template: the tokenizer has none; set the target's chat_template in the manifest"
        )
    conversation: list[dict[str, Any]] = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise UserError(
            f"chat_template: fails on a prompt ({error}); correct the template or the row"
        ) from error
    assert isinstance(text, str)
    return text
