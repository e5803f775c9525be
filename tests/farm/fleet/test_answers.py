"""A finished answers artifact: what its shards' cards add up to, and when there is nothing to train on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from farm.artifacts import Artifacts
from farm.config import Refused
from farm.data.features import Answer, local_shards, read_shards, write_shard
from farm.data.prompts import Prompt
from farm.data.shards import shard_names
from farm.fleet.answers import (
    ANSWERS,
    AnswersJob,
    card_name,
    feature_shards,
    finish_answers,
    put_card,
)
from farm.sections import RegenerateSettings, TargetSpec
from farm.store import open_store


def job(reject: tuple[str, ...] = ("loop", "duplicate")) -> AnswersJob:
    prompts = tuple(Prompt(row, f"{row}", ({"role": "user", "content": "hi"},), None) for row in range(4))
    settings = RegenerateSettings(shard_rows=2, reject=reject)  # type: ignore[arg-type]
    return AnswersJob(TargetSpec(name="math", model="m"), settings, "key", prompts)


WHOLE = {
    "rows": 2, "finish_reasons": {"stop": 2, "length": 0, "error": 0}, "faults": {}, "rejected": 0, "digests": [],
    "answer_tokens": 10, "feature_bytes": 0, "first_error": None, "seconds": 1.0,
}  # fmt: skip


def write_cards(root: Path, *cards: dict[str, Any]) -> Artifacts:
    artifacts = Artifacts(open_store(root.as_uri()))
    for number, card in enumerate(cards):
        for name in shard_names(number):
            artifacts.put_file(ANSWERS, "key", name, b"that nothing here reads")
        artifacts.put_file(ANSWERS, "key", card_name(number), json.dumps(WHOLE | card).encode())
    return artifacts


def answer(text: int) -> Answer:
    return Answer(0, "a", (1, 2), (text,) * text, "stop", 0, 0.0, torch.full((1 + text, 4), float(text)))


def test_of_two_runs_that_write_a_shard_at_once_it_has_the_files_and_the_card_of_one(tmp_path: Path) -> None:
    """Their tokens may differ by rounding; the slower one even ends after the shard was finished."""
    artifacts = write_cards(tmp_path)
    cards = {writer: WHOLE | {"files": shard_names(0, writer)} for writer in ("one", "two", "late")}
    write_shard(artifacts, ANSWERS, "key", 0, [answer(3)], writer="one")
    write_shard(artifacts, ANSWERS, "key", 0, [answer(5)], writer="two")
    assert put_card(artifacts, "key", 0, cards["two"])
    assert not put_card(artifacts, "key", 0, cards["one"])
    artifacts.put_file(
        ANSWERS, "key", shard_names(0, "killed")[1], b"of a run that was killed before its card"
    )
    finished = finish_answers(artifacts, replace(job(), prompts=job().prompts[:2]))
    write_shard(artifacts, ANSWERS, "key", 0, [answer(7)], writer="late")
    assert not put_card(artifacts, "key", 0, cards["late"])
    (sample,) = read_shards(local_shards(feature_shards(finished, artifacts)))
    assert sample.tokens_T.tolist() == [1, 2, 5, 5, 5, 5, 5]
    assert sample.features_TH.unique().tolist() == [5.0]
    assert len(artifacts.files(ANSWERS, "key")) == 3 + 1  # and what the killed one left


def test_shards_of_a_store_from_before_writers_had_names_are_found(tmp_path: Path) -> None:
    artifacts = write_cards(tmp_path, {})
    write_shard(artifacts, ANSWERS, "key", 0, [answer(3)])
    finished = finish_answers(artifacts, replace(job(), prompts=job().prompts[:2]))
    assert len(read_shards(local_shards(feature_shards(finished, artifacts)))) == 1


def test_equal_answers_of_two_shards_are_counted_once(tmp_path: Path) -> None:
    artifacts = write_cards(
        tmp_path, {"digests": ["a", "b"]}, {"digests": ["b"], "faults": {"loop": 1}, "rejected": 1}
    )
    made = finish_answers(artifacts, job()).manifest
    assert made["faults"] == {"loop": 1, "duplicate": 1}
    assert (made["rows"], made["rejected"], made["answer_tokens"]) == (4, 2, 20)


def test_a_fault_that_rejects_nothing_is_counted_all_the_same(tmp_path: Path) -> None:
    artifacts = write_cards(tmp_path, {"digests": ["a", "a"]}, {"faults": {"truncated": 2}})
    made = finish_answers(artifacts, job(())).manifest
    assert made["faults"] == {"duplicate": 1, "truncated": 2}
    assert made["rejected"] == 0


def test_answers_that_are_all_rejected_refuse_the_target_with_their_faults_and_the_remedy(
    tmp_path: Path,
) -> None:
    loops = {"faults": {"loop": 2}, "rejected": 2}
    failed = {"finish_reasons": {"stop": 0, "length": 0, "error": 2}, "first_error": "no room"}
    with pytest.raises(
        Refused, match=r"math: none of its 4 answers can be trained on \(2 loop\).*regenerate.reject"
    ):
        finish_answers(write_cards(tmp_path, loops, failed), job())
    with pytest.raises(Refused, match="none of its 4 prompts got an answer; the first failed with: no room"):
        finish_answers(write_cards(tmp_path, failed, failed), job())
