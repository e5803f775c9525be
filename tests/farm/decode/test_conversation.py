"""Conversations: every turn is answered by the target, in exact token ids, each after what was really said before."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from farm.config import UserError
from farm.data.chat import encode_chat, user_turns
from farm.data.prompts import Prompt
from farm.decode.conversation import Conversation
from farm.decode.endpoint import Answered
from farm.decode.regenerate import prefill_rows, regenerate_rows
from farm.layers.cache import Rows
from farm.sections import RegenerateSettings, TargetSpec
from farm.target import zoo
from farm.target.load import LoadedTarget, load_target
from tests.farm.models import tiny_model

SETTINGS = RegenerateSettings(max_new_tokens=12, batch_rows=4)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LoadedTarget:
    """It says <|end|> early: else no conversation would go on."""
    folder: Path = tmp_path_factory.mktemp("target")
    model, tokenizer = tiny_model(vocab=1024), zoo.train_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 20.0
    zoo.save(model, tokenizer, folder)
    return load_target(TargetSpec(name="t", model=str(folder), prompts=""))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def talk(row: int) -> Prompt:
    messages = (
        said("system", "be kind"), said("user", f"tell {row} stories"), said("assistant", "the data set's words"),
        said("user", "and then"), said("assistant", "more of them"), said("user", f"why {row}"),
    )  # fmt: skip
    return Prompt(row, f"id{row}", messages, None)


def pieces(answer: Any) -> list[tuple[int, ...]]:
    return [answer.answer_ids[start:end] for start, end in answer.turns]


def test_the_assistants_own_words_are_left_out() -> None:
    turns = user_turns(talk(0).messages)
    assert [[message["content"] for message in turn] for turn in turns] == [
        ["be kind", "tell 0 stories"], ["and then"], ["why 0"]
    ]  # fmt: skip
    assert user_turns((said("assistant", "hello"), said("user", "hi"))) == [[said("user", "hi")]]


def test_every_turn_is_what_the_target_says_after_all_that_came_before(target: LoadedTarget) -> None:
    """Each turn again by itself: a prompt of exactly the ids before it gives exactly its tokens."""
    answers = regenerate_rows(target, [talk(row) for row in range(40)], SETTINGS)
    more = [answer for answer in answers if len(answer.turns) > 1 and answer.temperature == 0]
    assert len(more) > 1
    for answer in more:
        ids = torch.tensor([[*answer.prompt_ids, *answer.answer_ids]])
        cache = target.forward.new_cache(1, ids.shape[1])
        best = target.forward.logits(target.forward.forward(ids, Rows([0]), cache))[0].argmax(dim=-1)
        first = len(answer.prompt_ids)
        for start, end in answer.turns:
            assert best[first + start - 1 : first + end - 1].tolist() == list(answer.answer_ids[start:end])


def test_between_two_answers_stands_what_the_template_writes(target: LoadedTarget) -> None:
    for answer in regenerate_rows(target, [talk(row) for row in range(40)], SETTINGS):
        if len(answer.turns) < 2:
            continue
        words = [target.tokenizer.decode(list(piece)).removesuffix("<|end|>") for piece in pieces(answer)]
        whole = target.tokenizer.decode([*answer.prompt_ids, *answer.answer_ids])
        expected = "<|system|>be kind<|end|>"
        for turn, text in zip(
            (f"tell {answer.row} stories", "and then", f"why {answer.row}"), words, strict=False
        ):
            expected += f"<|user|>{turn}<|end|><|assistant|>{text}<|end|>"
        assert whole in (expected, expected.removesuffix("<|end|>"))


def test_features_belong_to_all_tokens_of_a_conversation(target: LoadedTarget) -> None:
    for answer in regenerate_rows(target, [talk(row) for row in range(4)], SETTINGS):
        ids = torch.tensor([[*answer.prompt_ids, *answer.answer_ids][:-1]])
        expected = target.forward.forward(ids, Rows([0]), target.forward.new_cache(1, 256))[0]
        assert answer.features is not None
        torch.testing.assert_close(answer.features.float(), expected, atol=0.05, rtol=0.02)  # bf16


def test_an_answer_that_is_cut_ends_the_conversation(target: LoadedTarget) -> None:
    short = SETTINGS.model_copy(update={"max_new_tokens": 1, "greedy_share": 1.0})
    for answer in regenerate_rows(target, [talk(row) for row in range(8)], short):
        cut = answer.finish_reason == "length"
        assert not cut or len(answer.turns) < 3
        assert all(answer.answer_ids[end - 1] in target.stop_ids for _, end in answer.turns[:-1])


def test_with_turns_last_the_data_sets_words_are_history(target: LoadedTarget) -> None:
    (answer,) = regenerate_rows(target, [talk(3)], SETTINGS.model_copy(update={"turns": "last"}))
    assert answer.prompt_ids == tuple(encode_chat(target.tokenizer, talk(3).messages))
    assert answer.turns == ()


def test_where_target_and_template_end_an_answer_differently_the_templates_end_stands() -> None:
    one = Conversation(talk(0), (1, 2), [[7, 8]], params=None, room=64)  # type: ignore[arg-type]
    one.hear((5, 9), "stop")
    one.hear((6, 9), "stop")
    assert one.ids == [1, 2, 5, 7, 8, 6, 9]
    assert one.turns == [(2, 3), (5, 7)]


def test_a_turn_that_fails_leaves_those_before_it(
    monkeypatch: pytest.MonkeyPatch, target: LoadedTarget
) -> None:
    end = target.tokenizer.eos_token_id

    def ask_all(_: Any, requests: list[Any], stop_ids: Any) -> list[Answered]:
        assert end in stop_ids
        later = [request.id.endswith("-1") for request in requests]
        return [Answered(error="busy") if one else Answered((5, 6, end), "stop") for one in later]

    monkeypatch.setattr("farm.decode.regenerate.ask_all", ask_all)
    sampled = SETTINGS.model_copy(update={"greedy_share": 0.0})
    (answer,) = regenerate_rows(target, [talk(0)], sampled, endpoint=object())  # type: ignore[arg-type]
    assert answer.answer_ids == (5, 6, end)
    assert answer.finish_reason == "stop"
    assert answer.features is not None


def test_a_template_that_changes_an_assistants_words_is_refused_with_the_remedy(target: LoadedTarget) -> None:
    shouts = zoo.CHAT_TEMPLATE.replace("m['content']", "m['content']|upper")
    spoiled = replace(target, chat_template=shouts)
    with pytest.raises(UserError, match="regenerate.turns: last"):
        Conversation.of(spoiled, talk(0), SETTINGS)


@pytest.mark.parametrize("answer", [regenerate_rows, prefill_rows])
def test_a_prompt_with_a_token_that_the_target_has_no_row_for_becomes_an_error_row(
    answer: Any, target: LoadedTarget
) -> None:
    """Tokenizers grow beyond the checkpoint that they come with; the other rows are answered all the same."""
    tokenizer = zoo.train_tokenizer()
    tokenizer.add_tokens(["<new>"])
    grown = replace(target, tokenizer=tokenizer)
    stranger, known = ((said("user", text),) for text in ("what is <new>", "what is that"))
    rows = [Prompt(row, f"id{row}", messages, "that") for row, messages in enumerate((stranger, known))]
    failed, fine = answer(grown, rows, SETTINGS)
    assert failed.finish_reason == "error"
    assert "1024" in str(failed.error)
    assert fine.finish_reason != "error"
