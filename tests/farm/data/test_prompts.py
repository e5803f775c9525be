import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.config import UserError
from farm.data.prompts import RowError, load_prompts, split_prompts, split_rows

ROWS = [{"id": f"r{n}", "prompt": f"question {n}", "answer": f"answer {n}"} for n in range(6)]


def lines(path: Path, *texts: str) -> str:
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return lines(tmp_path / "p.jsonl", *(json.dumps(row) for row in ROWS))


@pytest.mark.parametrize(
    "broken",
    ['{"prompt": "cut', "[]", "3", '{"prompt": ""}', '{"prompt": 7}', '{"text": "x"}', '{"messages": []}']
    + ['{"messages": [{"role": "user"}]}', '{"messages": "hello"}', '{"prompt": " \\n"}', "[" * 5000],
)
def test_a_broken_line_is_counted_and_the_rows_around_it_keep_their_numbers(tmp_path, broken):
    loaded = load_prompts(lines(tmp_path / "p.jsonl", '{"prompt": "a"}', broken, '{"prompt": "b"}'))
    assert [prompt.row for prompt in loaded.prompts] == [0, 2]
    assert [error.row for error in loaded.errors] == [1]
    assert loaded.num_rows == 3


def test_a_line_that_is_no_utf8_is_a_row_error(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "\xff"}\n{"prompt": "a"}\n')
    loaded = load_prompts(str(tmp_path / "p.jsonl"))
    assert [type(loaded.errors[0]), loaded.errors[0].row] == [RowError, 0]
    assert len(loaded.prompts) == 1


@pytest.mark.parametrize("content", ["", "\n\n", "not json\n", '{"prompt": ""}\n'])
def test_a_file_without_a_usable_prompt_is_refused_with_its_name(tmp_path, content):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=r'p\.jsonl: .*\{"prompt": "\.\.\."\}'):
        load_prompts(str(tmp_path / "p.jsonl"))


def test_a_range_without_rows_is_refused(source):
    with pytest.raises(UserError, match="select none of its 6 prompts"):
        load_prompts(source, (6, None))


