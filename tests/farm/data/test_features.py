"""Shards of answers: what was written comes back, and a damaged shard is one clear error."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from farm.artifacts import Artifacts
from farm.config import UserError
from farm.data.features import Answer, answer_tokens, read_shards, trainable_rows, write_shard
from farm.data.shards import shard_names
from farm.store import open_store


def answer(row: int, num_tokens: int) -> Answer:
    features = torch.full((2 + num_tokens - 1, 4), float(row))
    return Answer(row, f"id{row}", (1, 2), tuple(range(num_tokens)), "stop", 7, 0.5, features)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    failed = Answer(1, "id1", (), (), "error", 0, 0.0, None, "no room")
    artifacts = Artifacts(open_store(tmp_path.as_uri()))
    write_shard(artifacts, "answers", "key", 0, [answer(0, 3), failed, answer(2, 5)])
    return tmp_path / "artifacts" / "answers" / "key"


def test_samples_come_back_in_order_without_the_error_rows(folder: Path) -> None:
    tokens_name, features_name = shard_names(0)
    first, second = read_shards([folder / features_name])
    assert first.tokens_T.tolist() == [1, 2, 0, 1, 2]
    assert second.features_TH.shape == (6, 4)
    assert second.features_TH.unique().tolist() == [2.0]
    assert first.num_prompt_tokens == 2
    assert [len(ids) for ids in answer_tokens([folder / tokens_name])] == [3, 0, 5]


@pytest.mark.parametrize("name", shard_names(0))
def test_a_truncated_shard_is_the_users_to_delete(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="delete its artifact and run again"):
        read_shards([folder / shard_names(0)[1]])


def test_tokens_and_features_of_different_shards_are_not_mixed(folder: Path) -> None:
    artifacts = Artifacts(open_store(folder.parents[2].as_uri()))
    write_shard(artifacts, "answers", "key", 1, [answer(0, 9)])
    (folder / shard_names(1)[1]).replace(folder / shard_names(0)[1])
    with pytest.raises(UserError, match="features for"):
        read_shards([folder / shard_names(0)[1]])


def judged(tmp_path: Path, shards: list[list[Answer]], reject: tuple[str, ...]) -> list[Path]:
    artifacts = Artifacts(open_store(tmp_path.as_uri()))
    for number, rows in enumerate(shards):
        write_shard(artifacts, "answers", "key", number, [row.judged(reject) for row in rows])  # type: ignore[arg-type]
    return [tmp_path / "artifacts/answers/key" / shard_names(number)[1] for number in range(len(shards))]


def test_rejected_answers_and_all_but_the_first_of_equal_ones_are_not_read(tmp_path: Path) -> None:
    loop = Answer(1, "id1", (1, 2), (4,) * 40, "length", 0, 0.0, torch.zeros(41, 4))
    shards = [[answer(0, 3), loop], [replace(answer(2, 3), row=2), answer(3, 5)]]
    paths = judged(tmp_path, shards, ("loop", "duplicate"))
    assert [sample.row for sample in read_shards(paths)] == [0, 3]
    assert sorted(trainable_rows(paths)) == [0, 3]
    assert [sample.row for sample in read_shards(paths, rows={2})] == [
        2
    ]  # who names rows has chosen among them
    paths = judged(tmp_path, shards, ())
    assert [sample.row for sample in read_shards(paths)] == [0, 1, 2, 3]


def test_turns_come_back_as_stretches_of_all_tokens(tmp_path: Path) -> None:
    talk = replace(answer(0, 9), turns=((0, 3), (5, 9)))
    (sample,) = read_shards(judged(tmp_path, [[talk]], ()))
    assert sample.said == ((2, 5), (7, 11))
    assert sample.num_said == 7


def test_a_shard_that_was_written_without_faults_and_turns_is_read_whole(tmp_path: Path) -> None:
    (path,) = judged(tmp_path, [[answer(0, 3), answer(1, 5)]], ("loop",))
    tokens = path.with_name(shard_names(0)[0])
    table = pq.read_table(tokens)
    pq.write_table(table.drop_columns(["turns", "fault", "rejected", "digest"]), tokens)
    assert [sample.said for sample in read_shards([path])] == [((2, 5),), ((2, 7),)]
    assert sorted(trainable_rows([path])) == [0, 1]
    assert len(list(answer_tokens([tokens]))) == 2
