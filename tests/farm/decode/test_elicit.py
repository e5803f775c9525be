"""Prompts that a target makes up: what it reads first, where a user's turn ends, what is rejected and why."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from farm.config import Refused
from farm.data.chat import TEXT_TEMPLATE, encode_chat
from farm.data.prompts import Prompt
from farm.decode.elicit import Opening, elicit, elicit_from, opening_of
from farm.decode.engine import Request
from farm.decode.regenerate import regenerate_rows
from farm.sections import ElicitSettings, RegenerateSettings, TargetSpec
from farm.target import zoo
from farm.target.load import LoadedTarget, load_target
from tests.farm.models import talkative

TOKENIZER = zoo.train_tokenizer()
END = TOKENIZER.eos_token_id
CHAT = opening_of(TOKENIZER, None)
SETTINGS = ElicitSettings(prompts=4, attempts=2, max_new_tokens=12)


def ids(text: str) -> list[int]:
    return [int(token) for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]]


def script(*turns: str) -> tuple[list[Request], Any]:
    """What was asked, and a decoder that says `turns`; one that does not end with `|` is cut by its length."""
    asked: list[Request] = []

    def decode(requests: Sequence[Request]) -> list[tuple[list[int], str]]:
        said = turns[len(asked) : len(asked) + len(requests)]
        asked.extend(requests)
        ended = [
            (ids(turn[:-1]) + [END], "stop") if turn.endswith("|") else (ids(turn), "length") for turn in said
        ]
        return ended

    return asked, decode


def test_the_opening_is_the_template_up_to_the_users_words() -> None:
    whole = encode_chat(TOKENIZER, [{"role": "user", "content": "tell a story"}])
    assert whole[: len(CHAT.ids)] == list(CHAT.ids)
    assert TOKENIZER.decode(whole[len(CHAT.ids) :]).startswith("tell a story")
    assert CHAT.end_ids == {END}


def test_a_template_that_ends_a_turn_in_plain_text_is_cut_there() -> None:
    opening = opening_of(TOKENIZER, "<s>[INST] {{ messages[0]['content'] }} [/INST]")
    assert (opening.end, opening.end_ids) == ("[/INST]", frozenset())
    _, decode = script("fox one [/INST] answer", "fox two", "fox three|", "fox four [/INST]")
    found = elicit(TOKENIZER, opening, frozenset({END}), SETTINGS.model_copy(update={"attempts": 1}), decode)
    assert found.prompts == ("fox one", "fox three", "fox four")
    assert found.rejected == {"truncated": 1}


def test_without_a_template_the_text_begins_at_the_first_token_and_may_be_cut() -> None:
    opening = opening_of(TOKENIZER, TEXT_TEMPLATE)
    assert opening == Opening((END,), "", frozenset())  # the zoo has no BOS token
    _, decode = script("fox one", "fox two|", "fox three", "fox four")
    found = elicit(TOKENIZER, opening, frozenset({END}), SETTINGS, decode)
    assert found.prompts == ("fox one", "fox two", "fox three", "fox four")


def test_a_template_that_changes_the_words_is_refused() -> None:
    with pytest.raises(Refused, match="changes a user's words"):
        opening_of(TOKENIZER, "<s>{{ messages[0]['content'] | upper }}</s>")


def test_rejects_are_counted_by_name_and_nothing_is_drawn_beyond_what_is_wanted() -> None:
    loop = "the fox says so " * 6
    turns = ("Fox  one|", " ?! |", "fox one|", loop + "|", "fox two", "fox three|", "fox four|", "fox five|")
    asked, decode = script(*turns)
    found = elicit(TOKENIZER, CHAT, frozenset({END}), SETTINGS, decode)
    assert found.prompts == ("Fox  one", "fox three", "fox four", "fox five")
    assert found.rejected == {"duplicate": 1, "empty": 1, "loop": 1, "truncated": 1}
    assert len({request.params.seed for request in asked}) == len(asked) == 8
    few, decode = script(*turns)
    assert elicit(
        TOKENIZER, CHAT, frozenset({END}), SETTINGS.model_copy(update={"prompts": 1}), decode
    ).prompts == ("Fox  one",)
    assert [one.params.seed for one in few] == [asked[0].params.seed]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LoadedTarget:
    folder: Path = tmp_path_factory.mktemp("talkative")
    zoo.save(talkative(TOKENIZER), TOKENIZER, folder)
    return load_target(TargetSpec(name="t", model=str(folder)))


def test_a_targets_own_prompts_repeat_and_are_answered_as_any_others(target: LoadedTarget) -> None:
    settings, decoding = ElicitSettings(prompts=12, max_new_tokens=40), RegenerateSettings(batch_rows=5)
    opening, found = elicit_from(target, settings, decoding, None)
    _, again = elicit_from(target, settings, RegenerateSettings(batch_rows=3), None)
    assert found == again
    assert len(set(found.prompts)) == 12
    assert not any("<|" in prompt for prompt in found.prompts)
    _, other = elicit_from(target, settings.model_copy(update={"seed": 1}), decoding, None)
    assert not set(other.prompts) & set(found.prompts)
    rows = [
        Prompt(row, str(row), ({"role": "user", "content": one},), None)
        for row, one in enumerate(found.prompts)
    ]
    answers = regenerate_rows(target, rows, RegenerateSettings(max_new_tokens=8))
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}
    assert all(answer.prompt_ids[: len(opening.ids)] == opening.ids for answer in answers)


def test_a_turn_that_ends_at_once_or_never_gives_no_prompt(target: LoadedTarget) -> None:
    cut = ElicitSettings(prompts=8, max_new_tokens=1, attempts=1)
    _, found = elicit_from(target, cut, RegenerateSettings(), None)
    assert found.prompts == ()
    assert set(found.rejected) <= {"truncated", "empty"}
    assert sum(found.rejected.values()) == 8


def test_a_model_that_cannot_hold_the_whole_turn_is_asked_for_less(target: LoadedTarget) -> None:
    endless = ElicitSettings(prompts=2, max_new_tokens=10**6)
    _, found = elicit_from(target, endless, RegenerateSettings(), None)
    assert len(found.prompts) == 2