def test_an_answer_at_the_end_of_a_conversation_is_its_answer_and_no_part_of_the_prompt(tmp_path):
    """Else a target would be asked to go on after it has answered."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    more = [*turns, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    rows = [{"messages": turns}, {"messages": more, "answer": "given"}, {"messages": turns[1:]}]
    loaded = load_prompts(lines(tmp_path / "p.jsonl", *map(json.dumps, rows)))
    assert [[turn["content"] for turn in prompt.messages] for prompt in loaded.prompts] == [
        ["a"],
        ["a", "b", "c"],
    ]
    assert [prompt.answer for prompt in loaded.prompts] == ["b", "given"]
    assert loaded.errors == (RowError(2, "has no message but the assistant's"),)


@pytest.mark.parametrize("field", ["id", "prompt", "answer"])
def test_a_cut_emoji_is_a_row_error_and_fails_no_target_later(tmp_path, field):
    row = {"id": "x", "prompt": "a", "answer": "b"} | {field: "cut \ud83d"}
    loaded = load_prompts(lines(tmp_path / "p.jsonl", json.dumps(row), '{"prompt": "whole \\ud83d\\ude00"}'))
    assert [error.row for error in loaded.errors] == [0]
    assert [prompt.messages[0]["content"] for prompt in loaded.prompts] == ["whole \U0001f600"]


def test_a_prompt_that_is_held_out_too_is_not_trained_on(tmp_path):
    texts = ["same", "other", "same"]
    source = lines(tmp_path / "p.jsonl", *(json.dumps({"prompt": text}) for text in texts))
    split = split_prompts(load_prompts(source), None, None, 1)
    assert [prompt.row for prompt in split.prompts] == [1]
    assert [prompt.row for prompt in split.held_out] == [2]
    assert split.errors == (RowError(0, "is held out too"),)


def test_a_line_separator_inside_a_prompt_does_not_split_it(tmp_path):
    loaded = load_prompts(
        lines(tmp_path / "p.jsonl", json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False))
    )
    assert [prompt.messages[0]["content"] for prompt in loaded.prompts] == ["a\u2028b\x85c"]


def test_a_prompt_is_a_user_message_and_a_conversation_stays_one(tmp_path):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    loaded = load_prompts(
        lines(tmp_path / "p.jsonl", '{"prompt": "p"}', json.dumps({"messages": turns, "id": 7}))
    )
    assert loaded.prompts[0].messages == ({"role": "user", "content": "p"},)
    assert (loaded.prompts[0].id, loaded.prompts[0].answer) == ("0", None)
    assert (loaded.prompts[1].messages, loaded.prompts[1].id) == (tuple(turns), "7")


def test_rows_keep_their_index_in_the_source_when_only_some_are_read(source):
    loaded = load_prompts(source, (-2, None))
    assert [(prompt.row, prompt.id) for prompt in loaded.prompts] == [(4, "r4"), (5, "r5")]
    assert loaded.num_rows == 6


def test_parquet_folder_and_jsonl_give_the_same_prompts_and_digest(source, tmp_path):
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(str(tmp_path / "p.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    dataset.select(range(3)).to_json(str(tmp_path / "folder" / "a.jsonl"))
    dataset.select(range(3, 6)).to_json(str(tmp_path / "folder" / "b.jsonl"))
    expected = load_prompts(source)
    for other in ("p.parquet", "saved", "folder"):
        loaded = load_prompts(str(tmp_path / other))
        assert (loaded.prompts, loaded.digest) == (expected.prompts, expected.digest)


def test_conversations_in_parquet_are_read(tmp_path):
    import datasets

    turns = [{"role": "user", "content": "u"}]
    datasets.Dataset.from_list([{"messages": turns}]).to_parquet(str(tmp_path / "p.parquet"))
    assert load_prompts(str(tmp_path / "p.parquet")).prompts[0].messages == tuple(turns)


@pytest.mark.parametrize("name", ["p.parquet", "p.txt"])
def test_a_file_that_is_no_prompts_file_is_refused_with_the_remedy(tmp_path, name):
    (tmp_path / name).write_text("nonsense")
    with pytest.raises(UserError, match=r"\.jsonl or \.parquet"):
        load_prompts(str(tmp_path / name))


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet", "./gone", "a/deep/folder"])
def test_a_path_that_is_not_there_is_no_data_set_of_the_hub(monkeypatch, name):
    """Asked for it, the hub answers after many attempts, and with something about repositories."""
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=f"^{re.escape(name)}: there are no prompts at this path"):
        load_prompts(name)


def test_the_digest_follows_the_content_that_was_asked_for(source, tmp_path):
    whole, part = load_prompts(source), load_prompts(source, (0, 5))
    changed = lines(tmp_path / "q.jsonl", *(json.dumps(row) for row in ROWS[:5]), '{"prompt": "other"}')
    assert whole.digest != part.digest
    assert load_prompts(changed).digest != whole.digest
    assert load_prompts(changed, (0, 5)).digest == part.digest


def test_by_default_the_last_rows_are_held_out():
    assert split_rows(100, None, None, 64) == (range(36), range(36, 100))


def test_rows_left_by_a_held_out_range_are_adapted_on():
    assert split_rows(100, None, (0, 20), 64) == (range(20, 100), range(20))
    assert split_rows(100, None, (90, None), 64) == (range(90), range(90, 100))


@pytest.mark.parametrize(
    ("regenerate", "evaluate", "told"),
    [
        (None, None, "64 held-out rows"),
        ((0, 50), (40, None), "overlap"),
        ((-30, None), (20, None), "overlap"),
        ((0, -1), None, "overlap"),
        ((60, None), (0, 10), "regenerate.rows: selects none"),
        ((0, 10), (60, None), "evaluate.rows: selects none"),
        (None, (0, None), "regenerate.rows: selects none"),
    ],
)
def test_rows_that_cannot_be_split_are_refused(regenerate, evaluate, told):
    with pytest.raises(UserError, match=told):
        split_rows(50, regenerate, evaluate, 64)


RANGE = st.none() | st.tuples(st.integers(-40, 40), st.none() | st.integers(-40, 40))


@given(st.integers(0, 40), RANGE, RANGE, st.integers(1, 40))
def test_no_split_ever_trains_on_a_held_out_row(num_rows, regenerate, evaluate, prompts):
    try:
        used, held_out = split_rows(num_rows, regenerate, evaluate, prompts)
    except UserError:
        return
    assert used
    assert held_out
    assert not set(used) & set(held_out)
    assert set(used) | set(held_out) <= set(range(num_rows))
